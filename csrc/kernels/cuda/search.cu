// Beam search on the device: one launch takes every image through all its steps.
//
// A warp owns some images, as many as have 32 live paths together, or half of them where a batch is
// too small to fill the device. A lane owns a path, so that whatever an image decides stays within
// a warp and no block-wide barrier is needed. In each step
// - each lane looks up the prefix of its path in the table (warp_state.h). Paths that are to be
//   scored are dealt out to tiles of 16 rows, one tile after the other, and the warp gathers
//   h(U_o o + e) of a tile (tile_scores.h);
// - labels go by in panels of 32, which label_scores.h multiplies, exactly in fp32 or fast in
//   fp16. label_selection.h keeps softmax's denominator and hands the labels that may be among
//   the best to the lanes that own their paths (row_best.h): scores of labels are never written to
//   device memory;
// - lane m of the warp offers the ends of the m-th image with beam.h, the lanes of an image choose
//   its N best continuations one by one, and lane m decides what lives on or is dropped
//   (step_decisions.h);
// - an image that needs states that are not there enters their prefixes into the table and is
//   parked: its beam goes to memory, and another launch takes it up when they have been made.
//
// Two kinds of kernels: with all of U_l in shared memory (D = 64), each warp at its own pace; or
// any D and L, panels streamed through shared memory and the warps of a block in step. Where labels
// of an image are known, its warp has no other and takes it bank by bank (banks.h), of the second
// kind.
//
// By count, not measured (docs/performance.md): with N = 4, T = 5, 80 labels and a trained head an
// image has 12 paths to score, and a warp issues 2,500 instructions for it in fp16, 6,600 in fp32,
// of which 3,000 are multiply-adds. The table is read once a path and step: 16 bytes of a slot and
// 256 of U_o o.

#include <algorithm>
#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>

#include "kernels/cuda/device_head.h"
#include "kernels/cuda/label_scores.h"
#include "kernels/cuda/label_selection.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/search.h"
#include "kernels/cuda/step_decisions.h"
#include "kernels/cuda/tile_scores.h"
#include "kernels/cuda/warp_state.h"

