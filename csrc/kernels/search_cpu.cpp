// Beam search on the CPU: one image after the other, one thread.
//
// A live path is a node of the prefix table, so its recurrent state is made once however many
// images reach it. What is arithmetic is behind CpuKernels, compiled per instruction set; here is
// what decides.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu_kernels.h"
#include "prefix_table.h"
#include "search.h"
#include "topn.h"

namespace cnnrnn {
namespace {

constexpr float kNegInf = -std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
// In marginal mode the search goes on until less probability than this is unfinished.
constexpr float kLiveMassFloor = 1e-3f;

struct Extension {
  int32_t parent_rank;
  int32_t label;
};

struct Path {
  float score;
  int32_t node;
};

using FinishedPaths = TopN<int32_t, kMaxBeamSize>;
using Extensions = TopN<Extension, kMaxBeamSize>;

class ImageSearch {
 public:
  ImageSearch(const HeadTables& head, const CpuKernels& kernels, const SearchOptions& options,
              PrefixTable* prefixes, SearchStats* stats)
      : head_(head),
        kernels_(kernels),
        options_(options),
        prefixes_(*prefixes),
        stats_(stats),
        joint_(head.joint_dim),
        scores_(head.num_labels + 1),
        shifted_logits_(head.num_labels + 1) {}

  // Searches one image; returns false when a value that is not finite turns up.
  // `marginals` [L] and `trace` [T+1, N, 2] may be null.
  bool run(const float* image_joint, const float* label_logits, float* marginals, int32_t* trace,
           FinishedPaths* done) {
    const int64_t L = head_.num_labels;
    if (!all_finite(image_joint, head_.joint_dim)) return false;
    if (label_logits != nullptr && !all_finite(label_logits, L + 1)) return false;

    std::vector<Path> live{{0.0f, PrefixTable::kRoot}};
    bool accepting = true;  // false once a literal stop has fixed the result
    for (int64_t step = 0; !live.empty(); ++step) {
      Extensions best(options_.beam_size);
      // A search without marginals has already dropped paths at or below this score.
      const float floor = dropped_at(accepting, *done);
      for (int32_t rank = 0; rank < static_cast<int32_t>(live.size()); ++rank) {
        const Path& path = live[rank];
        if (prefixes_.length(path.node) == options_.max_labels) {
          offer_end(path, path.score, rank, accepting, &best, done);
          continue;
        }
        if (!score_extensions(path, image_joint, label_logits)) {
          if (path.score <= floor) continue;  // it is here for its marginals alone
          return false;
        }
        if (marginals != nullptr) {
          kernels_.add_exponentials(marginals, scores_.data(), L);
        }
        for (int64_t l = first_allowed(path.node) - 1;;) {
          const float bound = best.full() ? best.worst() : kNegInf;
          l = kernels_.find_above(scores_.data(), l + 1, L, bound);
          if (l == L) break;
          best.offer(scores_[l], Extension{rank, static_cast<int32_t>(l)});
        }
        offer_end(path, scores_[L], rank, accepting, &best, done);
      }
      take_extensions(best, &live, accepting, done);
      accepting = accepting && !literal_stop(live, *done);
      prune(marginals != nullptr, accepting, *done, &live);
      if (trace != nullptr) write_trace(live, trace + step * options_.beam_size * 2);
    }
    return true;
  }

 private:
  static bool all_finite(const float* values, int64_t n) {
    return std::all_of(values, values + n, [](float v) { return std::isfinite(v); });
  }

  // Fills scores_ with path.score + log p(label | path), -inf where a label is forbidden.
  bool score_extensions(const Path& path, const float* image_joint, const float* label_logits) {
    const int64_t L = head_.num_labels;
    const int64_t D = head_.joint_dim;
    const float* projected = prefixes_.projected_output(path.node, head_, kernels_, stats_);
    kernels_.activate_sum(head_.activation, projected, image_joint, joint_.data(), D);
    const int64_t first = first_allowed(path.node);
    float* scores = scores_.data();
    std::fill(scores, scores + first, kNegInf);
    const float* start = head_.score_bias == nullptr ? nullptr : head_.score_bias + first;
    kernels_.affine(joint_.data(), D, head_.score_weight + first, L + 1, start, scores + first,
                    L + 1 - first);  // eq. 5
    if (label_logits != nullptr) {
      // Label logits reach hundreds and only their differences matter: taking off the largest
      // allowed one first keeps the sum precise where probability is.
      float* shifted = shifted_logits_.data();
      std::copy(label_logits + first, label_logits + L + 1, shifted + first);
      forbid(path.node, shifted);
      const float largest = kernels_.largest(shifted + first, L + 1 - first);
      for (int64_t l = first; l <= L; ++l) scores[l] += shifted[l] - largest;
    }
    forbid(path.node, scores);
    if (!anything_may_follow(path.node)) {
      scores[L] = path.score;
      return true;
    }
    return kernels_.log_softmax(scores + first, L + 1 - first, path.score);
  }

  // Writes -inf where `scores` [L+1] belong to what may not follow, from first_allowed() on.
  void forbid(int32_t node, float* scores) const {
    if (options_.order == Order::kUnique) {
      for (int32_t at = node; at != PrefixTable::kRoot; at = prefixes_.parent(at)) {
        scores[prefixes_.last_label(at)] = kNegInf;
      }
    }
    if (!end_allowed(node)) scores[head_.num_labels] = kNegInf;
  }

  bool end_allowed(int32_t node) const { return prefixes_.length(node) >= options_.min_labels; }

