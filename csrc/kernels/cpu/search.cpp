// Beam search on the CPU: blocks of images step by step, the prefixes they share made together.
//
// A live path is a prefix and its last label. An image's step is scored when the states of its live
// paths are there; an image that needs states which are not there waits. When all images have
// ended or wait, the missing states of all of them are made at once, each once, and those images go
// on. What is arithmetic is behind CpuKernels, compiled per instruction set; here is what decides.
//
// A waiting image first scores the paths whose states are there: their END raises the score that a
// result needs, and a path below it can change nothing any more (scores only fall), so its state is
// not made. Most states that a search could ask for are saved this way.

#include "kernels/search.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <vector>

#include "kernels/beam.h"
#include "kernels/cpu/head.h"
#include "kernels/cpu/loops.h"
#include "kernels/cpu/prefix_table.h"

namespace cnnrnn {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
// A block's scores stay in the second-level cache, and its rows fill register tiles.
constexpr int64_t kBlockBytes = 128 << 10;
constexpr int64_t kBlockRows = 64;
constexpr int64_t kSliceImages = 4096;
constexpr int64_t kCacheLineFloats = 16;
// States of so few images are bound by reading the weights: better all at once.
constexpr int64_t kPatientImages = 16;

using Beam = cnnrnn::Beam<kMaxBeamSize>;
using FinishedPaths = cnnrnn::FinishedPaths<kMaxBeamSize>;
using Extensions = cnnrnn::Extensions<kMaxBeamSize>;

// An image between two steps.
struct ImageState {
  ImageState(int64_t image, int beam_size) : image(image), beam(beam_size) {}

  int64_t image;
  Beam beam;
};

enum class Outcome { kGoesOn, kEnded, kWaits };

// What one thread needs to search blocks of images.
class BlockSearch {
 public:
  BlockSearch(CpuHead* head, const SearchOptions& options, const ImageEmbeddings& images,
              const SearchOutput& output, uint32_t stamp, int64_t block_images, bool patient)
      : head_(*head),
        prefixes_(head->prefixes()),
        kernels_(head->kernels()),
        rules_{options, head->num_labels(), output.marginals != nullptr},
        images_(images),
        output_(output),
        stamp_(stamp),
        L_(head->num_labels()),
        D_(head->joint_dim()),
        N_(options.beam_size),
        stride_(head->score_vectors() * kernels_.lanes),
        patient_(patient),
        joint_(block_images * N_ * D_),
        scores_(block_images * N_ * stride_),
        logits_(images.label_logits == nullptr ? 0 : block_images * stride_),
        later_most_(images.label_logits == nullptr ? 0 : block_images * stride_),
        steps_(block_images * N_),
        path_scores_(block_images * N_) {}

  // Takes images as far as the states that are there allow.
  void run(ImageState** images, int64_t count) {
    active_.clear();
    slot_states_.assign(images, images + count);
    for (int64_t slot = 0; slot < count; ++slot) {
      if (begin(*images[slot], slot)) active_.push_back({images[slot], slot});
    }
    while (!active_.empty()) {
      rows_.clear();
      for (const Active& at : active_) look_up(at.state->beam, at.slot);
      score_rows();
      size_t left = 0;
      for (const Active& at : active_) {
        const Outcome outcome = finish_step(*at.state, at.slot);
        if (outcome == Outcome::kGoesOn) active_[left++] = at;
        if (outcome == Outcome::kWaits) waiting.push_back(at.state);
      }
      active_.resize(left);
    }
  }

  std::vector<ImageState*> waiting;
  std::vector<uint64_t> missing;  // keys of the states that they wait for
  int64_t lookups = 0;
  int64_t nonfinite_images = 0;

 private:
  struct Active {
    ImageState* state;
    int64_t slot;
  };

  struct Row {
    const float* projected;  // U_o o of the path [D]
    int32_t slot;
    int32_t path;  // index into steps_
    int32_t first_vector;
  };

