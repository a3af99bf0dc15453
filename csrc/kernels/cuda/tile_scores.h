// How a warp scores the labels of a tile, up to 16 of its paths: gathers h(U_o o + e), completes
// the panels that label_scores.h multiplies, ends their softmax, and adds marginals.
// Device code.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/device_head.h"
#include "kernels/cuda/label_scores.h"
#include "kernels/cuda/label_selection.h"
#include "kernels/cuda/warp_state.h"
#include "kernels/math.h"

namespace cnnrnn {

constexpr int kResidentJoint = 64;  // D of the kernels that keep all of U_l in shared memory

__device__ __forceinline__ float4 activate(Activation activation, float4 x) {
  return make_float4(activate(activation, x.x), activate(activation, x.y),
                     activate(activation, x.z), activate(activation, x.w));
}

// h(U_o o + e) of a tile's rows.
template <typename S, int kCapacity, bool kResident>
__device__ __forceinline__ void gather_joint(const DeviceHead& head, const ImageEmbeddings& images,
                                             const WarpMemory<S, kCapacity>& memory,
                                             WarpShape shape, int32_t node_of_path, int rows) {
  constexpr int kLanes = 8, kTogether = kWarpLanes / kLanes;  // lanes of a row, rows at a time
  const int stride = kResident ? kResidentJoint : head.joint_stride;
  const int D = kResident ? kResidentJoint : head.joint_dim;
  for (int r0 = 0; r0 < rows; r0 += kTogether) {
    const int r = r0 + lane_id() / kLanes, owner = memory.rows[r].owner;
    const int32_t node = __shfl_sync(~0u, node_of_path, owner < 0 ? 0 : owner);
    if (owner < 0) continue;
    const int32_t image = memory.images[shape.image_of(owner)].image;
    const float* const o = head.projected + static_cast<int64_t>(node) * stride;
    const float* const e = images.joint + static_cast<int64_t>(image) * D;
    typename S::Element* const row = memory.joint + r * (stride + S::kPadding);
#pragma unroll 2
    for (int quad = lane_id() % kLanes; quad < stride / 4; quad += kLanes) {
      const int d = 4 * quad;
      float4 x = *reinterpret_cast<const float4*>(o + d);
      if constexpr (kResident) {
        const float4 y = *reinterpret_cast<const float4*>(e + d);
        x = make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w);
      } else {  // rows of e may begin anywhere, and end before the stride does
        x = make_float4(x.x + (d < D ? e[d] : 0.0f), x.y + (d + 1 < D ? e[d + 1] : 0.0f),
                        x.z + (d + 2 < D ? e[d + 2] : 0.0f), x.w + (d + 3 < D ? e[d + 3] : 0.0f));
      }
      // The branch once rather than for each element.
      x = head.activation == Activation::kRelu ? activate(Activation::kRelu, x)
                                               : activate(head.activation, x);
      S::put_row(row, quad, x);
    }
  }
  __syncwarp();
}

// Of a tile: the first label that may follow any of its paths, and all of them.
struct AllowedLabels {
  int32_t by_one, by_all;
};

// Begins the tile of the first-th scored path and those after it.
template <typename S, int kCapacity, bool kResident>
__device__ __forceinline__ AllowedLabels begin_tile(const DeviceHead& head, const SearchPass& pass,
                                                    const WarpMemory<S, kCapacity>& memory,
                                                    WarpShape shape, const OwnedPath& path,
                                                    int first, int count, RowSums<S>* sums) {
  const int lane = lane_id(), rows = min(count - first, kTileRows), row = path.row_of_tile(first);
  uint32_t first_label = ~0u;
  __syncwarp();  // the last tile has been read
  if (row >= 0) {
    const ImageState<kCapacity>& image = memory.images[shape.image_of(lane)];
    const LivePath& live = image.beam.live[shape.path_of(lane)];
    first_label = static_cast<uint32_t>(first_allowed(pass.rules, live));
    // A label's log-probability is at most its distance from the largest score.
    const float headroom = live.score - image.floor + rounding_of(live.score);
    memory.rows[row] = {lane, static_cast<int32_t>(first_label), -INFINITY, headroom, 0.0f, 0.0f};
  }
  if (lane >= rows && lane < kTileRows) {
    memory.rows[lane] = {-1, 0, INFINITY, -INFINITY, INFINITY, 0.0f};
  }
  __syncwarp();
  gather_joint<S, kCapacity, kResident>(head, pass.images, memory, shape, path.node, rows);
#pragma unroll
  for (int i = 0; i < S::kRows; ++i) {
    sums->largest[i] = -INFINITY;
    sums->base[i] = kNoExponent;
    sums->sum[i] = 0.0f;
  }
  return {static_cast<int32_t>(__reduce_min_sync(~0u, first_label)),
          static_cast<int32_t>(__reduce_max_sync(~0u, row < 0 ? 0 : first_label))};
}