  bool anything_may_follow(int32_t node) const {
    if (end_allowed(node) || options_.order == Order::kFree) return true;
    return options_.order == Order::kUnique ? prefixes_.length(node) < head_.num_labels
                                            : first_allowed(node) < head_.num_labels;
  }

  int64_t first_allowed(int32_t node) const {
    return options_.order == Order::kIncreasing ? prefixes_.last_label(node) + 1 : 0;
  }

  void offer_end(const Path& path, float score, int32_t rank, bool accepting, Extensions* best,
                 FinishedPaths* done) {
    if (options_.end_takes_slot) {
      best->offer(score, Extension{rank, static_cast<int32_t>(head_.num_labels)});
    } else if (accepting) {
      done->offer(score, path.node);
    }
  }

  void take_extensions(const Extensions& best, std::vector<Path>* live, bool accepting,
                       FinishedPaths* done) {
    parents_ = *live;
    live->clear();
    extensions_.clear();
    for (int i = 0; i < best.size; ++i) {
      const Extension& extension = best.items[i];
      const int32_t node = parents_[extension.parent_rank].node;
      if (extension.label == head_.num_labels) {
        if (accepting) done->offer(best.scores[i], node);
      } else {
        live->push_back({best.scores[i], prefixes_.child(node, extension.label)});
        extensions_.push_back(extension);
      }
    }
  }

  // The paper's rule: every intermediate path is less probable than all candidates.
  bool literal_stop(const std::vector<Path>& live, const FinishedPaths& done) const {
    return options_.stop == Stop::kLiteral && !live.empty() && done.size > 0 &&
           live.front().score < done.worst();
  }

  void prune(bool marginals, bool accepting, const FinishedPaths& done,
             std::vector<Path>* live) const {
    if (marginals) {
      float mass = 0.0f;
      for (const Path& path : *live) mass += expf(path.score);
      const bool settled = !live->empty() && live->front().score <= dropped_at(accepting, done);
      if (mass < kLiveMassFloor && settled) live->clear();
    } else {
      const float floor = dropped_at(accepting, done);
      while (!live->empty() && live->back().score <= floor) live->pop_back();
    }
  }

  // Live paths at or below this score can no longer change the returned paths.
  float dropped_at(bool accepting, const FinishedPaths& done) const {
    if (!accepting) return -kNegInf;
    return options_.stop == Stop::kNBest && done.full() ? done.worst() : kNegInf;
  }

  void write_trace(const std::vector<Path>& live, int32_t* trace) const {
    for (size_t j = 0; j < live.size(); ++j) {
      trace[2 * j] = extensions_[j].parent_rank;
      trace[2 * j + 1] = extensions_[j].label;
    }
  }

  const HeadTables& head_;
  const CpuKernels& kernels_;
  const SearchOptions& options_;
  PrefixTable& prefixes_;
  SearchStats* stats_;
  std::vector<float> joint_;           // [D]
  std::vector<float> scores_;          // [L+1]
  std::vector<float> shifted_logits_;  // [L+1]
  std::vector<Path> parents_;          // the live paths that the last step extended
  std::vector<Extension> extensions_;
};

void write_paths(const FinishedPaths& done, const PrefixTable& prefixes, int64_t T, int64_t* labels,
                 int64_t* lengths, float* log_probs) {
  for (int i = 0; i < done.size; ++i) {
    int32_t node = done.items[i];
    log_probs[i] = done.scores[i];
    lengths[i] = prefixes.length(node);
    for (int64_t t = lengths[i] - 1; t >= 0; --t, node = prefixes.parent(node)) {
      labels[i * T + t] = prefixes.last_label(node);
    }
  }
}

}  // namespace

SearchStats beam_search_cpu(const CpuKernels& kernels, const HeadTables& head,
                            const SearchOptions& options, const ImageEmbeddings& images,
                            PrefixTable* prefixes, const SearchOutput& output) {
  const int64_t N = options.beam_size;
  const int64_t T = options.max_labels;
  const int64_t L = head.num_labels;
  const int64_t B = images.batch;
  std::fill(output.labels, output.labels + B * N * T, int64_t{-1});
  std::fill(output.lengths, output.lengths + B * N, int64_t{0});
  std::fill(output.log_probs, output.log_probs + B * N, kNegInf);
  if (output.marginals != nullptr) std::fill(output.marginals, output.marginals + B * L, 0.0f);
  if (output.trace != nullptr) std::fill(output.trace, output.trace + B * (T + 1) * N * 2, -1);

  SearchStats stats;
  ImageSearch search(head, kernels, options, prefixes, &stats);
  for (int64_t b = 0; b < B; ++b) {
    if (prefixes->over_budget()) prefixes->clear();
    const float* logits =
        images.label_logits == nullptr ? nullptr : images.label_logits + b * (L + 1);
    float* marginals = output.marginals == nullptr ? nullptr : output.marginals + b * L;
    int32_t* trace = output.trace == nullptr ? nullptr : output.trace + b * (T + 1) * N * 2;
    FinishedPaths done(options.beam_size);
    if (search.run(images.joint + b * head.joint_dim, logits, marginals, trace, &done)) {
      write_paths(done, *prefixes, T, output.labels + b * N * T, output.lengths + b * N,
                  output.log_probs + b * N);
    } else {
      std::fill(output.log_probs + b * N, output.log_probs + (b + 1) * N, kNaN);
      if (marginals != nullptr) std::fill(marginals, marginals + L, kNaN);
    }
  }
  stats.prefix_nodes = prefixes->size();
  stats.prefix_bytes = prefixes->bytes();
  return stats;
}

}  // namespace cnnrnn
