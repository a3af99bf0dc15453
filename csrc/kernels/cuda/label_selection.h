// Softmax and the best labels of the 16 rows of a tile, while labels go by in chunks. Device code.
//
// Two views of a warp's lanes. As rows, a group of lanes holds the scores of some rows, as
// label_scores.h lays them out, and each lane keeps its own part of a row's softmax to the
// end. As paths, a lane owns one live path; it knows which row that is in and keeps its best
// labels. Of a chunk's labels only those pass from rows to paths that may be among what the path
// looks for. After the last chunk, which is the only one of up to 95 labels, that is what may be
// among its image's best: the softmax is known by then.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/label_scores.h"
#include "kernels/cuda/row_best.h"
#include "kernels/math.h"

namespace cnnrnn {

// Panels of a chunk, whose scores are in shared memory at once.
constexpr int kChunkPanels = 3;

// The scores of a tile's rows for the labels of a chunk, in shared memory, and of each row and
// panel the largest among a lane's own.
template <typename S>
class ChunkScores {
  static constexpr int kStride = kPanelLabels + 8;  // spreads what a warp puts over all banks
  static constexpr int kPanelFloats = kTileRows * kStride + S::kRows * kWarpLanes;

 public:
  static constexpr int64_t kBytes =
      kChunkPanels * kPanelFloats * static_cast<int64_t>(sizeof(float));

  __device__ __forceinline__ explicit ChunkScores(float* shared) : shared_(shared) {}

  // The scores of a row for the p-th panel of the chunk.
  __device__ __forceinline__ float* row(int p, int r) const {
    return shared_ + p * kPanelFloats + r * kStride;
  }

  __device__ __forceinline__ void put(int p, const typename S::Scores& z,
                                      const float (&largest)[S::kRows]) {
#pragma unroll
    for (int i = 0; i < S::kRows; ++i) {
      S::put_scores(row(p, lane_id() / S::kLanesPerRow + S::kGroups * i), z[i]);
      tops(p)[i * kWarpLanes] = largest[i];
    }
  }

  __device__ __forceinline__ void get(int p, typename S::Scores& z) const {
#pragma unroll
    for (int i = 0; i < S::kRows; ++i) {
      S::get_scores(row(p, lane_id() / S::kLanesPerRow + S::kGroups * i), z[i]);
    }
  }

  __device__ __forceinline__ float largest(int p, int i) const { return tops(p)[i * kWarpLanes]; }

  // Of all panels.
  __device__ __forceinline__ float largest_of(int panels, int i) const {
    float all = largest(0, i);
    for (int p = 1; p < panels; ++p) all = fmaxf(all, largest(p, i));
    return all;
  }

 private:
  __device__ __forceinline__ float* tops(int p) const {
    return shared_ + p * kPanelFloats + kTileRows * kStride + lane_id();
  }

  float* shared_;
};

// What is known of a row of a tile, in shared memory.
struct TileRow {
  int32_t owner;    // the lane of its path, or -1
  int32_t allowed;  // the first label that may follow
  float bound;      // what a label must exceed to be among the N best
  float headroom;   // how far it may stay below the largest score and matter
  float least;      // after the last chunk: what a label must reach
  float shift;      // what is taken off its label logits
};

// What a lane knows of the softmax of its rows: its own part.
template <typename S>
struct RowSums {
  float largest[S::kRows];  // score so far
  float base[S::kRows];     // its exponent
  float sum[S::kRows];      // of exp(score) / 2^base
};

// The base of a softmax: a whole power of two near its largest score, so that nothing is rounded in
// going from one base to another. Without a score it is far below those of all others. Rounded up
// before, so that however large a score is, it is not far above the base.
constexpr float kLog2E = 1.44269504f;
constexpr float kNoExponent = -3.40282347e38f;

__device__ __forceinline__ float exponent(float largest) {
  return fmaxf(rintf(__fmul_ru(kLog2E, largest)), kNoExponent);
}

// exp(score) / 2^exponent.
__device__ __forceinline__ float exp_above(float score, float exponent) {
  return exp2_approx(fmaf(score, kLog2E, -exponent));
}

// ln(2^exponent sum), in two parts since the first alone rounds.
__device__ __forceinline__ float log_of(float exponent, float sum) {
  constexpr float kHigh = 0.693145752f, kLow = 1.43786017e-6f;  // their sum is 1 / kLog2E
  return fmaf(exponent, kHigh, fmaf(exponent, kLow, __logf(sum)));
}

// The largest over a group of `kLanes` lanes.
template <int kLanes>
__device__ __forceinline__ float largest_of_group(float x) {
#pragma unroll
  for (int other = kLanes / 2; other > 0; other /= 2) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, other));
  }
  return x;
}

