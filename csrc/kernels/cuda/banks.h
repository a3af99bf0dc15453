// The search where labels of an image are known, or where its banks are wider than a beam, as
// cpu/bank_search.h has it: a bank for each number of present labels that a path still lacks. A
// warp owns one image, and each of its lanes a live path of some bank. Device code.
//
// A step's scores are in the softmax before anything that is known is taken out of them. Those of
// present labels go to memory, one place for each path and label: they lead to the bank below.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/beam.h"
#include "kernels/cuda/device_head.h"
#include "kernels/cuda/label_scores.h"
#include "kernels/cuda/row_best.h"
#include "kernels/cuda/warp_state.h"

namespace cnnrnn {

using BankedState = ImageState<kBankedPaths>;

__device__ inline uint32_t lower_lanes() { return (1u << lane_id()) - 1; }

__device__ inline const int8_t* evidence_of(const SearchPass& pass, const BankedState& image) {
  return pass.images.evidence + image.image * pass.images.evidence_stride;
}

// Lists an image's present labels, all of which the empty path lacks.
__device__ inline void list_present(const SearchPass& pass, BankedState* image) {
  const int lane = lane_id();
  const auto L = static_cast<int32_t>(pass.rules.num_labels);
  int count = 0;
  for (int32_t first = 0; pass.images.evidence != nullptr && first < L; first += kWarpLanes) {
    const int32_t label = first + lane;
    const bool is_present = label < L && evidence_of(pass, *image)[label] > 0;
    const uint32_t found = __ballot_sync(~0u, is_present);
    if (is_present) image->beam.present[count + __popc(found & lower_lanes())] = label;
    count += __popc(found);
  }
  if (lane == 0) {
    image->beam.present_count = count;
    image->beam.lacking[0] = count == kBankedPaths ? ~0u : (1u << count) - 1;
  }
  __syncwarp();
}

// Whether a path that lacks labels has no step left for others.
__device__ inline bool takes_only_present(const BeamRules& rules, int64_t step, uint32_t lacking) {
  return lacking != 0 && rules.options.max_labels - step == __popc(lacking);
}

// Puts the scores of present labels that a row's path lacks where extend_present finds them, and
// makes them -inf with all others of the panel that may not follow.
template <typename S>
__device__ void take_known(const SearchPass& pass, const WarpMemory<S, kBankedPaths>& memory,
                           int panel, typename S::Scores& z) {
  const int lane = lane_id();
  const BankedState& image = memory.images[0];
  const int32_t first_label = panel * kPanelLabels, label = first_label + lane;
  const int8_t known = label < pass.rules.num_labels ? evidence_of(pass, image)[label] : int8_t{0};
  const uint32_t present = __ballot_sync(~0u, known > 0), absent = __ballot_sync(~0u, known < 0);
  const int before = __popc(__ballot_sync(
      ~0u, lane < image.beam.present_count && image.beam.present[lane] < first_label));
  const auto index_of = [&](int at) { return before + __popc(present & ((1u << at) - 1)); };
#pragma unroll
  for (int i = 0; i < S::kRows; ++i) {
    const int owner = memory.rows[lane / S::kLanesPerRow + S::kGroups * i].owner;
    if (owner < 0) continue;
    const uint32_t lacking = image.beam.lacking[owner];
    uint32_t lacked = 0;  // labels of the panel
    for (uint32_t left = lacking == 0 ? 0 : present; left != 0; left &= left - 1) {
      const int at = __ffs(static_cast<int>(left)) - 1;
      if ((lacking >> index_of(at) & 1) != 0) lacked |= 1u << at;
    }
    uint32_t left_out = absent | lacked;
    if (takes_only_present(pass.rules, image.beam.step, lacking)) {
      left_out = ~0u;
    } else if (lacking != 0 && pass.rules.options.order == Order::kIncreasing) {
      const int32_t lowest = image.beam.present[__ffs(static_cast<int>(lacking)) - 1] - first_label;
      if (lowest < kPanelLabels) left_out |= lowest < 0 ? ~0u : ~0u << lowest;
    }
#pragma unroll
    for (int j = 0; j < S::kLabels; ++j) {
      const int at = S::label(lane, j);
      if ((lacked >> at & 1) != 0) {
        memory.present[owner * kPresentStride + index_of(at)] = z[i][j];
      }
      if ((left_out >> at & 1) != 0) z[i][j] = -INFINITY;
    }
  }
}

// No path ends that lacks a present label.
__device__ inline void forbid_ends(BankedState* image) {
  for (int j = 0; j < image->beam.live_count; ++j) {
    if (image->beam.lacking[j] != 0) image->steps[j].end_score = -INFINITY;
  }
}

// Chooses the best continuations of each bank, banks ascending: each time the first one among the
// first ones of the bank's paths and of present labels after the paths of the bank above, at equal
// score the lower path's.
template <typename S>
__device__ void choose_of_banks(const BeamRules& rules, const WarpMemory<S, kBankedPaths>& memory,
                                const OwnedPath& path, RowBest<kBankedPaths>* best) {
  const int lane = lane_id();
  BankedState& image = memory.images[0];
  const bool lives = image.active && lane < image.beam.live_count;
  const uint32_t lacking = lives ? image.beam.lacking[lane] : 0;
  const int bank = __popc(lacking);
  float* const present = memory.present + lane * kPresentStride;  // scores of paths
  uint32_t open = 0;                                              // of these, not yet chosen
  if (path.is_scored) {
    const float score = image.beam.live[lane].score;
    best->extend_path(score, path.log_sum_exp);
    open = rules.options.order == Order::kIncreasing ? lacking & (~lacking + 1) : lacking;
    for (uint32_t left = open; left != 0; left &= left - 1) {
      const int k = __ffs(static_cast<int>(left)) - 1;
      present[k] = score + step_log_prob(present[k], path.log_sum_exp);
    }
  } else {  // an early chunk may have been finite
    best->clear();
  }
  if (rules.options.end_takes_slot && lives && lacking == 0 &&
      (path.is_scored || image.steps[lane].kind == PathStep::Kind::kOnlyEnds)) {
    best->offer(image.steps[lane].end_score, static_cast<int32_t>(rules.num_labels));
  }
  int chosen = 0;
  for (int into = 0; into <= image.beam.present_count; ++into) {
    for (int rank = 0; rank < rules.options.places; ++rank) {
      float score = -INFINITY;
      int k = -1;
      if (lives && bank == into) {
        score = best->first_score();
      } else if (bank == into + 1) {
        for (uint32_t left = open; left != 0; left &= left - 1) {
          const int at = __ffs(static_cast<int>(left)) - 1;
          if (present[at] > score) score = present[k = at];
        }
      }
      float largest = score;
      for (int other = kWarpLanes / 2; other > 0; other /= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, other));
      }
      const uint32_t first = __ballot_sync(~0u, score > image.floor && score == largest);
      if (first == 0) break;
      if (__ffs(static_cast<int>(first)) - 1 == lane) {
        image.best.scores[chosen] = score;
        image.best.items[chosen] = {lane, k < 0 ? best->first_label() : image.beam.present[k]};
        if (k < 0) {
          best->drop_first();
        } else {
          open &= ~(1u << k);
        }
      }
      ++chosen;
    }
  }
  if (lane == 0) image.best.size = chosen;
}