namespace cnnrnn {

extern __shared__ __align__(16) unsigned char dynamic_shared[];

namespace {

constexpr int kLeastWarps = 4, kMostWarps = 8;  // of a block
constexpr int kBlocksEach = 2;                  // of a multiprocessor
// As many as the registers must allow: the shared memory of some holds one block in any case, and
// so does that of all where a warp has an image with banks.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890)
constexpr int kBlocksWithin = 1;
#else
constexpr int kBlocksWithin = kBlocksEach;
#endif
constexpr int kThreads = 256;  // of the kernel that packs

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
      image.beam = static_cast<const DeviceBeam<kCapacity>*>(pass.parked_beams)[index];
    } else {  // in place: a copy would go through memory
      new (&image.beam) DeviceBeam<kCapacity>(pass.rules.options.beam_size);
    }
  }
  __syncwarp();
  if constexpr (kCapacity == kBankedPaths) {
    if (there && !pass.resumes) list_present(pass, &memory.images[0]);
  }
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
__global__ void __launch_bounds__(kMostWarps* kWarpLanes,
                                  kCapacity == kBankedPaths ? 1 : kBlocksWithin)
    search_warps(DeviceHead head, SearchPass pass, WarpShape shape, int staged) {
  constexpr int kJoint = kResident ? kResidentJoint : 0;
  constexpr bool kBanked = kCapacity == kBankedPaths;
  using Rows = typename S::template Rows<kJoint>;
  const BeamRules& rules = pass.rules;
  const int lane = lane_id(), warp = static_cast<int>(threadIdx.x) / kWarpLanes;
  const int warps = static_cast<int>(blockDim.x) / kWarpLanes;
  const int stride = kResident ? kResidentJoint : head.joint_stride;
  const bool completes = pass.images.label_logits != nullptr || leaves_out_held(rules, false);
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
  // A path's best labels: as many as may be among those of its image, or of its bank.
  const int row_best = kBanked ? rules.options.places : rules.options.beam_size;
  const bool is_given = kBanked && pass.images.evidence != nullptr;
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
      RowBest<kCapacity> best(memory.best + lane * RowBest<kCapacity>::kSharedBytes, row_best);
      best.clear();
      if (active) path = begin_step(head, rules, memory, shape, &scored);
      RowSums<S> sums;
      AllowedLabels allowed{};
      // Deals the scored paths to tiles, and shows each tile's chunks: the first path, the first
      // panel, how many panels they are, and what scores the p-th of them. `counting`: see
      // leaves_out_held.
      const auto for_each_tile = [&](bool counting, auto take_chunk) {
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
                take_chunk(first, panel, chunk_panels, [&](int p, typename S::Scores& z) {
                  S::template multiply<kJoint>(joint, weights + p * panel_bytes<S>(stride), stride,
                                               z);
                  if (completes || (counting && leaves_out_held(rules, true)) ||
                      (panel + p) * kPanelLabels < allowed.by_all) {
                    complete_scores(head, pass, memory, shape, allowed, counting, panel + p, z,
                                    &sums);
                  }
                });
              });
        }
      };
      for_each_tile(false, [&](int first, int panel, int chunk_panels, const auto& score_panel) {
        const int first_label = panel * kPanelLabels, row = path.row_of_tile(first);
        for (int p = 0; p < chunk_panels; ++p) {
          typename S::Scores z;
          score_panel(p, z);
          float largest[S::kRows];
          add_panel<S>(head.num_labels - first_label - p * kPanelLabels, z, memory.end, &sums,
                       largest);
          if constexpr (kBanked) {
            if (is_given) {
              take_known<S>(pass, memory, panel + p, z);
              largest_of_lane<S>(z, largest);
            }
          }
          chunk.put(p, z, largest);
        }
        if (panel + chunk_panels < head.panels) {
          select_early(first_label, chunk_panels, chunk, sums, row, memory.rows, &best);
          return;
        }
        finish_softmax(rules, memory, shape, sums, row, &path);
        const ImageState<kCapacity>& image =
            memory.images[shape.has(lane) ? shape.image_of(lane) : 0];
        // Paths of one bank stand apart: each knows of its own continuations alone.
        select_last(first_label, chunk_panels, chunk, path.is_scored ? row : -1,
                    kBanked ? 1 : shape.paths(), image.beam.live[shape.path_of(lane)].score,
                    path.log_sum_exp, image.floor, memory.rows, &path.reached, &best);
      });
      Outcome outcome = Outcome::kNone;
      if (active) {
        __syncwarp();
        if (mine) offer_step_ends(rules, &memory.images[lane]);
        __syncwarp();
        if constexpr (kBanked) {
          choose_of_banks<S>(rules, memory, path, &best);
        } else {
          choose_continuations(rules, memory.images, shape, path, &best);
        }
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
      if (pass.output.marginals != nullptr && !is_given) {
        for_each_tile(true, [&](int first, int panel, int chunk_panels, const auto& score_panel) {
          for (int p = 0; p < chunk_panels; ++p) {
            typename S::Scores z;
            score_panel(p, z);
            add_marginals(head, pass.output, memory, shape, min(scored - first, kTileRows),
                          panel + p, z, &chunk);
          }
        });
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
  constexpr bool kBanked = kCapacity == kBankedPaths;
  const int beam_size = pass.rules.options.beam_size;
  WarpShape shape = kBanked ? kBankedShape : warp_shape(beam_size, false);
  if (shape.images > 1 && warps_each(shape) < kMostWarps) shape = warp_shape(beam_size, true);
  const int64_t of_warp = warp_bytes<S, kCapacity>(shape.images, head.joint_stride);
  const int64_t panel = panel_bytes<S>(head.joint_stride);
  // As many warps as there are images for, and enough to bring the panels.
  const int64_t wanted = std::clamp<int64_t>(warps_each(shape), kLeastWarps, kMostWarps);
  const bool fits = head.panels * panel + kLeastWarps * of_warp <= device.shared_bytes;
  const bool resident = fits && head.joint_dim == kResidentJoint && !kBanked;
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
  auto kernel = search_warps<S, kCapacity, false>;
  if constexpr (!kBanked) {
    if (resident) kernel = search_warps<S, kCapacity, true>;
  }
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
  if (pass.banked) {
    launch_search<S, kBankedPaths>(head, pass, device, stream);
  } else if (pass.rules.options.beam_size <= kSmallBeam) {
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

int64_t parked_beam_bytes(int beam_size, bool banked) {
  return banked                    ? sizeof(DeviceBeam<kBankedPaths>)
         : beam_size <= kSmallBeam ? sizeof(DeviceBeam<kSmallBeam>)
                                   : sizeof(DeviceBeam<kMaxBeamSize>);
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
