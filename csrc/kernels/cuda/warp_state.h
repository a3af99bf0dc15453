// What a warp of the device's search knows: its images in shared memory, which of its lanes own
// their paths, and the prefix table that these are looked up in. Device code.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/beam.h"
#include "kernels/cuda/device_head.h"
#include "kernels/cuda/label_scores.h"
#include "kernels/cuda/label_selection.h"
#include "kernels/cuda/prefix_slots.h"
#include "kernels/cuda/row_best.h"

namespace cnnrnn {

// An image between two steps.
template <int kCapacity>
struct DeviceBeam : Beam<kCapacity> {
  using Beam<kCapacity>::Beam;

  LogSum mass;  // of the paths that ended, in a search for marginals
};

// The same, bank by bank: live paths stand in the order of their banks.
template <>
struct DeviceBeam<kBankedPaths> : Beam<kBankedPaths> {
  using Beam::Beam;

  LogSum mass;
  int32_t complete = 0;            // how many these are
  int32_t present_count = 0;       // labels known to be present
  int32_t present[kBankedPaths];   // these, ascending
  uint32_t lacking[kBankedPaths];  // of each live path: bit k while it lacks present[k]
};

// An image on its way through a step. In shared memory.
template <int kCapacity>
struct alignas(16) ImageState {
  DeviceBeam<kCapacity> beam;
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
  float* present;                 // [32, kPresentStride]: banks.h
};

// Of the scores of present labels after a path; odd, which spreads them over all banks of memory.
constexpr int kPresentStride = kBankedPaths + 1;

// How a warp's lanes are dealt out to images.
struct WarpShape {
  int images;     // of a warp
  int log_paths;  // of the lanes of an image: the beam size up to a power of two

  CNNRNN_METHOD int paths() const { return 1 << log_paths; }
  CNNRNN_METHOD int image_of(int lane) const { return lane >> log_paths; }
  CNNRNN_METHOD int path_of(int lane) const { return lane & (paths() - 1); }
  CNNRNN_METHOD bool has(int lane) const { return image_of(lane) < images; }
};

// One image with all lanes, for banks.
constexpr WarpShape kBankedShape = {1, 5};

inline WarpShape warp_shape(int beam_size, bool half) {
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
         kTileRows * static_cast<int64_t>(sizeof(float) + sizeof(TileRow)) +
         (kCapacity == kBankedPaths ? kWarpLanes * kPresentStride * sizeof(float) : 0);
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
  memory.present = reinterpret_cast<float*>(memory.rows + kTileRows);
  return memory;
}

// --- The table ---------------------------------------------------------------------------------

// Asks for the state of a prefix. Whoever asks first enters it, and its parent for its gates.
__device__ inline void request_state(const DeviceHead& head, int32_t parent, int32_t label) {
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

}  // namespace cnnrnn
