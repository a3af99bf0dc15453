// Beam search on the device: one launch takes every image through all its steps.
//
// A warp owns a tile of 16 rows. A row is a live path; the rows of an image stand side by side, as
// many as the beam size up to a power of two, so that whatever an image decides stays within a warp
// and no block-wide barrier is needed. In each step
// - lane r < 16 looks up the prefix of row r in the table, and the warp gathers h(U_o o + e) of all
//   16 rows;
// - labels go by in panels of 32, which label_scores_cuda.h multiplies, exactly in fp32 or fast in
//   fp16. Softmax's denominator is kept online, the N best labels of a row in a list that takes
//   only what exceeds its worst: scores of labels are never written to memory;
// - the N x N continuations of an image are ranked by counting, all lanes at once, and lane m of
//   the warp decides with beam.h for the m-th image what ends, lives on or is dropped;
// - an image that needs states that are not there enters their prefixes into the table and is
//   parked: its beam goes to memory, and another launch takes it up when they have been made.
//
// Two kinds of kernels: with all of U_l in shared memory (D = 64), each warp at its own pace; or
// any D and L, panels streamed through shared memory and the warps of a block in step.
//
// By count, not measured: a row costs 64 x 96 multiply-adds at L = 81, D = 64. B = 4,096 images of
// 4 rows and 4 steps are 0.40 G, 12 us at an H200's 33.5 T/s of fp32, unless the loads that feed
// them from shared memory take longer. The table is read once a row and step: 16 bytes of a slot
// and 256 of U_o o.

#include <algorithm>
#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>

#include "beam.h"
#include "device_head.h"
#include "label_scores_cuda.h"
#include "launch.h"
#include "math.h"
#include "prefix_slots.h"
#include "search_cuda.h"