// The labels of a panel that may not follow a row's path, END aside: bit l for the panel's label l.
// `owner` is the lane of the path, or -1; `counting`: see leaves_out_held.
template <typename S, int kCapacity>
__device__ __forceinline__ uint32_t forbidden_labels(const DeviceHead& head, const BeamRules& rules,
                                                     const WarpMemory<S, kCapacity>& memory,
                                                     WarpShape shape, int owner,
                                                     int32_t first_label, int32_t allowed,
                                                     bool counting) {
  const int32_t before = allowed - first_label;
  uint32_t labels = before <= 0 ? 0 : before >= kPanelLabels ? ~0u : (1u << before) - 1;
  if (!leaves_out_held(rules, counting) || owner < 0) return labels;
  const Beam<kCapacity>& beam = memory.images[shape.image_of(owner)].beam;
  if (beam.step == 0) return labels;
  int32_t on_path = beam.live[shape.path_of(owner)].label;
  for (int32_t node = beam.live[shape.path_of(owner)].parent;; node = head.node_parent[node]) {
    const auto at = static_cast<uint32_t>(on_path - first_label);
    if (at < kPanelLabels) labels |= 1u << at;
    if (node == kRootNode) return labels;
    on_path = head.node_label[node];
  }
}

// Of the rows whose first allowed label is in this panel, sets what is taken off their label logits
// before they are rounded with the scores: the largest one that is allowed and in this panel, since
// only differences matter and a chain term's logits run to hundreds together.
template <typename S, int kCapacity>
__device__ void find_shifts(const DeviceHead& head, const float* label_logits,
                            const WarpMemory<S, kCapacity>& memory, WarpShape shape, int panel) {
  const int lane = lane_id();
  const int32_t L = head.num_labels, first_label = panel * kPanelLabels;
  __syncwarp();  // the last panel's have been read
#pragma unroll
  for (int i = 0; i < S::kRows; ++i) {
    TileRow& row = memory.rows[lane / S::kLanesPerRow + S::kGroups * i];
    const bool begins = row.owner >= 0 && row.allowed / kPanelLabels == panel;
    float largest = -INFINITY;
    if (begins) {
      const int64_t image = memory.images[shape.image_of(row.owner)].image;
#pragma unroll
      for (int j = 0; j < S::kLabels; ++j) {
        const int32_t label = first_label + S::label(lane, j);
        if (label >= row.allowed && label <= L) {
          largest = fmaxf(largest, label_logits[image * (L + 1) + label]);
        }
      }
    }
    largest = largest_of_group<S::kLanesPerRow>(largest);
    if (begins && lane % S::kLanesPerRow == 0) row.shift = largest;
  }
  __syncwarp();
}