// From rows to paths: what `of_rows` is for the row that this lane's path is in.
template <typename S, typename T>
__device__ __forceinline__ T for_path(const T (&of_rows)[S::kRows], int row) {
  T mine{};
#pragma unroll
  for (int i = 0; i < S::kRows; ++i) {
    const T value = __shfl_sync(~0u, of_rows[i], row % S::kGroups * S::kLanesPerRow);
    if (row / S::kGroups == i) mine = value;
  }
  return mine;
}

// The least float that exceeds x; NaN, which nothing reaches, for infinity.
__device__ __forceinline__ float just_above(float x) {
  const int bits = __float_as_int(x + 0.0f);  // -0 becomes 0
  return __int_as_float(bits < 0 ? bits - 1 : bits + 1);
}

// What rounding may add to or take from scores of this size, and more.
__device__ __forceinline__ float rounding_of(float score) { return 0.01f + 1e-6f * fabsf(score); }

// A score that N labels of a chunk reach: the smallest of kSmallBeam lanes' largest.
template <typename S>
__device__ __forceinline__ float reached_by_few(float largest) {
#pragma unroll
  for (int other = S::kLanesPerRow / 2; other >= kSmallBeam; other /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, other));
  }
#pragma unroll
  for (int other = kSmallBeam / 2; other > 0; other /= 2) {
    largest = fminf(largest, __shfl_xor_sync(~0u, largest, other));
  }
  return largest;
}

// The largest score of each row among those of this lane.
template <typename S>
__device__ __forceinline__ void largest_of_lane(const typename S::Scores& z,
                                                float (&largest)[S::kRows]) {
#pragma unroll
  for (int i = 0; i < S::kRows; ++i) {
    largest[i] = z[i][0];
#pragma unroll
    for (int j = 1; j < S::kLabels; ++j) largest[i] = fmaxf(largest[i], z[i][j]);
  }
}

// Takes the scores of a panel into the sums; `largest` are each row's, among those of this lane.
// END's go to `end` [16] and are no label. `end_at` is its place in the panel, if it is there.
template <typename S>
__device__ __forceinline__ void add_panel(int end_at, typename S::Scores& z, float* end,
                                          RowSums<S>* sums, float (&largest)[S::kRows]) {
  const int lane = lane_id(), group = lane / S::kLanesPerRow;
  if (end_at >= 0 && end_at < kPanelLabels) {
#pragma unroll
    for (int j = 0; j < S::kLabels; ++j) {
      if (S::label(lane, j) != end_at) continue;
#pragma unroll
      for (int i = 0; i < S::kRows; ++i) {
        end[group + S::kGroups * i] = z[i][j];
        z[i][j] = -INFINITY;
      }
    }
  }
  largest_of_lane<S>(z, largest);
#pragma unroll
  for (int i = 0; i < S::kRows; ++i) {
    sums->largest[i] = fmaxf(sums->largest[i], largest[i]);
    const float base = exponent(sums->largest[i]);
    float sum = sums->sum[i] * exp2_approx(sums->base[i] - base);
    sums->base[i] = base;
#pragma unroll
    for (int j = 0; j < S::kLabels; ++j) sum += exp_above(z[i][j], base);
    sums->sum[i] = sum;
  }
}

// Offers the paths the labels of a chunk whose scores are at least their row's `least`. A lane's
// path is in row `row`; -1: in none.
template <typename S, int kCapacity>
__device__ __forceinline__ void pass_labels(int first_label, int panels,
                                            const ChunkScores<S>& chunk,
                                            const float (&least)[S::kRows], int row,
                                            RowBest<kCapacity>* best) {
  const int lane = lane_id();
  __syncwarp();  // the chunk has been put
  for (int p = 0; p < panels; ++p) {
    bool any = false;
#pragma unroll
    for (int i = 0; i < S::kRows; ++i) any = any || chunk.largest(p, i) >= least[i];
    if (!__any_sync(~0u, any)) continue;
    typename S::Scores z;
    chunk.get(p, z);
    uint32_t labels[S::kRows];  // bit l: label l of the panel passes
#pragma unroll
    for (int i = 0; i < S::kRows; ++i) {
      uint32_t bits = 0;
#pragma unroll
      for (int j = 0; j < S::kLabels; ++j) bits |= z[i][j] >= least[i] ? 1u << S::label(0, j) : 0u;
      bits <<= S::label(lane, 0);
#pragma unroll
      for (int other = S::kLanesPerRow / 2; other > 0; other /= 2) {
        bits |= __shfl_xor_sync(~0u, bits, other);
      }
      labels[i] = bits;
    }
    uint32_t mine = for_path<S>(labels, row < 0 ? 0 : row);
    if (row < 0) mine = 0;
    const float* const scores = chunk.row(p, row);
    for (; mine != 0; mine &= mine - 1) {
      const int at = __ffs(static_cast<int>(mine)) - 1;
      best->offer(scores[at], first_label + p * kPanelLabels + at);
    }
  }
  __syncwarp();  // the chunk has been read
}