// Keeps the paths that ended in a step, in or out of the N best, and their probability.
__device__ inline void keep_complete(const SearchPass& pass, BankedState* image) {
  const BeamRules& rules = pass.rules;
  const int lane = lane_id();
  DeviceBeam<kBankedPaths>& beam = image->beam;
  int j = lane;
  float score = -INFINITY;
  if (!rules.options.end_takes_slot) {
    const bool ends = j < beam.live_count && (image->steps[j].kind == PathStep::Kind::kScored ||
                                              image->steps[j].kind == PathStep::Kind::kOnlyEnds);
    if (ends) score = image->steps[j].end_score;
  } else if (lane < image->best.size && image->best.items[lane].label == rules.num_labels) {
    score = image->best.scores[lane];
    j = image->best.items[lane].parent_rank;
  }
  const uint32_t ended = __ballot_sync(~0u, score > -INFINITY);
  if (pass.complete != nullptr && score > -INFINITY) {
    const int64_t room = (rules.options.max_labels + 1) * rules.options.places;
    const LivePath& path = beam.live[j];
    pass.complete[image->image * room + beam.complete + __popc(ended & lower_lanes())] = {
        {path.parent, path.label, static_cast<int32_t>(beam.step)}, score};
  }
  for (uint32_t left = ended; left != 0; left &= left - 1) {
    const float one = __shfl_sync(~0u, score, __ffs(static_cast<int>(left)) - 1);
    if (lane == 0) beam.mass.add(one);
  }
  __syncwarp();  // all have read the count
  if (lane == 0) beam.complete += __popc(ended);
  __syncwarp();
}

