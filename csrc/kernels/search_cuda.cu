// Beam search on the device: one launch takes every image through all its steps.
//
// A warp owns some images, as many as have 32 live paths together, or half of them where a batch is
// too small to fill the device. A lane owns a path, so that whatever an image decides stays within
// a warp and no block-wide barrier is needed. In each step
// - each lane looks up the prefix of its path in the table. Paths that are to be scored are dealt
//   out to tiles of 16 rows, one tile after the other, and the warp gathers h(U_o o + e) of a tile;
// - labels go by in panels of 32, which label_scores_cuda.h multiplies, exactly in fp32 or fast in
//   fp16. label_selection_cuda.h keeps softmax's denominator and hands the labels that may be among
//   the best to the lanes that own their paths: scores of labels are never written to device
//   memory;
// - lane m of the warp offers the ends of the m-th image with beam.h, the lanes of an image choose
//   its N best continuations one by one, and lane m decides what lives on or is dropped;
// - an image that needs states that are not there enters their prefixes into the table and is
//   parked: its beam goes to memory, and another launch takes it up when they have been made.
//
// Two kinds of kernels: with all of U_l in shared memory (D = 64), each warp at its own pace; or
// any D and L, panels streamed through shared memory and the warps of a block in step.
//
// By count, not measured: a row costs 64 x 96 multiply-adds at L = 81, D = 64. B = 4,096 images of
// 4 rows and 4 steps are 0.40 G, 12 us at an H200's 33.5 T/s of fp32, unless the loads that feed
// them from shared memory take longer. The table is read once a row and step: 16 bytes of a slot
// and 256 of U_o o. docs/performance.md has the instructions that a warp issues.

#include <algorithm>
#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>

#include "beam.h"
#include "device_head.h"
#include "label_scores_cuda.h"
#include "label_selection_cuda.h"
#include "launch.h"
#include "math.h"
#include "prefix_slots.h"
#include "search_cuda.h"

namespace cnnrnn {

extern __shared__ __align__(16) unsigned char dynamic_shared[];

namespace {

constexpr int kLeastWarps = 4, kMostWarps = 8;  // of a block
constexpr int kBlocksEach = 2;                  // of a multiprocessor
// As many as the registers must allow: the shared memory of some holds one block in any case.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890)
constexpr int kBlocksWithin = 1;
#else
constexpr int kBlocksWithin = kBlocksEach;
#endif
constexpr int kResidentJoint = 64;  // D of the kernels that keep all of U_l in shared memory
constexpr int kThreads = 256;       // of the kernel that packs

// An image on its way through a step. In shared memory.
template <int kCapacity>
struct alignas(16) ImageState {
  Beam<kCapacity> beam;
  FinishedPaths<kCapacity> set_aside;
  Extensions<kCapacity> best;  // the continuations that live on
  PathStep steps[kCapacity];
  float floor;      // what a continuation must exceed
  uint32_t needed;  // bit j: the state of live path j is missing and needed
  int32_t image;
  int32_t scored;  // live paths in this step
  bool may_undo;   // the ends of this step are in set_aside until it is sure that they stay
  bool active;
  bool finite;  // its embedding

  // The finished paths, with the ends of this step.
  __device__ FinishedPaths<kCapacity>& done() { return may_undo ? set_aside : beam.done; }
};

// A warp's part of shared memory.
template <typename S, int kCapacity>
struct WarpMemory {
  ImageState<kCapacity>* images;  // [images]
  typename S::Element* joint;     // [16, D + padding]: h(U_o o + e) of a tile's rows
  unsigned char* best;            // [32] of RowBest's part
  float* chunk;                   // ChunkScores' part
  float* end;                     // [16]: END's score
  TileRow* rows;                  // [16]
};

// How a warp's lanes are dealt out to images.
struct WarpShape {
  int images;     // of a warp
  int log_paths;  // of the lanes of an image: the beam size up to a power of two