// Adds label logits to a panel's scores and forbids labels that may not follow; `counting`: see
// leaves_out_held. A label logit that is not finite leaves its row without a finite denominator.
template <typename S, int kCapacity>
__device__ __forceinline__ void complete_scores(const DeviceHead& head, const SearchPass& pass,
                                                const WarpMemory<S, kCapacity>& memory,
                                                WarpShape shape, AllowedLabels allowed,
                                                bool counting, int panel, typename S::Scores& z,
                                                RowSums<S>* sums) {
  const int lane = lane_id();
  const int32_t L = head.num_labels, first_label = panel * kPanelLabels;
  if (pass.images.label_logits != nullptr && allowed.by_one < first_label + kPanelLabels &&
      allowed.by_all >= first_label) {
    find_shifts(head, pass.images.label_logits, memory, shape, panel);
  }
#pragma unroll
  for (int i = 0; i < S::kRows; ++i) {
    const TileRow& row = memory.rows[lane / S::kLanesPerRow + S::kGroups * i];
    const int owner = row.owner;
    if (pass.images.label_logits != nullptr && owner >= 0) {
      const int64_t image = memory.images[shape.image_of(owner)].image;
      const float* logits = pass.images.label_logits + image * (L + 1);
      const float shift = row.shift;
#pragma unroll
      for (int j = 0; j < S::kLabels; ++j) {
        const int32_t label = first_label + S::label(lane, j);
        if (label > L) continue;
        const float logit = logits[label];
        sums->sum[i] = fmaf(logit, 0.0f, sums->sum[i]);
        z[i][j] += logit - shift;
      }
    }
    const uint32_t forbidden = forbidden_labels(head, pass.rules, memory, shape, owner, first_label,
                                                row.allowed, counting);
    if (forbidden == 0) continue;
    const uint32_t of_lane = forbidden >> S::label(lane, 0);
#pragma unroll
    for (int j = 0; j < S::kLabels; ++j) {
      if ((of_lane >> S::label(0, j) & 1) != 0) z[i][j] = -INFINITY;
    }
  }
}

// Ends the softmax of the rows of a tile: the lanes that own their paths know its denominator then,
// and their images END's score. A lane's path is in row `row`; -1: in none.
template <typename S, int kCapacity>
__device__ __forceinline__ void finish_softmax(const BeamRules& rules,
                                               const WarpMemory<S, kCapacity>& memory,
                                               WarpShape shape, const RowSums<S>& sums, int row,
                                               OwnedPath* path) {
  const int lane = lane_id(), in_tile = row < 0 ? 0 : row;
  ImageState<kCapacity>& image = memory.images[shape.has(lane) ? shape.image_of(lane) : 0];
  __syncwarp();  // END's scores have been written
  const float end = end_allowed(rules, image.beam.step) ? memory.end[in_tile] : -INFINITY;
  const float log_sum_exp = log_sum_exp_of_path(sums, in_tile, end);
  if (row < 0) return;
  PathStep& step = image.steps[shape.path_of(lane)];
  if (log_sum_exp > -INFINITY) {
    path->is_scored = true;
    path->log_sum_exp = step.log_sum_exp = log_sum_exp;
    step.end_score = image.beam.live[shape.path_of(lane)].score + step_log_prob(end, log_sum_exp);
  } else {  // NaN, or every score is -inf
    step.kind = PathStep::Kind::kNotFinite;
  }
}

// Marginals: the probabilities of a panel's labels, added path by path. One lane owns a label.
template <typename S, int kCapacity>
__device__ void add_marginals(const DeviceHead& head, const SearchOutput& output,
                              const WarpMemory<S, kCapacity>& memory, WarpShape shape, int rows,
                              int panel, const typename S::Scores& z, ChunkScores<S>* chunk) {
  const int lane = lane_id(), group = lane / S::kLanesPerRow;
#pragma unroll
  for (int i = 0; i < S::kRows; ++i) {
    const int r = group + S::kGroups * i, owner = memory.rows[r].owner;
    if (owner < 0) continue;
    const ImageState<kCapacity>& image = memory.images[shape.image_of(owner)];
    const PathStep& step = image.steps[shape.path_of(owner)];
    const float score = image.beam.live[shape.path_of(owner)].score;
    const bool is_scored = step.kind == PathStep::Kind::kScored;
#pragma unroll
    for (int j = 0; j < S::kLabels; ++j) {
      chunk->row(0, r)[S::label(lane, j)] =
          is_scored ? expf(score + step_log_prob(z[i][j], step.log_sum_exp)) : 0.0f;
    }
  }
  __syncwarp();
  const int32_t label = panel * kPanelLabels + lane;
  for (int r = 0; r < rows && label < head.num_labels;) {
    const int m = shape.image_of(memory.rows[r].owner);
    const ImageState<kCapacity>& image = memory.images[m];
    float* const sum =
        output.marginals + static_cast<int64_t>(image.image) * head.num_labels + label;
    float total = image.beam.step == 0 ? 0.0f : *sum;
    for (; r < rows && shape.image_of(memory.rows[r].owner) == m; ++r) {
      total += chunk->row(0, r)[lane];
    }
    if (image.active) *sum = total;
  }
  __syncwarp();
}

}  // namespace cnnrnn