namespace cnnrnn {

extern __shared__ __align__(16) unsigned char dynamic_shared[];

namespace {

constexpr int kLeastWarps = 4, kMostWarps = 8;  // of a block
constexpr int kBlocksEach = 2;                  // of a multiprocessor
constexpr int64_t kMostStaged = 4;              // panels streamed at once
constexpr int kSmallBeam = 4;       // beams up to it have kernels that keep less per image
constexpr int kResidentJoint = 64;  // D of the kernels that keep all of U_l in shared memory
constexpr int kThreads = 256;       // of the kernel that packs

// An image on its way through a step. In shared memory.
template <int kCapacity>
struct alignas(16) ImageState {
  Beam<kCapacity> beam;
  FinishedPaths<kCapacity> done;  // with the ends of this step
  FinishedPaths<kCapacity> scratch;
  Extensions<kCapacity> best;  // the continuations that live on
  PathStep steps[kCapacity];
  float floor;      // what a continuation must exceed
  uint32_t needed;  // bit j: the state of live path j is missing and needed
  int32_t image;
  bool active;
  bool finite;  // its embedding
};

// A warp's part of shared memory.
template <typename S, int kCapacity>
struct Tile {
  ImageState<kCapacity>* images;     // [images]
  typename S::Element* joint;        // [16, D + padding]: h(U_o o + e)
  TopN<int32_t, kCapacity>* labels;  // [16]: each row's best labels by score
  float* log_sum_exp;                // [16]
  float* end;                        // [16]: END's score
  float* headroom;                   // [16]: how far a label may stay below the best and matter
  float* probabilities;              // [16, kPanelLabels], where marginals are wanted
};

// Images of a tile, and rows of an image.
struct TileShape {
  int images, rows;
};

CNNRNN_INLINE TileShape tile_shape(int beam_size) {
  int rows = 1;
  while (rows < beam_size) rows *= 2;
  return {kTileRows / rows, rows};
}

template <typename S>
CNNRNN_INLINE int64_t joint_bytes(int stride) {
  return static_cast<int64_t>(sizeof(typename S::Element)) * kTileRows * (stride + S::kPadding);
}

template <typename S, int kCapacity>
CNNRNN_INLINE int64_t tile_bytes(int images, int stride, bool marginals) {
  const int64_t floats = kTileRows * (3 + (marginals ? kPanelLabels : 0));
  const int64_t bytes = images * static_cast<int64_t>(sizeof(ImageState<kCapacity>)) +
                        joint_bytes<S>(stride) +
                        kTileRows * static_cast<int64_t>(sizeof(TopN<int32_t, kCapacity>)) +
                        floats * static_cast<int64_t>(sizeof(float));
  return (bytes + 15) / 16 * 16;
}

template <typename S, int kCapacity>
__device__ Tile<S, kCapacity> tile_at(unsigned char* shared, int images, int stride) {
  static_assert(sizeof(ImageState<kCapacity>) % 16 == 0);  // rows are read 16 bytes at a time
  Tile<S, kCapacity> tile;
  tile.images = reinterpret_cast<ImageState<kCapacity>*>(shared);
  shared += images * sizeof(ImageState<kCapacity>);
  tile.joint = reinterpret_cast<typename S::Element*>(shared);
  shared += joint_bytes<S>(stride);
  tile.labels = reinterpret_cast<TopN<int32_t, kCapacity>*>(shared);
  tile.log_sum_exp = reinterpret_cast<float*>(tile.labels + kTileRows);
  tile.end = tile.log_sum_exp + kTileRows;
  tile.headroom = tile.end + kTileRows;
  tile.probabilities = tile.headroom + kTileRows;
  return tile;
}

// --- The table ---------------------------------------------------------------------------------

// Asks for the state of a prefix. Whoever asks first enters it, and its parent for its gates.
__device__ void request_state(const DeviceHead& head, int32_t parent, int32_t label) {
  CallCounts* const call = &head.counts->call;
  PrefixCounts* const counts = &head.counts->prefix;
  uint64_t slot;
  const Entry entry =
      enter_prefix(head.slots, head.slot_mask, slot_key(counts->generation, parent, label), &slot);
  if (entry == Entry::kThere) return;
  const int32_t node = entry == Entry::kNew ? atomicAdd(&counts->nodes, 1) : head.node_capacity;
  if (node >= head.node_capacity) {
    atomicAdd(&call->full, 1);
    return;
  }
  atomicAdd(&call->made, 1ULL);
  head.node_parent[node] = parent;
  head.node_label[node] = label;
  head.node_slot[node] = static_cast<int64_t>(slot);
  head.node_gates[node] = kNoGates;
  constexpr int32_t kTaken = -2;
  if (atomicCAS(&head.node_gates[parent], kNoGates, kTaken) != kNoGates) return;
  const int32_t row = atomicAdd(&counts->parents, 1);
  if (row >= head.parent_capacity) {
    atomicAdd(&call->full, 1);
    return;
  }
  head.gates_parent[row] = parent;
  head.node_gates[parent] = row;
}

// Finds the prefixes of an image's live paths; `row` is one of theirs. Returns the node whose state
// the row is scored with, or kNoNode.
template <int kCapacity>
__device__ int32_t look_up(const DeviceHead& head, const BeamRules& rules,
                           ImageState<kCapacity>* image, int j) {
  if (!image->active || j >= image->beam.live_count) return kNoNode;
  const LivePath path = image->beam.live[j];
  const int64_t length = image->beam.step;
  PathStep& step = image->steps[j];
  step.node = kNoNode;
  if (!is_scored(rules, path, length)) {
    step.kind = PathStep::Kind::kOnlyEnds;
    return kNoNode;
  }
  step.node = length == 0
                  ? kRootNode
                  : find_node(head.slots, head.slot_mask,
                              slot_key(head.counts->prefix.generation, path.parent, path.label));
  step.kind = step.node == kNoNode ? PathStep::Kind::kMissing : PathStep::Kind::kScored;
  return step.node;
}

// --- Label scores ------------------------------------------------------------------------------

// h(U_o o + e) of the tile's rows; zeros where a row is not scored. `node` is that of lane r's row.
template <typename S, int kCapacity, bool kResident>
__device__ __forceinline__ void gather_joint(const DeviceHead& head, const ImageEmbeddings& images,
                                             const Tile<S, kCapacity>& tile, int rows,
                                             int32_t node) {
  const int lane = lane_id();
  const int stride = kResident ? kResidentJoint : head.joint_stride;
  const int D = kResident ? kResidentJoint : head.joint_dim;
  // Half a warp takes a row.
#pragma unroll 4
  for (int r = lane / 16; r < kTileRows; r += 2) {
    const int32_t from = __shfl_sync(~0u, node, r);
    const int64_t image = from == kNoNode ? 0 : tile.images[r / rows].image;
    const float* const o = head.projected + static_cast<int64_t>(from) * stride;
    const float* const e = images.joint + image * D;
    for (int quad = lane % 16; quad < stride / 4; quad += 16) {
      float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (from != kNoNode) {
        const int d = 4 * quad;
        x = *reinterpret_cast<const float4*>(o + d);
        if constexpr (kResident) {
          const float4 y = *reinterpret_cast<const float4*>(e + d);
          x = make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w);
        } else {  // rows of e may begin anywhere, and end before the stride does
          x = make_float4(x.x + (d < D ? e[d] : 0.0f), x.y + (d + 1 < D ? e[d + 1] : 0.0f),
                          x.z + (d + 2 < D ? e[d + 2] : 0.0f), x.w + (d + 3 < D ? e[d + 3] : 0.0f));
        }
        x = make_float4(activate(head.activation, x.x), activate(head.activation, x.y),
                        activate(head.activation, x.z), activate(head.activation, x.w));
      }
      S::put_row(tile.joint + r * (stride + S::kPadding), quad, x);
    }
  }
  __syncwarp();
}

// The live path of a lane's i-th row, or null where that row is not scored.
template <typename S, int kCapacity>
__device__ __forceinline__ const LivePath* scored_path(const Tile<S, kCapacity>& tile, int rows,
                                                       int r) {
  const ImageState<kCapacity>& image = tile.images[r / rows];
  const int j = r % rows;
  const bool scored =
      image.active && j < image.beam.live_count && image.steps[j].kind == PathStep::Kind::kScored;
  return scored ? &image.beam.live[j] : nullptr;
}

// Adds the biases and label logits and forbids what may not follow. Sets bit i of `nonfinite` where
// the logits of a lane's row i are not finite.
template <typename S, int kCapacity>
__device__ __forceinline__ void complete_scores(const DeviceHead& head, const BeamRules& rules,
                                                const ImageEmbeddings& images,
                                                const Tile<S, kCapacity>& tile, int rows, int panel,
                                                const float* bias, typename S::Scores& z,
                                                uint32_t* nonfinite) {
  const int lane = lane_id(), group = lane / S::kLanesPerRow;
  const int32_t L = head.num_labels, first_label = panel * kPanelLabels;
#pragma unroll
  for (int j = 0; j < S::kLabels; ++j) {
#pragma unroll
    for (int i = 0; i < S::kRows; ++i) z[i][j] += bias[S::label(lane, j)];
  }
#pragma unroll
  for (int i = 0; i < S::kRows; ++i) {
    const int r = group + S::kGroups * i;
    const LivePath* const path = scored_path(tile, rows, r);
    if (path == nullptr) continue;
    const ImageState<kCapacity>& image = tile.images[r / rows];
    if (images.label_logits != nullptr) {
      const float* logits = images.label_logits + static_cast<int64_t>(image.image) * (L + 1);
#pragma unroll
      for (int j = 0; j < S::kLabels; ++j) {
        const int32_t label = first_label + S::label(lane, j);
        if (label > L) continue;
        const float logit = logits[label];
        if (!isfinite(logit)) *nonfinite |= 1u << i;
        z[i][j] += logit;
      }
    }
    const int64_t length = image.beam.step;
    // The first label that is allowed, counted from the panel's first, and END where it is not.
    const int allowed = static_cast<int>(first_allowed(rules, *path)) - first_label;
    const int end = end_allowed(rules, length) ? kPanelLabels : L - first_label;
    if (allowed > 0 || end < kPanelLabels) {
#pragma unroll
      for (int j = 0; j < S::kLabels; ++j) {
        const int label = S::label(lane, j);
        if (label < allowed || label == end) z[i][j] = -INFINITY;
      }
    }
    if (rules.options.order == Order::kUnique && length > 0) {
      int32_t on_path = path->label;
      for (int32_t node = path->parent;; node = head.node_parent[node]) {
#pragma unroll
        for (int j = 0; j < S::kLabels; ++j) {
          if (first_label + S::label(lane, j) == on_path) z[i][j] = -INFINITY;
        }
        if (node == kRootNode) break;
        on_path = head.node_label[node];
      }
    }
  }
}

// What a lane knows of its rows while panels go by: the same in all lanes of a group, but `sum`,
// which is the lane's own part.
template <typename S>
struct RowSums {
  float largest[S::kRows];   // score so far
  float sum[S::kRows];       // of exp(score - largest)
  float bound[S::kRows];     // what a label must exceed to be among the best
  float headroom[S::kRows];  // how far it may stay below the largest and matter
};

struct Candidate {
  float score;
  int32_t label;
};

// The best of a lane's labels in one row, then of its group's: at equal score the lower label.
template <typename S>
__device__ __forceinline__ Candidate best_of_row(const float (&z)[S::kLabels], int first_label) {
  const int lane = lane_id();
  Candidate best{-INFINITY, INT32_MAX};
#pragma unroll
  for (int j = 0; j < S::kLabels; ++j) {
    if (z[j] > best.score) best = {z[j], first_label + S::label(lane, j)};
  }
#pragma unroll
  for (int other = S::kLanesPerRow / 2; other > 0; other /= 2) {
    const float score = __shfl_xor_sync(~0u, best.score, other);
    const int32_t label = __shfl_xor_sync(~0u, best.label, other);
    if (score > best.score || (score == best.score && label < best.label)) best = {score, label};
  }
  return best;
}

// Takes a panel's scores into the sums and the best labels. END's go to tile.end and are no label.
template <typename S, int kCapacity>
__device__ __forceinline__ void take_panel(const DeviceHead& head, const Tile<S, kCapacity>& tile,
                                           int beam_size, int panel, typename S::Scores& z,
                                           RowSums<S>* sums) {
  const int lane = lane_id(), group = lane / S::kLanesPerRow;
  const int32_t first_label = panel * kPanelLabels, end = head.num_labels - first_label;
  const int owned = lane % S::kLanesPerRow;  // the row of the group whose list is this lane's
#pragma unroll
  for (int i = 0; i < S::kRows; ++i) {
    float largest = z[i][0];
#pragma unroll
    for (int j = 1; j < S::kLabels; ++j) largest = fmaxf(largest, z[i][j]);
#pragma unroll
    for (int other = S::kLanesPerRow / 2; other > 0; other /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, other));
    }
    largest = fmaxf(largest, sums->largest[i]);
    const float base = largest == -INFINITY ? 0.0f : largest;
    float sum = sums->sum[i] * __expf(sums->largest[i] - base);
#pragma unroll
    for (int j = 0; j < S::kLabels; ++j) sum += __expf(z[i][j] - base);
    sums->largest[i] = largest;
    sums->sum[i] = sum;
    sums->bound[i] = fmaxf(sums->bound[i], largest - sums->headroom[i]);
  }
  if (end < kPanelLabels) {
#pragma unroll
    for (int i = 0; i < S::kRows; ++i) {
#pragma unroll
      for (int j = 0; j < S::kLabels; ++j) {
        if (S::label(lane, j) != end) continue;
        tile.end[group + S::kGroups * i] = z[i][j];
        z[i][j] = -INFINITY;
      }
    }
  }
  for (int taken = 0; taken < beam_size; ++taken) {
    bool any = false;
#pragma unroll
    for (int i = 0; i < S::kRows; ++i) {
#pragma unroll
      for (int j = 0; j < S::kLabels; ++j) any = any || z[i][j] > sums->bound[i];
    }
    if (!__any_sync(~0u, any)) break;
    Candidate mine{-INFINITY, INT32_MAX};
#pragma unroll
    for (int i = 0; i < S::kRows; ++i) {
      const Candidate best = best_of_row<S>(z[i], first_label);
      if (owned == i) mine = best;
#pragma unroll
      for (int j = 0; j < S::kLabels; ++j) {
        if (first_label + S::label(lane, j) == best.label) z[i][j] = -INFINITY;
      }
    }
    float bound = -INFINITY;
    if (owned < S::kRows) {
      TopN<int32_t, kCapacity>& list = tile.labels[group + S::kGroups * owned];
      list.offer(mine.score, mine.label);
      bound = list.bound();
    }
#pragma unroll
    for (int i = 0; i < S::kRows; ++i) {
      const float of_list = __shfl_sync(~0u, bound, group * S::kLanesPerRow + i);
      sums->bound[i] = fmaxf(sums->bound[i], of_list);
    }
  }
}

