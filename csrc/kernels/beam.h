// What decides in a search: one image's beam between two steps. Host and device.
//
// Scoring labels and choosing among them is for each implementation to do in its own way; which
// paths end, live on, are dropped or need a state is here, once.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/math.h"
#include "kernels/search.h"
#include "kernels/topn.h"

namespace cnnrnn {

// In marginal mode the search goes on until less probability than this is unfinished.
constexpr float kLiveMassFloor = 1e-3f;

// A path of at least one label is its prefix `parent` and its last label; the empty one is {-1,
// -1}.
struct LivePath {
  float score;
  int32_t parent;
  int32_t label;
};

struct FinishedPath {
  int32_t parent;
  int32_t label;
  int32_t length;
};

template <int kCapacity>
using FinishedPaths = TopN<FinishedPath, kCapacity>;
template <int kCapacity>
using Extensions = TopN<Extension, kCapacity>;

// The live paths of an image, best first, and its finished ones; room for a beam of kCapacity.
template <int kCapacity>
struct Beam {
  CNNRNN_METHOD explicit Beam(int beam_size) : done(beam_size) { live[0] = {0.0f, -1, -1}; }

  int64_t step = 0;       // labels on each live path
  bool accepting = true;  // false once a literal stop has fixed the result
  int live_count = 1;
  LivePath live[kCapacity];
  FinishedPaths<kCapacity> done;
};

// Below, `Paths` is a Beam or its like.

// What a step finds out about a live path.
struct PathStep {
  enum class Kind : int8_t { kScored, kOnlyEnds, kMissing, kNotFinite };
  Kind kind;
  int32_t node;  // its prefix, where that has a state
  float log_sum_exp;
  float end_score;
};

struct BeamRules {
  SearchOptions options;
  int64_t num_labels;  // L
  bool keep_all;       // marginals: no live path is dropped
};

CNNRNN_INLINE bool end_allowed(const BeamRules& rules, int64_t length) {
  return length >= rules.options.min_labels;
}

CNNRNN_INLINE int64_t first_allowed(const BeamRules& rules, const LivePath& path) {
  return rules.options.order == Order::kIncreasing ? path.label + 1 : 0;
}

// Whether labels that a path holds are left out of what follows it; `counting`: of what marginals
// count, where a label that may follow again is left out too.
CNNRNN_INLINE bool leaves_out_held(const BeamRules& rules, bool counting) {
  return counting ? rules.options.order != Order::kIncreasing
                  : rules.options.order == Order::kUnique;
}

// Whether a live path of this length is scored; END follows one that is not, at log-probability 0.
CNNRNN_INLINE bool is_scored(const BeamRules& rules, const LivePath& path, int64_t length) {
  if (length == rules.options.max_labels) return false;
  if (end_allowed(rules, length) || rules.options.order == Order::kFree) return true;
  return rules.options.order == Order::kUnique ? length < rules.num_labels
                                               : first_allowed(rules, path) < rules.num_labels;
}

// Live paths at or below this score can no longer change the returned paths.
template <int kCapacity>
CNNRNN_INLINE float dropped_at(const BeamRules& rules, bool accepting,
                               const FinishedPaths<kCapacity>& done) {
  if (!accepting) return INFINITY;
  return rules.options.stop == Stop::kNBest && done.full() ? done.worst() : -INFINITY;
}

// Offers the ends of a step's paths, where END takes no slot of the beam.
template <typename Paths, int kCapacity>
CNNRNN_INLINE void offer_ends(const BeamRules& rules, const Paths& beam, const PathStep* steps,
                              FinishedPaths<kCapacity>* done) {
  if (rules.options.end_takes_slot || !beam.accepting) return;
  for (int j = 0; j < beam.live_count; ++j) {
    if (steps[j].kind != PathStep::Kind::kScored && steps[j].kind != PathStep::Kind::kOnlyEnds) {
      continue;
    }
    const LivePath& path = beam.live[j];
    done->offer(steps[j].end_score,
                FinishedPath{path.parent, path.label, static_cast<int32_t>(beam.step)});
  }
}

// Offers the ends among the N best continuations, where END takes a slot.
template <typename Paths, int kPlaces, int kCapacity>
CNNRNN_INLINE void offer_chosen_ends(const BeamRules& rules, const Paths& beam,
                                     const Extensions<kPlaces>& best,
                                     FinishedPaths<kCapacity>* done) {
  if (!rules.options.end_takes_slot || !beam.accepting) return;
  for (int i = 0; i < best.size; ++i) {
    const Extension& extension = best.items[i];
    if (extension.label != rules.num_labels) continue;
    const LivePath& path = beam.live[extension.parent_rank];
    done->offer(best.scores[i],
                FinishedPath{path.parent, path.label, static_cast<int32_t>(beam.step)});
  }
}

// Whether no step may be taken before all its states are there.
CNNRNN_INLINE bool needs_all_states(const BeamRules& rules) {
  return rules.keep_all || rules.options.stop == Stop::kLiteral;
}

// Which missing states can still change the result, given the ends found without them: bit j for
// live path j. A patient search asks only for those that are needed whatever the others turn out to
// be: with each state an end comes that may make the next one needless. `best_case` is scratch.
template <int kCapacity>
CNNRNN_INLINE uint32_t states_needed(const BeamRules& rules, const Beam<kCapacity>& beam,
                                     const PathStep* steps, const FinishedPaths<kCapacity>& done,
                                     bool patient, FinishedPaths<kCapacity>* best_case) {
  uint32_t needed = 0;
  const float floor = needs_all_states(rules) ? -INFINITY : dropped_at(rules, beam.accepting, done);
  if (patient) *best_case = done;  // as if every state asked for ended its path for nothing
  for (int j = 0; j < beam.live_count; ++j) {
    if (steps[j].kind != PathStep::Kind::kMissing) continue;
    const float score = beam.live[j].score;
    const bool bounded = patient && !needs_all_states(rules);
    // At equal score its end could still go ahead of one of a later path.
    if (score < (bounded ? dropped_at(rules, beam.accepting, *best_case) : floor)) continue;
    needed |= uint32_t{1} << j;
    if (bounded) best_case->offer(score, FinishedPath{});
  }
  return needed;
}

// What a continuation must exceed to matter.
template <typename Paths, int kCapacity>
CNNRNN_INLINE float selection_floor(const BeamRules& rules, const Paths& beam,
                                    const FinishedPaths<kCapacity>& done) {
  if (rules.keep_all) return -INFINITY;
  return dropped_at(rules, beam.accepting, rules.options.end_takes_slot ? beam.done : done);
}

// Whether a path whose scores are not finite could have changed the result.
template <typename Paths, int kCapacity>
CNNRNN_INLINE bool is_nonfinite(const BeamRules& rules, const Paths& beam, const PathStep* steps,
                                const FinishedPaths<kCapacity>& done) {
  const float before = dropped_at(rules, beam.accepting, beam.done);
  const float after = dropped_at(rules, beam.accepting, done);
  for (int j = 0; j < beam.live_count; ++j) {
    if (steps[j].kind != PathStep::Kind::kNotFinite) continue;
    if (beam.live[j].score > before && beam.live[j].score >= after) return true;
  }
  return false;
}

template <int kCapacity>
CNNRNN_INLINE void drop_live_paths(const BeamRules& rules, Beam<kCapacity>* beam) {
  const float floor = dropped_at(rules, beam->accepting, beam->done);
  if (rules.keep_all) {
    float mass = 0.0f;
    for (int j = 0; j < beam->live_count; ++j) mass += expf(beam->live[j].score);
    const bool settled = beam->live_count > 0 && beam->live[0].score <= floor;
    if (mass < kLiveMassFloor && settled) beam->live_count = 0;
  } else {
    while (beam->live_count > 0 && beam->live[beam->live_count - 1].score <= floor) {
      --beam->live_count;
    }
  }
}

// Ends a step: `done` holds the paths finished so far, `best` the continuations that live on.
// `trace` [N, 2], or null, takes the parent's rank and the label of each.
template <int kCapacity>
CNNRNN_INLINE void take_step(const BeamRules& rules, const Extensions<kCapacity>& best,
                             const PathStep* steps, const FinishedPaths<kCapacity>& done,
                             Beam<kCapacity>* beam, int32_t* trace) {
  if (&done != &beam->done) beam->done = done;
  int count = 0;
  for (int i = 0; i < best.size; ++i) {
    const Extension& extension = best.items[i];
    if (extension.label == rules.num_labels) continue;
    beam->live[count++] = {best.scores[i], steps[extension.parent_rank].node, extension.label};
  }
  // The paper's rule: every intermediate path is less probable than all candidates.
  if (rules.options.stop == Stop::kLiteral && count > 0 && done.size > 0 &&
      beam->live[0].score < done.worst()) {
    beam->accepting = false;
  }
  beam->live_count = count;
  drop_live_paths(rules, beam);
  if (trace != nullptr) {
    for (int i = 0, j = 0; j < beam->live_count; ++i) {
      if (best.items[i].label == rules.num_labels) continue;
      trace[2 * j] = best.items[i].parent_rank;
      trace[2 * j + 1] = best.items[i].label;
      ++j;
    }
  }
  ++beam->step;
}

}  // namespace cnnrnn
