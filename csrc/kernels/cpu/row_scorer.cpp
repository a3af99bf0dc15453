#include "kernels/cpu/row_scorer.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace cnnrnn {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

bool all_finite(const float* values, int64_t n) {
  constexpr uint32_t kExponent = 0x7f800000;
  uint32_t bad = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t value;
    std::memcpy(&value, values + i, sizeof value);
    bad |= (value & kExponent) == kExponent ? 1 : 0;
  }
  return bad == 0;
}

}  // namespace

RowScorer::RowScorer(CpuHead* head, const BeamRules& rules, const ImageEmbeddings& images,
                     int64_t slots, int64_t rows)
    : head_(*head),
      prefixes_(head->prefixes()),
      kernels_(head->kernels()),
      rules_(rules),
      images_(images),
      L_(head->num_labels()),
      D_(head->joint_dim()),
      stride_(head->score_vectors() * kernels_.lanes),
      joint_(rows * D_),
      scores_(rows * stride_),
      logits_(images.label_logits == nullptr ? 0 : slots * stride_),
      later_most_(images.label_logits == nullptr ? 0 : slots * stride_) {}

bool RowScorer::is_finite(int64_t image) const {
  return all_finite(images_.joint + image * D_, D_) &&
         (images_.label_logits == nullptr ||
          all_finite(images_.label_logits + image * (L_ + 1), L_ + 1));
}

void RowScorer::take_logits(int64_t slot, int64_t image) {
  if (images_.label_logits == nullptr) return;
  kernels_.take_logits(images_.label_logits + image * (L_ + 1), L_ + 1,
                       logits_.data() + slot * stride_, later_most_.data() + slot * stride_);
}

// Rows that need their labels from nearby on share tiles.
void RowScorer::score(PathStep* steps, float** scores) {
  const int64_t rows = static_cast<int64_t>(rows_.size());
  order_rows();
  x_.resize(rows);
  y_.resize(rows);
  first_vector_.resize(rows);
  for (int64_t at = 0; at < rows; ++at) {
    const Row& row = rows_[order_[at]];
    float* total = joint_.data() + at * D_;
    kernels_.activate_sum(head_.activation(), row.projected, images_.joint + row.image * D_, total,
                          D_);
    x_[at] = total;
    y_[at] = scores_.data() + at * stride_;
    first_vector_[at] = row.first_vector;
    scores[row.index] = y_[at];
  }
  kernels_.product({rows, D_, head_.score_vectors(), x_.data(), head_.score_panels(),
                    head_.score_start(), y_.data(), first_vector_.data()});
  row_scores_.resize(rows);
  log_sum_exp_.resize(rows);
  for (int64_t at = 0; at < rows; ++at) {
    const Row& row = rows_[order_[at]];
    forbid(row.path, row.length, y_[at]);
    const int64_t from = first_scored(row.path);
    row_scores_[at] = {y_[at] + from, nullptr, nullptr, stride_ - from};
    if (images_.label_logits == nullptr) continue;
    row_scores_[at].logits = logits_.data() + row.slot * stride_ + from;
    // What is forbidden lies in the first vector alone.
    if (end_allowed(rules_, row.length) &&
        (rules_.options.order != Order::kUnique || row.length == 0)) {
      row_scores_[at].later_most = later_most_.data() + row.slot * stride_ + from;
    }
  }
  kernels_.finish_scores(row_scores_.data(), rows, log_sum_exp_.data());
  for (int64_t at = 0; at < rows; ++at) {
    steps[rows_[order_[at]].index].log_sum_exp = log_sum_exp_[at];
  }
}

// Sorts rows by their first vector: a counting sort.
void RowScorer::order_rows() {
  const size_t rows = rows_.size();
  order_.resize(rows);
  const int64_t vectors = head_.score_vectors();
  if (rules_.options.order != Order::kIncreasing || vectors == 1) {
    for (size_t i = 0; i < rows; ++i) order_[i] = static_cast<int32_t>(i);
    return;
  }
  begins_.assign(vectors + 1, 0);
  for (const Row& row : rows_) ++begins_[row.first_vector + 1];
  for (int64_t v = 1; v <= vectors; ++v) begins_[v] += begins_[v - 1];
  for (size_t i = 0; i < rows; ++i) {
    order_[begins_[rows_[i].first_vector]++] = static_cast<int32_t>(i);
  }
}

// Writes -inf where `scores` belong to what may not follow, in the vectors that are scored.
void RowScorer::forbid(const LivePath& path, int64_t length, float* scores) const {
  if (rules_.options.order == Order::kIncreasing) {
    std::fill(scores + first_scored(path), scores + first_allowed(rules_, path), -kInf);
  } else if (rules_.options.order == Order::kUnique && length > 0) {
    forbid_held(path, scores);
  }
  if (!end_allowed(rules_, length)) scores[L_] = -kInf;
}

void RowScorer::forbid_held(const LivePath& path, float* scores) const {
  scores[path.label] = -kInf;
  for (int32_t at = path.parent; at != PrefixTable::kRoot; at = prefixes_.parent(at)) {
    scores[prefixes_.last_label(at)] = -kInf;
  }
}

}  // namespace cnnrnn