// The softmax's denominators, and whether the label logits that the root's step saw were finite.
template <typename S, int kCapacity>
__device__ __forceinline__ void finish_sums(const Tile<S, kCapacity>& tile, TileShape shape,
                                            const RowSums<S>& sums, uint32_t nonfinite) {
  const int lane = lane_id(), group = lane / S::kLanesPerRow, owned = lane % S::kLanesPerRow;
#pragma unroll
  for (int i = 0; i < S::kRows; ++i) {
    float sum = sums.sum[i];
#pragma unroll
    for (int other = S::kLanesPerRow / 2; other > 0; other /= 2) {
      sum += __shfl_xor_sync(~0u, sum, other);
    }
    // Outside the condition: within it, the compiler takes i for the lane and indexes memory by it.
    const float log_sum_exp = sums.largest[i] + __logf(sum);
    if (owned == i) tile.log_sum_exp[group + S::kGroups * i] = log_sum_exp;
  }
#pragma unroll
  for (int other = S::kLanesPerRow / 2; other > 0; other /= 2) {
    nonfinite |= __shfl_xor_sync(~0u, nonfinite, other);
  }
  const int r = group + S::kGroups * owned;
  if (owned < S::kRows && (nonfinite >> owned & 1) != 0 && r % shape.rows == 0) {
    ImageState<kCapacity>& image = tile.images[r / shape.rows];
    if (image.beam.step == 0) image.finite = false;
  }
  __syncwarp();
}