  // Prepares an image; false when it ended because a value is not finite.
  bool begin(ImageState& s, int64_t slot) {
    const float* joint = images_.joint + s.image * D_;
    const float* logits =
        images_.label_logits == nullptr ? nullptr : images_.label_logits + s.image * (L_ + 1);
    if (s.beam.step == 0) {
      if (!all_finite(joint, D_) || (logits != nullptr && !all_finite(logits, L_ + 1))) {
        mark_nonfinite(s);
        return false;
      }
    }
    if (logits != nullptr) {
      kernels_.take_logits(logits, L_ + 1, logits_.data() + slot * stride_,
                           later_most_.data() + slot * stride_);
    }
    return true;
  }

  static bool all_finite(const float* values, int64_t n) {
    constexpr uint32_t kExponent = 0x7f800000;
    uint32_t bad = 0;
    for (int64_t i = 0; i < n; ++i) {
      uint32_t value;
      std::memcpy(&value, values + i, sizeof value);
      bad |= (value & kExponent) == kExponent ? 1 : 0;
    }
    return bad == 0;
  }

  // Finds the states of an image's live paths and lists the rows to score.
  void look_up(const Beam& beam, int64_t slot) {
    const size_t rows_before = rows_.size();
    bool any_missing = false;
    for (int j = 0; j < beam.live_count; ++j) {
      const LivePath& path = beam.live[j];
      PathStep& step = steps_[slot * N_ + j];
      if (!is_scored(rules_, path, beam.step)) {
        step.kind = PathStep::Kind::kOnlyEnds;
        continue;
      }
      step.node =
          beam.step == 0 ? PrefixTable::kRoot : prefixes_.find(path.parent, path.label, stamp_);
      if (step.node < 0) {
        step.kind = PathStep::Kind::kMissing;
        any_missing = true;
        continue;
      }
      step.kind = PathStep::Kind::kScored;
      rows_.push_back({prefixes_.projected_output(step.node), static_cast<int32_t>(slot),
                       static_cast<int32_t>(slot * N_ + j),
                       static_cast<int32_t>(first_allowed(rules_, path) / kernels_.lanes)});
      for (int64_t d = 0; d < D_; d += kCacheLineFloats) {
        __builtin_prefetch(rows_.back().projected + d);
      }
    }
    if (any_missing && needs_all_states(rules_)) rows_.resize(rows_before);  // it waits anyhow
  }

  // Equations 4 and 5 and the softmax's denominator for all rows. Rows that need their labels from
  // nearby on share tiles.
  void score_rows() {
    const int64_t rows = static_cast<int64_t>(rows_.size());
    order_rows();
    x_.resize(rows);
    y_.resize(rows);
    first_vector_.resize(rows);
    for (int64_t at = 0; at < rows; ++at) {
      const Row& row = rows_[order_[at]];
      float* total = joint_.data() + at * D_;
      const int64_t image = slot_states_[row.slot]->image;
      kernels_.activate_sum(head_.activation(), row.projected, images_.joint + image * D_, total,
                            D_);
      x_[at] = total;
      y_[at] = scores_.data() + at * stride_;
      first_vector_[at] = row.first_vector;
      path_scores_[row.path] = y_[at];
    }
    kernels_.product({rows, D_, head_.score_vectors(), x_.data(), head_.score_panels(),
                      head_.score_start(), y_.data(), first_vector_.data()});
    row_scores_.resize(rows);
    log_sum_exp_.resize(rows);
    for (int64_t at = 0; at < rows; ++at) {
      const Row& row = rows_[order_[at]];
      const Beam& beam = slot_states_[row.slot]->beam;
      const LivePath& path = beam.live[row.path - row.slot * N_];
      forbid(path, beam.step, y_[at]);
      const int64_t from = first_scored(path);
      row_scores_[at] = {y_[at] + from, nullptr, nullptr, stride_ - from};
      if (images_.label_logits == nullptr) continue;
      row_scores_[at].logits = logits_.data() + row.slot * stride_ + from;
      // What is forbidden lies in the first vector alone.
      if (end_allowed(rules_, beam.step) &&
          (rules_.options.order != Order::kUnique || beam.step == 0)) {
        row_scores_[at].later_most = later_most_.data() + row.slot * stride_ + from;
      }
    }
    kernels_.finish_scores(row_scores_.data(), rows, log_sum_exp_.data());
    for (int64_t at = 0; at < rows; ++at) {
      steps_[rows_[order_[at]].path].log_sum_exp = log_sum_exp_[at];
    }
  }