  CNNRNN_METHOD int paths() const { return 1 << log_paths; }
  CNNRNN_METHOD int image_of(int lane) const { return lane >> log_paths; }
  CNNRNN_METHOD int path_of(int lane) const { return lane & (paths() - 1); }
  CNNRNN_METHOD bool has(int lane) const { return image_of(lane) < images; }
};

WarpShape warp_shape(int beam_size, bool half) {
  int log_paths = 0;
  while (1 << log_paths < beam_size) ++log_paths;
  return {(half ? kWarpLanes / 2 : kWarpLanes) >> log_paths, log_paths};
}

template <typename S>
CNNRNN_INLINE int64_t joint_bytes(int stride) {
  return static_cast<int64_t>(sizeof(typename S::Element)) * kTileRows * (stride + S::kPadding);
}

template <typename S, int kCapacity>
CNNRNN_INLINE int64_t warp_bytes(int images, int stride) {
  return images * static_cast<int64_t>(sizeof(ImageState<kCapacity>)) + joint_bytes<S>(stride) +
         kWarpLanes * RowBest<kCapacity>::kSharedBytes + ChunkScores<S>::kBytes +
         kTileRows * static_cast<int64_t>(sizeof(float) + sizeof(TileRow));
}

template <typename S, int kCapacity>
__device__ WarpMemory<S, kCapacity> memory_at(unsigned char* shared, int images, int stride) {
  // Rows are read 16 bytes at a time.
  static_assert(sizeof(ImageState<kCapacity>) % 16 == 0 &&
                RowBest<kCapacity>::kSharedBytes * kWarpLanes % 16 == 0 &&
                ChunkScores<S>::kBytes % 16 == 0);
  WarpMemory<S, kCapacity> memory;
  memory.images = reinterpret_cast<ImageState<kCapacity>*>(shared);
  shared += images * sizeof(ImageState<kCapacity>);
  memory.joint = reinterpret_cast<typename S::Element*>(shared);
  memory.best = shared + joint_bytes<S>(stride);
  memory.chunk =
      reinterpret_cast<float*>(memory.best + kWarpLanes * RowBest<kCapacity>::kSharedBytes);
  memory.end = memory.chunk + ChunkScores<S>::kBytes / sizeof(float);
  memory.rows = reinterpret_cast<TileRow*>(memory.end + kTileRows);
  return memory;
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

// Finds the prefix of an image's j-th live path. Returns the node whose state it is scored with, or
// kNoNode.
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
    step.end_score = path.score;
    return kNoNode;
  }
  step.node = length == 0
                  ? kRootNode
                  : find_node(head.slots, head.slot_mask,
                              slot_key(head.counts->prefix.generation, path.parent, path.label));
  step.kind = step.node == kNoNode ? PathStep::Kind::kMissing : PathStep::Kind::kScored;
  return step.node;
}

// What a lane knows of its path in a step.
struct OwnedPath {
  int32_t node = kNoNode;         // whose state it is scored with
  int32_t rank = 0;               // among the warp's paths that are scored
  bool is_scored = false;         // its labels have been, and their scores are finite
  float log_sum_exp = -INFINITY;  // of these
  float reached = -INFINITY;      // by N continuations of its image, as far as is known