// Marginals: the probabilities of a panel's labels, added path by path. One lane owns a label.
template <typename S, int kCapacity>
__device__ void add_marginals(const DeviceHead& head, const SearchOutput& output,
                              const Tile<S, kCapacity>& tile, TileShape shape, int panel,
                              const typename S::Scores& z) {
  const int lane = lane_id(), group = lane / S::kLanesPerRow;
#pragma unroll
  for (int i = 0; i < S::kRows; ++i) {
    const int r = group + S::kGroups * i;
    const LivePath* const path = scored_path(tile, shape.rows, r);
    const float log_sum_exp =
        path == nullptr ? 0.0f : tile.images[r / shape.rows].steps[r % shape.rows].log_sum_exp;
#pragma unroll
    for (int j = 0; j < S::kLabels; ++j) {
      tile.probabilities[r * kPanelLabels + S::label(lane, j)] =
          path == nullptr ? 0.0f : expf(path->score + step_log_prob(z[i][j], log_sum_exp));
    }
  }
  __syncwarp();
  const int32_t label = panel * kPanelLabels + lane;
  for (int m = 0; m < shape.images && label < head.num_labels; ++m) {
    const ImageState<kCapacity>& image = tile.images[m];
    if (!image.active) continue;
    float* const sum =
        output.marginals + static_cast<int64_t>(image.image) * head.num_labels + label;
    float total = image.beam.step == 0 ? 0.0f : *sum;
    for (int j = 0; j < image.beam.live_count; ++j) {
      total += tile.probabilities[(m * shape.rows + j) * kPanelLabels + lane];
    }
    *sum = total;
  }
  __syncwarp();
}

// --- Decisions, by lane m for the m-th image of a tile -----------------------------------------

// The ends of this step, and what is needed of the states that are missing.
template <typename S, int kCapacity>
__device__ void offer_step_ends(const BeamRules& rules, const Tile<S, kCapacity>& tile,
                                int first_row, ImageState<kCapacity>* image) {
  const Beam<kCapacity>& beam = image->beam;
  image->needed = 0;
  image->done = beam.done;
  if (needs_all_states(rules)) {
    image->needed = states_needed(rules, beam, image->steps, beam.done, false, &image->scratch);
  }
  for (int j = 0; j < beam.live_count; ++j) {
    PathStep& step = image->steps[j];
    if (step.kind == PathStep::Kind::kOnlyEnds) step.end_score = beam.live[j].score;
    if (step.kind != PathStep::Kind::kScored) continue;
    step.log_sum_exp = tile.log_sum_exp[first_row + j];
    if (!(step.log_sum_exp > -INFINITY)) {  // NaN, or every score is -inf
      step.kind = PathStep::Kind::kNotFinite;
      continue;
    }
    step.end_score = beam.live[j].score + step_log_prob(tile.end[first_row + j], step.log_sum_exp);
  }
  offer_ends(rules, beam, image->steps, &image->done);
  if (!rules.options.end_takes_slot && image->needed == 0) {
    image->needed = states_needed(rules, beam, image->steps, image->done, false, &image->scratch);
  }
  image->floor = selection_floor(rules, beam, image->done);
  image->best.size = 0;
}

// A continuation of an image: its label, or END where that takes a slot.
template <typename S, int kCapacity>
__device__ __forceinline__ bool continuation(const BeamRules& rules, const Tile<S, kCapacity>& tile,
                                             const ImageState<kCapacity>& image, int first_row,
                                             int j, int at, Candidate* found) {
  const PathStep& step = image.steps[j];
  const bool scored = step.kind == PathStep::Kind::kScored;
  const TopN<int32_t, kCapacity>& labels = tile.labels[first_row + j];
  if (scored && at < labels.size) {
    *found = {labels.scores[at], labels.items[at]};
    return found->score > image.floor;
  }
  if (!rules.options.end_takes_slot || at != (scored ? labels.size : 0)) return false;
  if (!scored && step.kind != PathStep::Kind::kOnlyEnds) return false;
  *found = {step.end_score, static_cast<int32_t>(rules.num_labels)};
  return found->score > -INFINITY;
}