// Ends a step as take_step does, over all banks.
__device__ inline void take_banked_step(const SearchPass& pass, BankedState* image) {
  const BeamRules& rules = pass.rules;
  const int lane = lane_id();
  DeviceBeam<kBankedPaths>& beam = image->beam;
  const bool takes = lane < image->best.size && image->best.items[lane].label != rules.num_labels;
  float score = -INFINITY;
  LivePath path{};
  uint32_t lacking = 0;
  int32_t parent = 0;
  if (takes) {
    score = image->best.scores[lane];
    parent = image->best.items[lane].parent_rank;
    path = {score, image->steps[parent].node, image->best.items[lane].label};
    lacking = beam.lacking[parent];
    for (uint32_t left = lacking; left != 0; left &= left - 1) {
      const int k = __ffs(static_cast<int>(left)) - 1;
      if (beam.present[k] == path.label) lacking &= ~(1u << k);
    }
  }
  float best = score;
  for (int other = kWarpLanes / 2; other > 0; other /= 2) {
    best = fmaxf(best, __shfl_xor_sync(~0u, best, other));
  }
  // Of what fits the evidence, where labels are known.
  const bool given = pass.images.evidence != nullptr;
  float live_mass = takes ? expf(score - (given ? beam.mass.most : 0.0f)) : 0.0f;
  for (int other = kWarpLanes / 2; other > 0; other /= 2) {
    live_mass += __shfl_xor_sync(~0u, live_mass, other);
  }
  const float found = given ? beam.mass.sum : 1.0f;
  __syncwarp();  // all have read the beam
  if (lane == 0) {
    if (&image->done() != &beam.done) beam.done = image->done();
    if (rules.options.stop == Stop::kLiteral && best > -INFINITY && beam.done.size > 0 &&
        best < beam.done.worst()) {
      beam.accepting = false;
    }
  }
  __syncwarp();
  const float floor = dropped_at(rules, beam.accepting, beam.done);
  const bool all_go = rules.keep_all && best <= floor && live_mass < kLiveMassFloor * found;
  const bool stays = takes && !all_go && (rules.keep_all || score > floor);
  const uint32_t staying = __ballot_sync(~0u, stays);
  if (stays) {
    const int j = __popc(staying & lower_lanes());
    beam.live[j] = path;
    beam.lacking[j] = lacking;
    if (pass.output.trace != nullptr) {
      const int64_t step = image->image * (rules.options.max_labels + 1) + beam.step;
      int32_t* const trace = pass.output.trace + (step * pass.output.trace_width + j) * 2;
      trace[0] = parent;
      trace[1] = path.label;
    }
  }
  __syncwarp();
  if (lane == 0) {
    beam.live_count = __popc(staying);
    ++beam.step;
  }
  __syncwarp();
}

// Marginals of an image of which labels are known, from its complete paths: [L], zeros before. A
// lane adds what belongs to its labels, path by path.
__device__ inline void write_given_marginals(const DeviceHead& head, const SearchPass& pass,
                                             const BankedState& image) {
  const BeamRules& rules = pass.rules;
  const int lane = lane_id();
  const DeviceBeam<kBankedPaths>& beam = image.beam;
  const int64_t room = (rules.options.max_labels + 1) * rules.options.places;
  const CompletePath* const complete = pass.complete + image.image * room;
  float* const marginals = pass.output.marginals + int64_t{image.image} * head.num_labels;
  if (beam.complete == 0) {
    for (int l = lane; l < head.num_labels; l += kWarpLanes) marginals[l] = NAN;
    return;
  }
  for (int first = 0; first < beam.complete; first += kWarpLanes) {
    FinishedPath path{-1, -1, 0};
    float share = 0.0f;
    if (first + lane < beam.complete) {
      path = complete[first + lane].path;
      share = expf(complete[first + lane].score - beam.mass.most) / beam.mass.sum;
    }
    int32_t label = path.label, node = path.parent;
    for (int depth = 0; __any_sync(~0u, depth < path.length); ++depth) {
      bool counts = depth < path.length;
      if (counts && rules.options.order == Order::kFree) {  // a label may stand there twice
        int32_t after = path.label, at = path.parent;
        for (int d = 0; d < depth && counts; ++d) {
          counts = after != label;
          after = head.node_label[at];
          at = head.node_parent[at];
        }
      }
      for (uint32_t left = __ballot_sync(~0u, counts); left != 0; left &= left - 1) {
        const int from = __ffs(static_cast<int>(left)) - 1;
        const int32_t of_path = __shfl_sync(~0u, label, from);
        const float its_share = __shfl_sync(~0u, share, from);
        if (of_path % kWarpLanes == lane) marginals[of_path] += its_share;
      }
      if (depth + 1 < path.length) {
        label = head.node_label[node];
        node = head.node_parent[node];
      }
    }
  }
}

}  // namespace cnnrnn
