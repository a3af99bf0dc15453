// What a step decides of a warp's images, lane m for the m-th one by beam.h, and what follows from
// it. Device code.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/beam.h"
#include "kernels/cuda/banks.h"
#include "kernels/cuda/device_head.h"
#include "kernels/cuda/label_scores.h"
#include "kernels/cuda/row_best.h"
#include "kernels/cuda/warp_state.h"

namespace cnnrnn {

// The ends of this step, and what is needed of the states that are missing.
template <int kCapacity>
__device__ void offer_step_ends(const BeamRules& rules, ImageState<kCapacity>* image) {
  const Beam<kCapacity>& beam = image->beam;
  image->needed = 0;
  image->scored = 0;
  image->may_undo = false;
  if constexpr (kCapacity == kBankedPaths) forbid_ends(image);
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

// Adds the probability of the paths that end in a step, in or out of the N best.
template <int kCapacity>
__device__ void add_mass(const BeamRules& rules, ImageState<kCapacity>* image) {
  DeviceBeam<kCapacity>& beam = image->beam;
  if (rules.options.end_takes_slot) {
    for (int i = 0; i < image->best.size; ++i) {
      if (image->best.items[i].label == rules.num_labels) beam.mass.add(image->best.scores[i]);
    }
    return;
  }
  for (int j = 0; j < beam.live_count; ++j) {
    const PathStep& step = image->steps[j];
    if (step.kind != PathStep::Kind::kScored && step.kind != PathStep::Kind::kOnlyEnds) continue;
    beam.mass.add(step.end_score);
  }
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

// Ends a step: what the outcome of lane m's image asks for.
template <typename S, int kCapacity>
__device__ void end_step(const DeviceHead& head, const SearchPass& pass,
                         const WarpMemory<S, kCapacity>& memory, WarpShape shape, Outcome outcome) {
  const int lane = lane_id();
  const BeamRules& rules = pass.rules;
  const int64_t N = rules.options.beam_size, T = rules.options.max_labels;
  if constexpr (kCapacity == kBankedPaths) {
    if (__any_sync(~0u, outcome == Outcome::kTakesStep)) {
      if (rules.keep_all) keep_complete(pass, &memory.images[0]);
      take_banked_step(pass, &memory.images[0]);
    }
  } else if (outcome == Outcome::kTakesStep) {
    ImageState<kCapacity>& image = memory.images[lane];
    int32_t* trace = pass.output.trace;
    if (trace != nullptr) {
      trace += (image.image * (T + 1) + image.beam.step) * pass.output.trace_width * 2;
    }
    if (rules.keep_all) add_mass(rules, &image);
    take_step(rules, image.best, image.steps, image.done(), &image.beam, trace);
  }
  if (outcome == Outcome::kTakesStep && memory.images[lane].beam.live_count == 0) {
    outcome = Outcome::kEnds;
  }
  if (outcome == Outcome::kParks && pass.marks_parked) outcome = Outcome::kLost;
  if (outcome == Outcome::kParks) {
    const ImageState<kCapacity>& image = memory.images[lane];
    static_cast<DeviceBeam<kCapacity>*>(pass.parked_beams)[image.image] = image.beam;
    pass.parked[atomicAdd(pass.parked_count, 1)] = image.image;
  }
  if (outcome == Outcome::kNotFinite) atomicAdd(&head.counts->call.nonfinite_images, 1);
  __syncwarp();
  const int m = shape.image_of(lane), j = shape.path_of(lane);
  const auto of_image = static_cast<Outcome>(__shfl_sync(~0u, static_cast<int>(outcome), m));
  if (shape.has(lane)) {
    const ImageState<kCapacity>& image = memory.images[m];
    if (of_image == Outcome::kParks) {
      if ((image.needed >> j & 1) != 0) {
        request_state(head, image.beam.live[j].parent, image.beam.live[j].label);
      }
    } else if (j < N && of_image != Outcome::kNone && of_image != Outcome::kTakesStep) {
      write_path(head, rules, pass.output, image, j, of_image);
    }
  }
  if (pass.output.log_evidence != nullptr && lane < shape.images && outcome != Outcome::kNone &&
      outcome != Outcome::kTakesStep && outcome != Outcome::kParks) {
    const ImageState<kCapacity>& image = memory.images[lane];
    pass.output.log_evidence[image.image] = outcome == Outcome::kEnds ? image.beam.mass.log() : NAN;
  }
  if (pass.output.marginals != nullptr) {
    if constexpr (kCapacity == kBankedPaths) {
      const bool ends = __any_sync(~0u, outcome == Outcome::kEnds);
      if (ends && pass.complete != nullptr) write_given_marginals(head, pass, memory.images[0]);
    }
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

}  // namespace cnnrnn