// Ranks an image's continuations by counting those that come before each, all lanes at once: at
// equal score the lower path and label. The N first make up `best`.
template <typename S, int kCapacity>
__device__ void choose_continuations(const BeamRules& rules, const Tile<S, kCapacity>& tile,
                                     TileShape shape) {
  const int per_path = rules.options.beam_size + 1;  // its best labels and END
  const int per_image = shape.rows * per_path;
  // From a label's score in its row to that of the path which it continues.
  for (int c = lane_id(); c < shape.images * per_image; c += kWarpLanes) {
    const int r = c / per_path, j = r % shape.rows, at = c % per_path;
    const ImageState<kCapacity>& image = tile.images[r / shape.rows];
    TopN<int32_t, kCapacity>& labels = tile.labels[r];
    if (!image.active || j >= image.beam.live_count || at >= labels.size) continue;
    if (image.steps[j].kind != PathStep::Kind::kScored) continue;
    labels.scores[at] =
        image.beam.live[j].score + step_log_prob(labels.scores[at], image.steps[j].log_sum_exp);
  }
  __syncwarp();
  for (int c = lane_id(); c < shape.images * per_image; c += kWarpLanes) {
    const int m = c / per_image, j = c % per_image / per_path;
    ImageState<kCapacity>& image = tile.images[m];
    if (!image.active || image.needed != 0 || j >= image.beam.live_count) continue;
    const int first_row = m * shape.rows;
    Candidate mine;
    if (!continuation(rules, tile, image, first_row, j, c % per_path, &mine)) continue;
    int rank = 0;
    for (int i = 0; i < image.beam.live_count && rank < rules.options.beam_size; ++i) {
      for (int at = 0; at < per_path; ++at) {
        Candidate other;
        if (!continuation(rules, tile, image, first_row, i, at, &other)) continue;
        const bool first =
            other.score > mine.score ||
            (other.score == mine.score && (i < j || (i == j && other.label < mine.label)));
        rank += first ? 1 : 0;
      }
    }
    if (rank >= rules.options.beam_size) continue;
    image.best.scores[rank] = mine.score;
    image.best.items[rank] = {j, mine.label};
    atomicMax(&image.best.size, rank + 1);
  }
  __syncwarp();
}

// kLost: it would be parked, and no pass follows.
enum class Outcome { kNone, kTakesStep, kEnds, kParks, kLost, kNotFinite };

template <int kCapacity>
__device__ Outcome decide(const BeamRules& rules, ImageState<kCapacity>* image) {
  if (!image->finite) return Outcome::kNotFinite;
  if (image->needed != 0) return Outcome::kParks;
  const Beam<kCapacity>& beam = image->beam;
  offer_chosen_ends(rules, beam, image->best, &image->done);
  if (rules.options.end_takes_slot) {
    image->needed = states_needed(rules, beam, image->steps, image->done, false, &image->scratch);
    if (image->needed != 0) return Outcome::kParks;
  }
  if (is_nonfinite(rules, beam, image->steps, image->done)) return Outcome::kNotFinite;
  return Outcome::kTakesStep;
}

// Writes path i of an image that has ended, or the mark of one that has no result.
template <int kCapacity>
__device__ void write_path(const DeviceHead& head, const BeamRules& rules,
                           const SearchOutput& output, const ImageState<kCapacity>& image, int i,
                           Outcome outcome) {
  const int64_t T = rules.options.max_labels;
  const int64_t row = static_cast<int64_t>(image.image) * rules.options.beam_size + i;
  const FinishedPaths<kCapacity>& done = image.beam.done;
  const bool ended = outcome == Outcome::kEnds;
  const bool there = ended && i < done.size;
  const int32_t length = there ? done.items[i].length : 0;
  output.log_probs[row] = !ended ? NAN : there ? done.scores[i] : -INFINITY;
  output.lengths[row] = outcome == Outcome::kLost ? -1 : length;
  int64_t* const labels = output.labels + row * T;
  for (int64_t t = length; t < T; ++t) labels[t] = -1;
  if (length == 0) return;
  labels[length - 1] = done.items[i].label;
  int32_t node = done.items[i].parent;
  for (int64_t t = length - 2; t >= 0; --t, node = head.node_parent[node]) {
    labels[t] = head.node_label[node];
  }
}

// --- A tile's way through the search -----------------------------------------------------------

// Whether a warp's lanes all find n values finite.
__device__ bool all_finite(const float* values, int64_t n) {
  bool finite = true;
  for (int64_t i = lane_id(); i < n; i += kWarpLanes) finite = finite && isfinite(values[i]);
  return __all_sync(~0u, finite);
}

// Sets up the images of a tile, which begins at the first-th of the pass.
template <typename S, int kCapacity>
__device__ void begin_tile(const DeviceHead& head, const SearchPass& pass,
                           const Tile<S, kCapacity>& tile, TileShape shape, int first, int count) {
  const int beam_size = pass.rules.options.beam_size;
  __syncwarp();  // the last tile's images have been read
  for (int m = 0; m < shape.images; ++m) {
    ImageState<kCapacity>& image = tile.images[m];
    const bool there = first + m < count;
    const int64_t index = !there                       ? 0
                          : pass.image_list != nullptr ? pass.image_list[first + m]
                                                       : pass.first_image + first + m;
    bool finite = true;
    if (there && !pass.resumes) {
      finite = all_finite(pass.images.joint + index * head.joint_dim, head.joint_dim);
      // Otherwise the root's step sees them all.
      if (pass.images.label_logits != nullptr && pass.rules.options.max_labels == 0) {
        const int64_t scores = head.num_labels + 1;
        finite = all_finite(pass.images.label_logits + index * scores, scores) && finite;
      }
    }
    if (lane_id() != 0) continue;
    image.image = static_cast<int32_t>(index);
    image.active = there;
    image.finite = finite;
    image.needed = 0;
    image.done.limit = image.scratch.limit = image.best.limit = beam_size;
    if (!there) continue;
    if (pass.resumes) {
      image.beam = static_cast<const Beam<kCapacity>*>(pass.parked_beams)[index];
    } else {
      new (&image.beam) Beam<kCapacity>(beam_size);  // in place: a copy would go through memory
    }
  }
  __syncwarp();
}