  // Sorts rows by their first vector: a counting sort.
  void order_rows() {
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

  Outcome finish_step(ImageState& s, int64_t slot) {
    Beam& beam = s.beam;
    PathStep* steps = steps_.data() + slot * N_;
    float* const* scores = path_scores_.data() + slot * N_;
    if (needs_all_states(rules_) && waits_for_states(beam, steps, beam.done)) {
      return Outcome::kWaits;
    }
    int scored = 0;
    for (int j = 0; j < beam.live_count; ++j) {
      PathStep& step = steps[j];
      const float path_score = beam.live[j].score;
      if (step.kind == PathStep::Kind::kOnlyEnds) step.end_score = path_score;
      if (step.kind != PathStep::Kind::kScored) continue;
      ++scored;
      if (std::isnan(step.log_sum_exp)) {
        step.kind = PathStep::Kind::kNotFinite;
        continue;
      }
      step.end_score = path_score + step_log_prob(scores[j][L_], step.log_sum_exp);
      scores[j][L_] = -kInf;  // what is left are labels
    }
    FinishedPaths done = beam.done;
    offer_ends(rules_, beam, steps, &done);
    if (!rules_.options.end_takes_slot && waits_for_states(beam, steps, done)) {
      return Outcome::kWaits;
    }
    Extensions best(static_cast<int>(N_));
    const float floor = selection_floor(rules_, beam, done);
    for (int j = 0; j < beam.live_count; ++j) {
      const PathStep& step = steps[j];
      if (step.kind != PathStep::Kind::kScored && step.kind != PathStep::Kind::kOnlyEnds) continue;
      if (step.kind == PathStep::Kind::kScored) {
        kernels_.select(scores[j], first_scored(beam.live[j]), stride_, beam.live[j].score,
                        step.log_sum_exp, floor, j, &best);
      }
      if (rules_.options.end_takes_slot) {
        best.offer(step.end_score, Extension{j, static_cast<int32_t>(L_)});
      }
    }
    offer_chosen_ends(rules_, beam, best, &done);
    if (rules_.options.end_takes_slot && waits_for_states(beam, steps, done)) {
      return Outcome::kWaits;
    }
    lookups += scored;
    if (is_nonfinite(rules_, beam, steps, done)) {
      mark_nonfinite(s);
      return Outcome::kEnded;
    }
    if (rules_.keep_all) add_marginals(s, steps, scores);
    int32_t* trace =
        output_.trace == nullptr
            ? nullptr
            : output_.trace + (s.image * (rules_.options.max_labels + 1) + beam.step) * N_ * 2;
    take_step(rules_, best, steps, done, &beam, trace);
    for (int j = 0; j < beam.live_count; ++j) {
      prefixes_.prefetch(beam.live[j].parent, beam.live[j].label);
    }
    if (beam.live_count > 0) return Outcome::kGoesOn;
    write_paths(s);
    return Outcome::kEnded;
  }

  // Asks for what is needed of the states that are missing; false when nothing is.
  bool waits_for_states(const Beam& beam, const PathStep* steps, const FinishedPaths& done) {
    FinishedPaths best_case(static_cast<int>(N_));
    const uint32_t needed = states_needed(rules_, beam, steps, done, patient_, &best_case);
    for (int j = 0; j < beam.live_count; ++j) {
      if ((needed >> j & 1) == 0) continue;
      missing.push_back(prefix_key(beam.live[j].parent, beam.live[j].label));
    }
    return needed != 0;
  }

  // Writes -inf where `scores` belong to what may not follow, in the vectors that are scored.
  void forbid(const LivePath& path, int64_t length, float* scores) const {
    if (rules_.options.order == Order::kIncreasing) {
      std::fill(scores + first_scored(path), scores + first_allowed(rules_, path), -kInf);
    } else if (rules_.options.order == Order::kUnique && length > 0) {
      forbid_held(path, scores);
    }
    if (!end_allowed(rules_, length)) scores[L_] = -kInf;
  }

  // Writes -inf where `scores` belong to labels that a path, not the empty one, holds.
  void forbid_held(const LivePath& path, float* scores) const {
    scores[path.label] = -kInf;
    for (int32_t at = path.parent; at != PrefixTable::kRoot; at = prefixes_.parent(at)) {
      scores[prefixes_.last_label(at)] = -kInf;
    }
  }

  // The first label of the first vector that holds an allowed one.
  int64_t first_scored(const LivePath& path) const {
    return first_allowed(rules_, path) / kernels_.lanes * kernels_.lanes;
  }

  // Nothing reads a step's scores after this, which leaves out labels that a path holds.
  void add_marginals(const ImageState& s, const PathStep* steps, float* const* scores) {
    float* sums = output_.marginals + s.image * L_;
    for (int j = 0; j < s.beam.live_count; ++j) {
      if (steps[j].kind != PathStep::Kind::kScored) continue;
      const LivePath& path = s.beam.live[j];
      if (rules_.options.order == Order::kFree && s.beam.step > 0) forbid_held(path, scores[j]);
      const int64_t from = first_scored(path);
      kernels_.add_probabilities(sums + from, scores[j] + from, L_ - from, path.score,
                                 steps[j].log_sum_exp);
    }
  }

  void write_paths(const ImageState& s) {
    const int64_t T = rules_.options.max_labels;
    const FinishedPaths& done = s.beam.done;
    for (int i = 0; i < done.size; ++i) {
      const FinishedPath& path = done.items[i];
      const int64_t row = s.image * N_ + i;
      output_.log_probs[row] = done.scores[i];
      output_.lengths[row] = path.length;
      int64_t* labels = output_.labels + row * T;
      if (path.length > 0) labels[path.length - 1] = path.label;
      int32_t node = path.parent;
      for (int64_t t = path.length - 2; t >= 0; --t, node = prefixes_.parent(node)) {
        labels[t] = prefixes_.last_label(node);
      }
    }
  }

  void mark_nonfinite(const ImageState& s) {
    std::fill_n(output_.log_probs + s.image * N_, N_, kNaN);
    if (rules_.keep_all) std::fill_n(output_.marginals + s.image * L_, L_, kNaN);
    ++nonfinite_images;
  }

  CpuHead& head_;
  const PrefixTable& prefixes_;
  const CpuKernels& kernels_;
  const BeamRules rules_;
  const ImageEmbeddings& images_;
  const SearchOutput& output_;
  const uint32_t stamp_;
  const int64_t L_, D_, N_;
  const int64_t stride_;             // floats per row of scores
  const bool patient_;               // ask only for states that are needed in any case
  AlignedFloats joint_;              // [rows, D]
  AlignedFloats scores_;             // [rows, stride]
  AlignedFloats logits_;             // [images, stride]
  AlignedFloats later_most_;         // [images, stride]
  std::vector<PathStep> steps_;      // [images, N]
  std::vector<float*> path_scores_;  // [images, N]; [stride] each, where a path is scored
  std::vector<Active> active_;
  std::vector<ImageState*> slot_states_;
  std::vector<Row> rows_;
  std::vector<int32_t> order_, begins_, first_vector_;
  std::vector<const float*> x_;
  std::vector<float*> y_;
  std::vector<RowScores> row_scores_;
  std::vector<float> log_sum_exp_;
};

int64_t images_per_block(const CpuHead& head, const SearchOptions& options) {
  const int64_t row_bytes =
      head.score_vectors() * head.kernels().lanes * static_cast<int64_t>(sizeof(float));
  const int64_t rows = std::min(kBlockRows, kBlockBytes / row_bytes);
  return std::max<int64_t>(1, rows / options.beam_size);
}

// Searches images begin..end, whose prefixes fit into the table together.
void search_slice(CpuHead* head, const SearchOptions& options, const ImageEmbeddings& images,
                  const SearchOutput& output, const ParallelFor& parallel_for, int64_t begin,
                  int64_t end, uint32_t stamp, SearchStats* stats) {
  std::vector<ImageState> states;
  states.reserve(end - begin);
  std::vector<ImageState*> pending;
  pending.reserve(end - begin);
  for (int64_t image = begin; image < end; ++image) {
    states.emplace_back(image, options.beam_size);
    pending.push_back(&states.back());
  }
  while (!pending.empty()) {
    const int64_t count = static_cast<int64_t>(pending.size());
    const int64_t block = std::min(images_per_block(*head, options), count);
    const bool patient = count >= kPatientImages;
    std::mutex merging;
    std::vector<ImageState*> waiting;
    std::vector<uint64_t> missing;
    parallel_for((count + block - 1) / block, [&](int64_t first, int64_t last) {
      BlockSearch search(head, options, images, output, stamp, block, patient);
      for (int64_t at = first * block; at < std::min(last * block, count); at += block) {
        search.run(pending.data() + at, std::min(block, count - at));
      }
      const std::lock_guard lock(merging);
      waiting.insert(waiting.end(), search.waiting.begin(), search.waiting.end());
      missing.insert(missing.end(), search.missing.begin(), search.missing.end());
      stats->prefix_lookups += search.lookups;
      stats->nonfinite_images += search.nonfinite_images;
    });
    std::sort(missing.begin(), missing.end());
    missing.erase(std::unique(missing.begin(), missing.end()), missing.end());
    head->make_states(missing, stamp, parallel_for);
    stats->prefix_hits -= static_cast<int64_t>(missing.size());
    pending = std::move(waiting);
  }
}

}  // namespace

SearchStats beam_search_cpu(CpuHead* head, const SearchOptions& options,
                            const ImageEmbeddings& images, const SearchOutput& output,
                            const ParallelFor& parallel_for) {
  const int64_t N = options.beam_size;
  const int64_t T = options.max_labels;
  const int64_t B = images.batch;
  std::fill_n(output.labels, B * N * T, int64_t{-1});
  std::fill_n(output.lengths, B * N, int64_t{0});
  std::fill_n(output.log_probs, B * N, -kInf);
  if (output.marginals != nullptr) std::fill_n(output.marginals, B * head->num_labels(), 0.0f);
  if (output.trace != nullptr) std::fill_n(output.trace, B * (T + 1) * N * 2, -1);

  PrefixTable& prefixes = head->prefixes();
  // Paths of length T need no state, nor does the root a new one.
  const int64_t nodes_per_image = N * std::max<int64_t>(T - 1, 0);
  const int64_t image_bytes = std::max<int64_t>(1, nodes_per_image * prefixes.node_bytes());
  const int64_t slice =
      std::clamp<int64_t>(prefixes.byte_budget() / 4 / image_bytes, 1, kSliceImages);
  SearchStats stats;
  for (int64_t begin = 0; begin < B; begin += slice) {
    const int64_t end = std::min(begin + slice, B);
    const PrefixTable::Stay stay(&prefixes, (end - begin) * nodes_per_image);
    search_slice(head, options, images, output, parallel_for, begin, end, stay.stamp(), &stats);
  }
  stats.prefix_hits += stats.prefix_lookups;
  stats.prefix_nodes = prefixes.size();
  stats.prefix_parents = prefixes.parents();
  stats.prefix_bytes = prefixes.bytes();
  return stats;
}

}  // namespace cnnrnn