  // Its row in the tile that begins at `first`, or -1.
  __device__ __forceinline__ int row_of_tile(int first) const {
    return node != kNoNode && rank >= first && rank < first + kTileRows ? rank - first : -1;
  }
};

// Looks up the states of a warp's paths and ranks those that are scored; `count` is how many.
template <typename S, int kCapacity>
__device__ __forceinline__ OwnedPath begin_step(const DeviceHead& head, const BeamRules& rules,
                                                const WarpMemory<S, kCapacity>& memory,
                                                WarpShape shape, int* count) {
  const int lane = lane_id();
  OwnedPath path;
  if (shape.has(lane)) {
    ImageState<kCapacity>* const image = &memory.images[shape.image_of(lane)];
    path.node = look_up(head, rules, image, shape.path_of(lane));
    if (shape.path_of(lane) == 0)
      image->floor = selection_floor(rules, image->beam, image->beam.done);
  }
  const uint32_t scored = __ballot_sync(~0u, path.node != kNoNode);
  *count = __popc(scored);
  path.rank = __popc(scored & ((1u << lane) - 1));
  return path;
}

// --- Label scores ------------------------------------------------------------------------------

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
// `owner` is the lane of the path, or -1.
template <typename S, int kCapacity>
__device__ __forceinline__ uint32_t forbidden_labels(const DeviceHead& head, const BeamRules& rules,
                                                     const WarpMemory<S, kCapacity>& memory,
                                                     WarpShape shape, int owner,
                                                     int32_t first_label, int32_t allowed) {
  const int32_t before = allowed - first_label;
  uint32_t labels = before <= 0 ? 0 : before >= kPanelLabels ? ~0u : (1u << before) - 1;
  if (rules.options.order != Order::kUnique || owner < 0) return labels;
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

// Adds label logits to a panel's scores and forbids labels that may not follow. A label logit that
// is not finite leaves its row without a finite denominator.
template <typename S, int kCapacity>
__device__ __forceinline__ void complete_scores(const DeviceHead& head, const SearchPass& pass,
                                                const WarpMemory<S, kCapacity>& memory,
                                                WarpShape shape, AllowedLabels allowed, int panel,
                                                typename S::Scores& z, RowSums<S>* sums) {
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
    const uint32_t forbidden =
        forbidden_labels(head, pass.rules, memory, shape, owner, first_label, row.allowed);
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

// --- Decisions, by lane m for the m-th image of a tile -----------------------------------------

// The ends of this step, and what is needed of the states that are missing.
template <int kCapacity>
__device__ void offer_step_ends(const BeamRules& rules, ImageState<kCapacity>* image) {
  const Beam<kCapacity>& beam = image->beam;
  image->needed = 0;
  image->scored = 0;
  image->may_undo = false;
  for (int j = 0; j < beam.live_count; ++j) {
    const PathStep::Kind kind = image->steps[j].kind;
    image->scored += kind == PathStep::Kind::kScored ? 1 : 0;
    if (kind == PathStep::Kind::kMissing || kind == PathStep::Kind::kNotFinite) {
      image->may_undo = true;
    }
  }
  if (image->may_undo) {
    image->set_aside = beam.done;
    if (needs_all_states(rules)) {
      image->needed =
          states_needed<kCapacity>(rules, beam, image->steps, beam.done, false, nullptr);
    }
  }
  offer_ends(rules, beam, image->steps, &image->done());
  if (image->may_undo && !rules.options.end_takes_slot && image->needed == 0) {
    image->needed =
        states_needed<kCapacity>(rules, beam, image->steps, image->done(), false, nullptr);
  }
  image->floor = selection_floor(rules, beam, image->done());
}

// Chooses the N best continuations of each image, all images at once: each time the first one among
// the first ones of its paths, at equal score the lower path's.
template <int kCapacity>
__device__ void choose_continuations(const BeamRules& rules, ImageState<kCapacity>* images,
                                     WarpShape shape, const OwnedPath& path,
                                     RowBest<kCapacity>* best) {
  const int lane = lane_id(), j = shape.path_of(lane);
  const bool has = shape.has(lane);
  ImageState<kCapacity>& image = images[has ? shape.image_of(lane) : 0];
  if (path.is_scored) {
    best->extend_path(image.beam.live[j].score, path.log_sum_exp);
  } else {  // an early chunk may have been finite
    best->clear();
  }
  if (rules.options.end_takes_slot && has && image.active && j < image.beam.live_count) {
    const PathStep& step = image.steps[j];
    if (path.is_scored || step.kind == PathStep::Kind::kOnlyEnds) {
      best->offer(step.end_score, static_cast<int32_t>(rules.num_labels));
    }
  }
  const float floor = has ? image.floor : INFINITY;
  const uint32_t of_image = ((1ull << shape.paths()) - 1) << (lane - j);
  int chosen = 0;
  for (int rank = 0; rank < rules.options.beam_size; ++rank) {
    const float score = best->first_score();
    float largest = score;
    for (int other = shape.paths() / 2; other > 0; other /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, other));
    }
    const uint32_t first = __ballot_sync(~0u, score > floor && score == largest);
    if (first == 0) break;
    chosen += (first & of_image) != 0 ? 1 : 0;
    if (__ffs(static_cast<int>(first & of_image)) - 1 != lane) continue;
    image.best.scores[rank] = score;
    image.best.items[rank] = {j, best->first_label()};
    best->drop_first();
  }
  if (has && j == 0) image.best.size = chosen;
}

// kLost: it would be parked, and no pass follows.
enum class Outcome { kNone, kTakesStep, kEnds, kParks, kLost, kNotFinite };

template <int kCapacity>
__device__ Outcome decide(const BeamRules& rules, ImageState<kCapacity>* image) {
  if (!image->finite) return Outcome::kNotFinite;
  if (image->needed != 0) return Outcome::kParks;
  const Beam<kCapacity>& beam = image->beam;
  offer_chosen_ends(rules, beam, image->best, &image->done());
  if (!image->may_undo) return Outcome::kTakesStep;
  if (rules.options.end_takes_slot) {
    image->needed =
        states_needed<kCapacity>(rules, beam, image->steps, image->done(), false, nullptr);
    if (image->needed != 0) return Outcome::kParks;
  }
  if (is_nonfinite(rules, beam, image->steps, image->done())) return Outcome::kNotFinite;
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

// --- A warp's way through the search -----------------------------------------------------------

// Sets up the images of a warp, which begin at the first-th of the pass. The lanes of an image look
// at its embedding together.
template <typename S, int kCapacity>
__device__ void begin_images(const DeviceHead& head, const SearchPass& pass,
                             const WarpMemory<S, kCapacity>& memory, WarpShape shape, int first,
                             int count) {
  const int lane = lane_id(), m = shape.image_of(lane), j = shape.path_of(lane);
  const bool there = shape.has(lane) && first + m < count;
  const int64_t index = !there                       ? 0
                        : pass.image_list != nullptr ? pass.image_list[first + m]
                                                     : pass.first_image + first + m;
  float poison = 0.0f;  // NaN where a value is not finite
  const auto look_at = [&](const float* values, int64_t n) {
    for (int64_t i = j; i < n; i += shape.paths()) poison = fmaf(values[i], 0.0f, poison);
  };
  if (there && !pass.resumes) {
    look_at(pass.images.joint + index * head.joint_dim, head.joint_dim);
    // Otherwise the root's step sees them all.
    if (pass.images.label_logits != nullptr && pass.rules.options.max_labels == 0) {
      look_at(pass.images.label_logits + index * (head.num_labels + 1), head.num_labels + 1);
    }
  }
  for (int other = shape.paths() / 2; other > 0; other /= 2) {
    poison += __shfl_xor_sync(~0u, poison, other);
  }
  __syncwarp();  // the last images have been read
  if (shape.has(lane) && j == 0) {
    ImageState<kCapacity>& image = memory.images[m];
    image.image = static_cast<int32_t>(index);
    image.active = there;
    image.finite = !isnan(poison);
    image.needed = 0;
    image.set_aside.limit = image.best.limit = pass.rules.options.beam_size;
    if (there && pass.resumes) {
      image.beam = static_cast<const Beam<kCapacity>*>(pass.parked_beams)[index];
    } else {  // in place: a copy would go through memory
      new (&image.beam) Beam<kCapacity>(pass.rules.options.beam_size);
    }
  }
  __syncwarp();
}

// Ends a step: what the outcome of lane m's image asks for.
template <typename S, int kCapacity>
__device__ void end_step(const DeviceHead& head, const SearchPass& pass,
                         const WarpMemory<S, kCapacity>& memory, WarpShape shape, Outcome outcome) {
  const int lane = lane_id();
  const BeamRules& rules = pass.rules;
  const int64_t N = rules.options.beam_size, T = rules.options.max_labels;
  if (outcome == Outcome::kTakesStep) {
    ImageState<kCapacity>& image = memory.images[lane];
    Beam<kCapacity>& beam = image.beam;
    int32_t* const trace = pass.output.trace == nullptr
                               ? nullptr
                               : pass.output.trace + (image.image * (T + 1) + beam.step) * N * 2;
    take_step(rules, image.best, image.steps, image.done(), &beam, trace);
    if (beam.live_count == 0) outcome = Outcome::kEnds;
  }
  if (outcome == Outcome::kParks && pass.marks_parked) outcome = Outcome::kLost;
  if (outcome == Outcome::kParks) {
    const ImageState<kCapacity>& image = memory.images[lane];
    static_cast<Beam<kCapacity>*>(pass.parked_beams)[image.image] = image.beam;
    pass.parked[atomicAdd(pass.parked_count, 1)] = image.image;
  }
  if (outcome == Outcome::kNotFinite) atomicAdd(&head.counts->call.nonfinite_images, 1);
  __syncwarp();
  const int m = shape.image_of(lane), j = shape.path_of(lane);
  const auto of_image = static_cast<Outcome>(__shfl_sync(~0u, static_cast<int>(outcome), m));
  if (shape.has(lane) && j < N) {
    const ImageState<kCapacity>& image = memory.images[m];
    if (of_image == Outcome::kParks) {
      if ((image.needed >> j & 1) != 0) {
        request_state(head, image.beam.live[j].parent, image.beam.live[j].label);
      }
    } else if (of_image != Outcome::kNone && of_image != Outcome::kTakesStep) {
      write_path(head, rules, pass.output, image, j, of_image);
    }
  }
  if (pass.output.marginals != nullptr) {
    for (int other = 0; other < shape.images; ++other) {
      const auto its = static_cast<Outcome>(__shfl_sync(~0u, static_cast<int>(outcome), other));
      if (its != Outcome::kNotFinite && its != Outcome::kLost) continue;
      float* const sums = pass.output.marginals +
                          static_cast<int64_t>(memory.images[other].image) * head.num_labels;
      for (int l = lane; l < head.num_labels; l += kWarpLanes) sums[l] = NAN;
    }
  }
  __syncwarp();
  if (outcome != Outcome::kNone && outcome != Outcome::kTakesStep)
    memory.images[lane].active = false;
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

// Shows a warp the panels from `first` on, a chunk of up to kChunkPanels at a time: its first
// panel, how many they are, and their weights. Streamed ones are brought by the whole block, whose
// warps all call this.
template <typename S, bool kResident, typename Take>
__device__ __forceinline__ void for_each_chunk(const DeviceHead& head, unsigned char* panels,
                                               int staged, int first, Take take) {
  const int bytes =
      static_cast<int>(panel_bytes<S>(kResident ? kResidentJoint : head.joint_stride));
  if constexpr (kResident) {
    for (int panel = first; panel < head.panels; panel += kChunkPanels) {
      take(panel, min(kChunkPanels, head.panels - panel), panels + panel * bytes);
    }
  } else {
    for (int stage = 0; stage < head.panels; stage += staged) {
      const int end = min(stage + staged, head.panels);
      __syncthreads();  // the last stage has been read
      copy_panels(panels, panels_of<S>(head) + static_cast<int64_t>(stage) * bytes,
                  (end - stage) * bytes);
      __syncthreads();
      const int panel = max(stage, first);
      if (panel < end) take(panel, end - panel, panels + (panel - stage) * bytes);
    }
  }
}

// `staged`: panels in shared memory at once; all of them where kResident.
template <typename S, int kCapacity, bool kResident>
__global__ void __launch_bounds__(kMostWarps* kWarpLanes, kBlocksWithin)
    search_warps(DeviceHead head, SearchPass pass, WarpShape shape, int staged) {
  constexpr int kJoint = kResident ? kResidentJoint : 0;
  using Rows = typename S::template Rows<kJoint>;
  const BeamRules& rules = pass.rules;
  const int lane = lane_id(), warp = static_cast<int>(threadIdx.x) / kWarpLanes;
  const int warps = static_cast<int>(blockDim.x) / kWarpLanes;
  const int stride = kResident ? kResidentJoint : head.joint_stride;
  const bool completes =
      pass.images.label_logits != nullptr || rules.options.order == Order::kUnique;
  const int count = pass.image_count == nullptr ? pass.count : *pass.image_count;
  const int each = warps * shape.images;
  const int begin = static_cast<int>(blockIdx.x) * each;
  if (begin >= count) return;  // as most of a pass that resumes few
  unsigned char* const panels = dynamic_shared;
  const WarpMemory<S, kCapacity> memory =
      memory_at<S, kCapacity>(dynamic_shared + staged * panel_bytes<S>(stride) +
                                  warp * warp_bytes<S, kCapacity>(shape.images, stride),
                              shape.images, stride);
  ChunkScores<S> chunk(memory.chunk);
  if constexpr (kResident) {
    copy_panels(panels, panels_of<S>(head), staged * static_cast<int>(panel_bytes<S>(stride)));
    __syncthreads();
  }
  // What a warp, or where panels are streamed a block, goes on for.
  const auto any_of_block = [](bool warp_goes_on) {
    return kResident ? warp_goes_on : __syncthreads_or(warp_goes_on) != 0;
  };
  unsigned lookups = 0;
  for (int first_image = begin; first_image < count;
       first_image += static_cast<int>(gridDim.x) * each) {
    begin_images(head, pass, memory, shape, first_image + warp * shape.images, count);
    while (true) {
      const bool mine = lane < shape.images && memory.images[lane].active;
      const bool active = __any_sync(~0u, mine);
      if (!any_of_block(active)) break;
      OwnedPath path;
      int scored = 0;
      RowBest<kCapacity> best(memory.best + lane * RowBest<kCapacity>::kSharedBytes,
                              rules.options.beam_size);
      best.clear();
      if (active) path = begin_step(head, rules, memory, shape, &scored);
      RowSums<S> sums;
      AllowedLabels allowed{};
      const auto score_panel = [&](const Rows& joint, int panel, const unsigned char* weights,
                                   typename S::Scores& z) {
        S::template multiply<kJoint>(joint, weights, stride, z);
        if (completes || panel * kPanelLabels < allowed.by_all) {
          complete_scores(head, pass, memory, shape, allowed, panel, z, &sums);
        }
      };
      for (int first = 0; any_of_block(first < scored); first += kTileRows) {
        int first_panel = head.panels;
        if (first < scored) {
          allowed = begin_tile<S, kCapacity, kResident>(head, pass, memory, shape, path, first,
                                                        scored, &sums);
          first_panel = allowed.by_one / kPanelLabels;
        }
        const Rows joint(memory.joint, stride);
        for_each_chunk<S, kResident>(
            head, panels, staged, first_panel,
            [&](int panel, int chunk_panels, const unsigned char* weights) {
              const int first_label = panel * kPanelLabels, row = path.row_of_tile(first);
              for (int p = 0; p < chunk_panels; ++p) {
                typename S::Scores z;
                score_panel(joint, panel + p, weights + p * panel_bytes<S>(stride), z);
                add_panel(p, head.num_labels - first_label - p * kPanelLabels, z, memory.end,
                          &chunk, &sums);
              }
              if (panel + chunk_panels < head.panels) {
                select_early(first_label, chunk_panels, chunk, sums, row, memory.rows, &best);
                return;
              }
              finish_softmax(rules, memory, shape, sums, row, &path);
              const ImageState<kCapacity>& image =
                  memory.images[shape.has(lane) ? shape.image_of(lane) : 0];
              select_last(first_label, chunk_panels, chunk, path.is_scored ? row : -1,
                          shape.paths(), image.beam.live[shape.path_of(lane)].score,
                          path.log_sum_exp, image.floor, memory.rows, &path.reached, &best);
            });
      }
      Outcome outcome = Outcome::kNone;
      if (active) {
        __syncwarp();
        if (mine) offer_step_ends(rules, &memory.images[lane]);
        __syncwarp();
        choose_continuations(rules, memory.images, shape, path, &best);
        __syncwarp();
        if (mine) {
          ImageState<kCapacity>& image = memory.images[lane];
          outcome = decide(rules, &image);
          if (outcome == Outcome::kTakesStep) {
            lookups += static_cast<unsigned>(image.scored);
          } else {
            image.active = false;
          }
        }
        __syncwarp();
      }
      if (pass.output.marginals != nullptr) {
        for (int first = 0; any_of_block(first < scored); first += kTileRows) {
          int first_panel = head.panels;
          if (first < scored) {
            allowed = begin_tile<S, kCapacity, kResident>(head, pass, memory, shape, path, first,
                                                          scored, &sums);
            first_panel = allowed.by_one / kPanelLabels;
          }
          const Rows joint(memory.joint, stride);
          for_each_chunk<S, kResident>(
              head, panels, staged, first_panel,
              [&](int panel, int chunk_panels, const unsigned char* weights) {
                for (int p = 0; p < chunk_panels; ++p) {
                  typename S::Scores z;
                  score_panel(joint, panel + p, weights + p * panel_bytes<S>(stride), z);
                  add_marginals(head, pass.output, memory, shape, min(scored - first, kTileRows),
                                panel + p, z, &chunk);
                }
              });
        }
      }
      if (active) end_step(head, pass, memory, shape, outcome);
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
  // As many images as there are lanes for, if that leaves enough warps.
  const auto warps_each = [&](WarpShape of) {
    const int64_t images = int64_t{device.multiprocessors} * of.images;
    return (pass.count + images - 1) / images;
  };
  const int beam_size = pass.rules.options.beam_size;
  WarpShape shape = warp_shape(beam_size, false);
  if (shape.images > 1 && warps_each(shape) < kMostWarps) shape = warp_shape(beam_size, true);
  const int64_t of_warp = warp_bytes<S, kCapacity>(shape.images, head.joint_stride);
  const int64_t panel = panel_bytes<S>(head.joint_stride);
  // As many warps as there are images for, and enough to bring the panels.
  const int64_t wanted = std::clamp<int64_t>(warps_each(shape), kLeastWarps, kMostWarps);
  const bool fits = head.panels * panel + kLeastWarps * of_warp <= device.shared_bytes;
  const bool resident = fits && head.joint_dim == kResidentJoint;
  int64_t staged = head.panels;
  if (!resident) {
    staged = std::min<int64_t>(staged, kChunkPanels);
    while (staged > 1 && staged * panel + kLeastWarps * of_warp > device.shared_bytes) --staged;
  }
  const auto warps_within = [&](int64_t bytes) { return (bytes - staged * panel) / of_warp; };
  // Rather two blocks a multiprocessor than one with a few warps more. Each costs 1 KB beside.
  const int64_t of_two = warps_within((device.shared_bytes + 1024) / kBlocksEach - 1024);
  const int64_t warps =
      std::min(wanted, of_two >= kLeastWarps ? of_two : warps_within(device.shared_bytes));
  if (warps < 1) {
    throw std::invalid_argument("joint_dim " + std::to_string(head.joint_dim) + " needs " +
                                std::to_string(staged * panel + of_warp) +
                                " bytes of shared memory a block, and this GPU has " +
                                std::to_string(device.shared_bytes) +
                                "; search on the CPU, or train with a smaller one");
  }
  const auto kernel =
      resident ? search_warps<S, kCapacity, true> : search_warps<S, kCapacity, false>;
  const int64_t bytes = staged * panel + warps * of_warp;
  // The most there is, always: the limit is the kernel's, and another head's thread may set it too.
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(device.shared_bytes)),
             "asking for shared memory");
  const int64_t each = warps * shape.images;
  const int64_t blocks =
      std::min((pass.count + each - 1) / each, int64_t{device.multiprocessors} * kBlocksEach);
  launch("search_warps", kernel, blocks, static_cast<int>(warps) * kWarpLanes,
         static_cast<size_t>(bytes), stream, head, pass, shape, static_cast<int>(staged));
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