// Looks up the states of a tile's paths and gathers what is scored. Returns the first panel that
// any row needs.
template <typename S, int kCapacity, bool kResident>
__device__ int begin_step(const DeviceHead& head, const SearchPass& pass,
                          const Tile<S, kCapacity>& tile, TileShape shape, RowSums<S>* sums) {
  const int lane = lane_id(), group = lane / S::kLanesPerRow;
  int32_t node = kNoNode;
  uint32_t first_panel = head.panels;
  if (lane < kTileRows) {
    ImageState<kCapacity>* const image = &tile.images[lane / shape.rows];
    const int j = lane % shape.rows;
    node = look_up(head, pass.rules, image, j);
    tile.headroom[lane] = -INFINITY;  // nothing of a row matters that is not scored
    if (node != kNoNode) {
      const LivePath& path = image->beam.live[j];
      first_panel = static_cast<uint32_t>(first_allowed(pass.rules, path) / kPanelLabels);
      // A label's log-probability is at most its distance from the largest score.
      constexpr float kRounding = 0.01f;
      tile.headroom[lane] =
          path.score - selection_floor(pass.rules, image->beam, image->beam.done) + kRounding;
    }
    tile.labels[lane].size = 0;
    tile.labels[lane].limit = pass.rules.options.beam_size;
    tile.end[lane] = -INFINITY;
  }
  gather_joint<S, kCapacity, kResident>(head, pass.images, tile, shape.rows, node);
#pragma unroll
  for (int i = 0; i < S::kRows; ++i) {
    sums->largest[i] = sums->bound[i] = -INFINITY;
    sums->sum[i] = 0.0f;
    sums->headroom[i] = tile.headroom[group + S::kGroups * i];
  }
  return static_cast<int>(__reduce_min_sync(~0u, first_panel));
}

// Ends a step: what the outcome of lane m's image asks for.
template <typename S, int kCapacity>
__device__ void end_step(const DeviceHead& head, const SearchPass& pass,
                         const Tile<S, kCapacity>& tile, TileShape shape, Outcome outcome) {
  const int lane = lane_id();
  const BeamRules& rules = pass.rules;
  const int64_t N = rules.options.beam_size, T = rules.options.max_labels;
  if (outcome == Outcome::kTakesStep) {
    ImageState<kCapacity>& image = tile.images[lane];
    Beam<kCapacity>& beam = image.beam;
    int32_t* const trace = pass.output.trace == nullptr
                               ? nullptr
                               : pass.output.trace + (image.image * (T + 1) + beam.step) * N * 2;
    take_step(rules, image.best, image.steps, image.done, &beam, trace);
    if (beam.live_count == 0) outcome = Outcome::kEnds;
  }
  if (outcome == Outcome::kParks && pass.marks_parked) outcome = Outcome::kLost;
  if (outcome == Outcome::kParks) {
    const ImageState<kCapacity>& image = tile.images[lane];
    static_cast<Beam<kCapacity>*>(pass.parked_beams)[image.image] = image.beam;
    pass.parked[atomicAdd(pass.parked_count, 1)] = image.image;
  }
  if (outcome == Outcome::kNotFinite) atomicAdd(&head.counts->call.nonfinite_images, 1);
  __syncwarp();
  // Lane r serves row r of the tile.
  const int row_image = lane % kTileRows / shape.rows, j = lane % shape.rows;
  const auto of_row = static_cast<Outcome>(__shfl_sync(~0u, static_cast<int>(outcome), row_image));
  if (lane < kTileRows && j < N) {
    const ImageState<kCapacity>& image = tile.images[row_image];
    if (of_row == Outcome::kParks) {
      if ((image.needed >> j & 1) != 0) {
        request_state(head, image.beam.live[j].parent, image.beam.live[j].label);
      }
    } else if (of_row != Outcome::kNone && of_row != Outcome::kTakesStep) {
      write_path(head, rules, pass.output, image, j, of_row);
    }
  }
  if (pass.output.marginals != nullptr) {
    for (int m = 0; m < shape.images; ++m) {
      const auto of_image = static_cast<Outcome>(__shfl_sync(~0u, static_cast<int>(outcome), m));
      if (of_image != Outcome::kNotFinite && of_image != Outcome::kLost) continue;
      float* const sums =
          pass.output.marginals + static_cast<int64_t>(tile.images[m].image) * head.num_labels;
      for (int l = lane; l < head.num_labels; l += kWarpLanes) sums[l] = NAN;
    }
  }
  __syncwarp();
  if (outcome != Outcome::kNone && outcome != Outcome::kTakesStep) tile.images[lane].active = false;
  __syncwarp();
}

template <typename S>
__device__ const unsigned char* panels_of(const DeviceHead& head);
template <>
__device__ const unsigned char* panels_of<ExactScores>(const DeviceHead& head) {
  return head.exact_panels;
}
template <>
__device__ const unsigned char* panels_of<FastScores>(const DeviceHead& head) {
  return head.fast_panels;
}