// Takes the best labels of a chunk that others follow. A lane's path is in row `row`; -1: in none.
template <typename S, int kCapacity>
__device__ __forceinline__ void select_early(int first_label, int panels,
                                             const ChunkScores<S>& chunk, const RowSums<S>& sums,
                                             int row, TileRow* rows, RowBest<kCapacity>* best) {
  float least[S::kRows], of_chunk[S::kRows];
  bool any = false;
#pragma unroll
  for (int i = 0; i < S::kRows; ++i) {
    of_chunk[i] = chunk.largest_of(panels, i);
    least[i] = rows[lane_id() / S::kLanesPerRow + S::kGroups * i].bound;
    any = any || of_chunk[i] > least[i];
  }
  if (!__any_sync(~0u, any)) return;
#pragma unroll
  for (int i = 0; i < S::kRows; ++i) {
    const float headroom = rows[lane_id() / S::kLanesPerRow + S::kGroups * i].headroom;
    const float largest = largest_of_group<S::kLanesPerRow>(sums.largest[i]);
    const float bound = least[i];
    least[i] = fmaxf(just_above(bound), largest - headroom - rounding_of(largest));
    if constexpr (kCapacity == kSmallBeam) {
      const float reached = reached_by_few<S>(of_chunk[i]);
      if (reached > bound) least[i] = fmaxf(least[i], reached);
    }
  }
  pass_labels<S>(first_label, panels, chunk, least, row, best);
  if (row >= 0) rows[row].bound = fmaxf(rows[row].bound, best->bound());
  __syncwarp();
}

// Takes the best labels of the last chunk. `score` is that of the lane's path, in row `row`, and
// `floor` what a continuation must exceed; `reached`, what N continuations of the image reach as
// far as is known, is made as large as that of any of its paths, which stand in `paths` lanes side
// by side.
template <typename S, int kCapacity>
__device__ __forceinline__ void select_last(int first_label, int panels,
                                            const ChunkScores<S>& chunk, int row, int paths,
                                            float score, float log_sum_exp, float floor,
                                            TileRow* rows, float* reached,
                                            RowBest<kCapacity>* best) {
  float of_labels = row < 0 ? -INFINITY : best->bound();
  float least = just_above(of_labels);
  if constexpr (kCapacity == kSmallBeam) {
    float of_chunk[S::kRows];
#pragma unroll
    for (int i = 0; i < S::kRows; ++i) of_chunk[i] = reached_by_few<S>(chunk.largest_of(panels, i));
    const float mine = for_path<S>(of_chunk, row < 0 ? 0 : row);
    if (mine > of_labels) least = of_labels = mine;
  }
  if (row >= 0) *reached = fmaxf(*reached, score + (of_labels - log_sum_exp));
  for (int other = paths / 2; other > 0; other /= 2) {
    *reached = fmaxf(*reached, __shfl_xor_sync(~0u, *reached, other));
  }
  const float limit =
      fmaxf(*reached, floor) - score + log_sum_exp - rounding_of(score) - rounding_of(log_sum_exp);
  if (row >= 0) rows[row].least = fmaxf(least, limit);
  __syncwarp();
  float of_rows[S::kRows];
#pragma unroll
  for (int i = 0; i < S::kRows; ++i) {
    of_rows[i] = rows[lane_id() / S::kLanesPerRow + S::kGroups * i].least;
  }
  pass_labels<S>(first_label, panels, chunk, of_rows, row, best);
}

// The softmax's denominator of the row that this lane's path is in; `end` is END's score, or -inf.
template <typename S>
__device__ __forceinline__ float log_sum_exp_of_path(const RowSums<S>& sums, int row, float end) {
  float largest[S::kRows], sum[S::kRows];
#pragma unroll
  for (int i = 0; i < S::kRows; ++i) {
    largest[i] = largest_of_group<S::kLanesPerRow>(sums.largest[i]);
    sum[i] = sums.sum[i] * exp2_approx(sums.base[i] - exponent(largest[i]));
#pragma unroll
    for (int other = S::kLanesPerRow / 2; other > 0; other /= 2) {
      sum[i] += __shfl_xor_sync(~0u, sum[i], other);
    }
  }
  const float of_labels = for_path<S>(largest, row), labels_sum = for_path<S>(sum, row);
  const float most = fmaxf(of_labels, end), base = exponent(most);
  if (most == -INFINITY) return -INFINITY;
  const float total = labels_sum * exp2_approx(exponent(of_labels) - base) + exp_above(end, base);
  // Half a step of floats this large is more than the logarithm of any number of labels.
  constexpr float kAllTheSame = 0x1p28f;
  return fabsf(most) >= kAllTheSame && total >= 0.0f ? most : log_of(base, total);
}

}  // namespace cnnrnn
