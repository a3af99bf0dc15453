// Scores the labels of live paths: equations 4 and 5 and the softmax's denominator, for all rows of
// a step at once.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/beam.h"
#include "kernels/cpu/aligned_floats.h"
#include "kernels/cpu/head.h"
#include "kernels/search.h"

namespace cnnrnn {

class RowScorer {
 public:
  // Room for the logits of `slots` images and for `rows` paths.
  RowScorer(CpuHead* head, const BeamRules& rules, const ImageEmbeddings& images, int64_t slots,
            int64_t rows);

  // Whether what is given of an image is finite.
  bool is_finite(int64_t image) const;

  // Brings an image's logits to its slot, before its paths are scored.
  void take_logits(int64_t slot, int64_t image);

  void clear() { rows_.clear(); }
  size_t size() const { return rows_.size(); }
  void drop_after(size_t rows) { rows_.resize(rows); }

  // Adds the path `path` of this length, whose state is that of `node`; `index` is the caller's.
  void add(int64_t image, int64_t slot, int64_t index, const LivePath& path, int64_t length,
           int32_t node) {
    rows_.push_back({prefixes_.projected_output(node), path, static_cast<int32_t>(image),
                     static_cast<int32_t>(slot), static_cast<int32_t>(index),
                     static_cast<int32_t>(length),
                     static_cast<int32_t>(first_allowed(rules_, path) / kernels_.lanes)});
    for (int64_t d = 0; d < D_; d += kCacheLineFloats) {
      __builtin_prefetch(rows_.back().projected + d);
    }
  }

  // Scores the rows. The path at `index` has its scores [stride] at scores[index], -inf for what
  // may not follow, and their log-sum-exp in steps[index], NaN where they are not finite. They
  // stand until the next call.
  void score(PathStep* steps, float** scores);

  // The first label of the first vector that holds an allowed one: earlier scores are undefined.
  int64_t first_scored(const LivePath& path) const {
    return first_allowed(rules_, path) / kernels_.lanes * kernels_.lanes;
  }

  // Writes -inf where `scores` belong to labels that a path, not the empty one, holds.
  void forbid_held(const LivePath& path, float* scores) const;

  int64_t stride() const { return stride_; }  // floats per row of scores

 private:
  static constexpr int64_t kCacheLineFloats = 16;

  struct Row {
    const float* projected;  // U_o o of the path [D]
    LivePath path;
    int32_t image;
    int32_t slot;
    int32_t index;
    int32_t length;
    int32_t first_vector;
  };

  void order_rows();
  void forbid(const LivePath& path, int64_t length, float* scores) const;

  CpuHead& head_;
  const PrefixTable& prefixes_;
  const CpuKernels& kernels_;
  const BeamRules rules_;
  const ImageEmbeddings& images_;
  const int64_t L_, D_, stride_;
  AlignedFloats joint_;       // [rows, D]
  AlignedFloats scores_;      // [rows, stride]
  AlignedFloats logits_;      // [slots, stride]
  AlignedFloats later_most_;  // [slots, stride]
  std::vector<Row> rows_;
  std::vector<int32_t> order_, begins_, first_vector_;
  std::vector<const float*> x_;
  std::vector<float*> y_;
  std::vector<RowScores> row_scores_;
  std::vector<float> log_sum_exp_;
};

}  // namespace cnnrnn