__device__ void copy_panels(unsigned char* to, const unsigned char* from, int bytes) {
  for (int i = static_cast<int>(threadIdx.x); i < bytes / 16; i += static_cast<int>(blockDim.x)) {
    reinterpret_cast<float4*>(to)[i] = reinterpret_cast<const float4*>(from)[i];
  }
}

// Shows a warp the panels from `first` on. Streamed ones are brought by the whole block, whose
// warps all call this.
template <typename S, bool kResident, typename Take>
__device__ __forceinline__ void for_each_panel(const DeviceHead& head, unsigned char* panels,
                                               int staged, int first, Take take) {
  const int bytes =
      static_cast<int>(panel_bytes<S>(kResident ? kResidentJoint : head.joint_stride));
  if constexpr (kResident) {
    for (int panel = first; panel < head.panels; ++panel) take(panel, panels + panel * bytes);
  } else {
    for (int stage = 0; stage < head.panels; stage += staged) {
      const int end = min(stage + staged, head.panels);
      __syncthreads();  // the last stage has been read
      copy_panels(panels, panels_of<S>(head) + static_cast<int64_t>(stage) * bytes,
                  (end - stage) * bytes);
      __syncthreads();
      for (int panel = max(stage, first); panel < end; ++panel) {
        take(panel, panels + (panel - stage) * bytes);
      }
    }
  }
}

// `staged`: panels in shared memory at once; all of them where kResident.
template <typename S, int kCapacity, bool kResident>
__global__ void __launch_bounds__(kMostWarps* kWarpLanes, kBlocksEach)
    search_tiles(DeviceHead head, SearchPass pass, int staged) {
  constexpr int kJoint = kResident ? kResidentJoint : 0;
  using Rows = typename S::template Rows<kJoint>;
  const BeamRules& rules = pass.rules;
  const int lane = lane_id(), warp = static_cast<int>(threadIdx.x) / kWarpLanes;
  const int warps = static_cast<int>(blockDim.x) / kWarpLanes;
  const int stride = kResident ? kResidentJoint : head.joint_stride;
  const bool marginals = pass.output.marginals != nullptr;
  const TileShape shape = tile_shape(rules.options.beam_size);
  const int count = pass.image_count == nullptr ? pass.count : *pass.image_count;
  const int tiles = (count + shape.images - 1) / shape.images;
  if (static_cast<int>(blockIdx.x) * warps >= tiles) return;  // as most of a pass that resumes few
  unsigned char* const panels = dynamic_shared;
  const Tile<S, kCapacity> tile =
      tile_at<S, kCapacity>(dynamic_shared + staged * panel_bytes<S>(stride) +
                                warp * tile_bytes<S, kCapacity>(shape.images, stride, marginals),
                            shape.images, stride);
  if constexpr (kResident) {
    copy_panels(panels, panels_of<S>(head), staged * static_cast<int>(panel_bytes<S>(stride)));
    __syncthreads();
  }
  unsigned lookups = 0;
  for (int block = static_cast<int>(blockIdx.x) * warps; block < tiles;
       block += static_cast<int>(gridDim.x) * warps) {
    begin_tile(head, pass, tile, shape, (block + warp) * shape.images, count);
    while (true) {
      const bool mine = lane < shape.images && tile.images[lane].active;
      const bool active = __any_sync(~0u, mine);
      if (kResident ? !active : __syncthreads_or(active) == 0) break;
      RowSums<S> sums;
      uint32_t nonfinite = 0;
      typename S::Scores z;
      const int first_panel =
          active ? begin_step<S, kCapacity, kResident>(head, pass, tile, shape, &sums)
                 : head.panels;
      const Rows joint(tile.joint, stride);
      const auto score_panel = [&](int panel, const unsigned char* weights) {
        S::template multiply<kJoint>(joint, weights, stride, z);
        complete_scores<S>(head, rules, pass.images, tile, shape.rows, panel,
                           reinterpret_cast<const float*>(weights + S::bias_at(stride)), z,
                           &nonfinite);
      };
      for_each_panel<S, kResident>(
          head, panels, staged, first_panel, [&](int panel, const unsigned char* weights) {
            score_panel(panel, weights);
            take_panel<S>(head, tile, rules.options.beam_size, panel, z, &sums);
          });
      Outcome outcome = Outcome::kNone;
      if (active) {
        finish_sums<S>(tile, shape, sums, nonfinite);
        if (mine) offer_step_ends(rules, tile, lane * shape.rows, &tile.images[lane]);
        __syncwarp();
        choose_continuations(rules, tile, shape);
        if (mine) {
          ImageState<kCapacity>& image = tile.images[lane];
          outcome = decide(rules, &image);
          if (outcome != Outcome::kTakesStep) image.active = false;
          for (int j = 0; j < image.beam.live_count && image.active; ++j) {
            if (image.steps[j].kind == PathStep::Kind::kScored) ++lookups;
          }
        }
        __syncwarp();
      }
      if (marginals) {
        for_each_panel<S, kResident>(head, panels, staged, first_panel,
                                     [&](int panel, const unsigned char* weights) {
                                       score_panel(panel, weights);
                                       add_marginals<S>(head, pass.output, tile, shape, panel, z);
                                     });
      }
      if (active) end_step(head, pass, tile, shape, outcome);
    }
  }
#pragma unroll
  for (int other = kWarpLanes / 2; other > 0; other /= 2) {
    lookups += __shfl_xor_sync(~0u, lookups, other);
  }
  if (lane == 0 && lookups > 0) {
    atomicAdd(&head.counts->call.lookups, lookups);
  }
}

// A thread owns one weight of the label embedding.
template <typename S>
__global__ void __launch_bounds__(kThreads)
    pack_scores(HeadWeights weights, DeviceHead head, unsigned char* panels) {
  const int64_t stride = head.joint_stride, D = head.joint_dim, L = head.num_labels;
  const int64_t total = static_cast<int64_t>(head.panels) * kPanelLabels * stride;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total;
       i += step) {
    const int64_t label = i / stride, d = i % stride;
    const int at = static_cast<int>(label % kPanelLabels);
    unsigned char* const panel = panels + label / kPanelLabels * panel_bytes<S>(head.joint_stride);
    S::put_weight(panel, head.joint_stride, at, static_cast<int>(d),
                  label <= L && d < D ? weights.label_embedding[label * D + d] : 0.0f);
    if (d != 0) continue;
    reinterpret_cast<float*>(panel + S::bias_at(head.joint_stride))[at] =
        label > L                       ? -INFINITY
        : weights.score_bias != nullptr ? weights.score_bias[label]
                                        : 0.0f;
  }
}

template <typename S, int kCapacity>
void launch_search(const DeviceHead& head, const SearchPass& pass, const CudaDevice& device,
                   cudaStream_t stream) {
  const TileShape shape = tile_shape(pass.rules.options.beam_size);
  const int64_t tile =
      tile_bytes<S, kCapacity>(shape.images, head.joint_stride, pass.output.marginals != nullptr);
  const int64_t panel = panel_bytes<S>(head.joint_stride);
  const int64_t tiles = (int64_t{pass.count} + shape.images - 1) / shape.images;
  // As many warps as there are tiles for each multiprocessor, and enough to bring the panels.
  const int64_t per_multiprocessor = (tiles + device.multiprocessors - 1) / device.multiprocessors;
  const int64_t wanted = std::clamp<int64_t>(per_multiprocessor, kLeastWarps, kMostWarps);
  const bool fits = head.panels * panel + kLeastWarps * tile <= device.shared_bytes;
  const bool resident = fits && head.joint_dim == kResidentJoint;
  int64_t staged = head.panels;
  if (!resident) {
    staged = std::min<int64_t>(staged, kMostStaged);
    while (staged > 1 && staged * panel + kLeastWarps * tile > device.shared_bytes) staged /= 2;
  }
  const auto warps_within = [&](int64_t bytes) { return (bytes - staged * panel) / tile; };
  // Rather two blocks a multiprocessor than one with a few warps more. Each costs 1 KB beside.
  const int64_t of_two = warps_within((device.shared_bytes + 1024) / kBlocksEach - 1024);
  const int64_t warps =
      std::min(wanted, of_two >= kLeastWarps ? of_two : warps_within(device.shared_bytes));
  if (warps < 1) {
    throw std::invalid_argument("joint_dim " + std::to_string(head.joint_dim) + " needs " +
                                std::to_string(staged * panel + tile) +
                                " bytes of shared memory a block, and this GPU has " +
                                std::to_string(device.shared_bytes) +
                                "; search on the CPU, or train with a smaller one");
  }
  const auto kernel =
      resident ? search_tiles<S, kCapacity, true> : search_tiles<S, kCapacity, false>;
  const int64_t bytes = staged * panel + warps * tile;
  // The most there is, always: the limit is the kernel's, and another head's thread may set it too.
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(device.shared_bytes)),
             "asking for shared memory");
  const int64_t blocks =
      std::min((tiles + warps - 1) / warps, int64_t{device.multiprocessors} * kBlocksEach);
  launch("search_tiles", kernel, blocks, static_cast<int>(warps) * kWarpLanes,
         static_cast<size_t>(bytes), stream, head, pass, static_cast<int>(staged));
}

template <typename S>
void launch_search(const DeviceHead& head, const SearchPass& pass, const CudaDevice& device,
                   cudaStream_t stream) {
  if (pass.rules.options.beam_size <= kSmallBeam) {
    launch_search<S, kSmallBeam>(head, pass, device, stream);
  } else {
    launch_search<S, kMaxBeamSize>(head, pass, device, stream);
  }
}

template <typename S>
void launch_pack(const HeadWeights& weights, const DeviceHead& head, unsigned char* panels,
                 const CudaDevice& device, cudaStream_t stream) {
  const int64_t total = int64_t{head.panels} * kPanelLabels * head.joint_stride;
  const int64_t blocks =
      std::min<int64_t>((total + kThreads - 1) / kThreads, int64_t{8} * device.multiprocessors);
  launch("pack_scores", pack_scores<S>, blocks, kThreads, 0, stream, weights, head, panels);
}

}  // namespace

int64_t parked_beam_bytes(int beam_size) {
  return beam_size <= kSmallBeam ? sizeof(Beam<kSmallBeam>) : sizeof(Beam<kMaxBeamSize>);
}

int64_t exact_panel_bytes(int joint_stride) { return panel_bytes<ExactScores>(joint_stride); }

int64_t fast_panel_bytes(int joint_stride) { return panel_bytes<FastScores>(joint_stride); }

void pack_panels(const HeadWeights& weights, const DeviceHead& head, unsigned char* exact,
                 unsigned char* fast, const CudaDevice& device, cudaStream_t stream) {
  launch_pack<ExactScores>(weights, head, exact, device, stream);
  launch_pack<FastScores>(weights, head, fast, device, stream);
}

void search_images(const DeviceHead& head, const SearchPass& pass, const CudaDevice& device,
                   cudaStream_t stream) {
  if (pass.count == 0) return;
  if (pass.rules.options.precision == Precision::kFast) {
    launch_search<FastScores>(head, pass, device, stream);
  } else {
    launch_search<ExactScores>(head, pass, device, stream);
  }
}

}  // namespace cnnrnn
