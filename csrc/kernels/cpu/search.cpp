// Beam search on the CPU: blocks of images step by step, the prefixes they share made together.
//
// A live path is a prefix and its last label. An image's step is scored when the states of its live
// paths are there; an image that needs states which are not there waits. When all images have
// ended or wait, the missing states of all of them are made at once, each once, and those images go
// on. What is arithmetic is behind CpuKernels, compiled per instruction set; here is what decides.
//
// A waiting image first scores the paths whose states are there: their END raises the score that a
// result needs, and a path below it can change nothing any more (scores only fall), so its state is
// not made. Most states that a search could ask for are saved this way.

#include "kernels/search.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/beam.h"
#include "kernels/cpu/bank_search.h"
#include "kernels/cpu/head.h"
#include "kernels/cpu/image_blocks.h"
#include "kernels/cpu/prefix_table.h"
#include "kernels/cpu/slices.h"

namespace cnnrnn {
namespace {

// States of so few images are bound by reading the weights: better all at once.
constexpr int64_t kPatientImages = 16;

// An image between two steps.
struct BeamImage : Beam<kMaxBeamSize> {
  BeamImage(int64_t index, int beam_size) : Beam(beam_size), image(index) {}

  int64_t image;
  double mass = 0.0;  // of the paths that ended, in a search for marginals
};

// The search where nothing is known: one beam of N.
class BeamSearch : public ImageBlocks<BeamSearch, BeamImage> {
 public:
  using Image = BeamImage;
  using FinishedPaths = cnnrnn::FinishedPaths<kMaxBeamSize>;
  using Extensions = cnnrnn::Extensions<kMaxBeamSize>;

  // A patient search asks only for states that are needed in any case.
  BeamSearch(CpuHead* head, const SearchOptions& options, const ImageEmbeddings& images,
             const SearchOutput& output, uint32_t stamp, int64_t block_images, int64_t most_live,
             bool patient)
      : ImageBlocks(head, options, images, output, stamp, block_images, most_live),
        patient_(patient) {}

  StepEnd finish_step(BeamImage& beam, PathStep* steps, float* const* scores) {
    if (needs_all_states(rules_) && waits_for_states(beam, steps, beam.done)) {
      return StepEnd::kWaits;
    }
    const int scored = take_ends(beam, steps, scores);
    FinishedPaths done = beam.done;
    offer_ends(rules_, beam, steps, &done);
    if (!rules_.options.end_takes_slot && waits_for_states(beam, steps, done)) {
      return StepEnd::kWaits;
    }
    Extensions best(static_cast<int>(N_));
    const float floor = selection_floor(rules_, beam, done);
    for (int j = 0; j < beam.live_count; ++j) {
      const PathStep& step = steps[j];
      if (step.kind != PathStep::Kind::kScored && step.kind != PathStep::Kind::kOnlyEnds) continue;
      if (step.kind == PathStep::Kind::kScored) {
        kernels_.select(scores[j], scorer_.first_scored(beam.live[j]), scorer_.stride(),
                        beam.live[j].score, step.log_sum_exp, floor, j, &best);
      }
      if (rules_.options.end_takes_slot) {
        best.offer(step.end_score, Extension{j, static_cast<int32_t>(L_)});
      }
    }
    offer_chosen_ends(rules_, beam, best, &done);
    if (rules_.options.end_takes_slot && waits_for_states(beam, steps, done)) {
      return StepEnd::kWaits;
    }
    lookups += scored;
    if (is_nonfinite(rules_, beam, steps, done)) return mark_nonfinite(beam);
    if (rules_.keep_all) {
      add_marginals(beam, steps, scores);
      add_mass(beam, steps, best);
    }
    take_step(rules_, best, steps, done, &beam, trace_of(beam));
    for (int j = 0; j < beam.live_count; ++j) {
      prefixes_.prefetch(beam.live[j].parent, beam.live[j].label);
    }
    if (beam.live_count > 0) return StepEnd::kGoesOn;
    write_paths(beam);
    if (rules_.keep_all) write_log_evidence(beam, std::log(beam.mass));
    return StepEnd::kEnded;
  }

 private:
  // Asks for what is needed of the states that are missing; false when nothing is.
  bool waits_for_states(const BeamImage& beam, const PathStep* steps, const FinishedPaths& done) {
    FinishedPaths best_case(static_cast<int>(N_));
    const uint32_t needed = states_needed(rules_, beam, steps, done, patient_, &best_case);
    for (int j = 0; j < beam.live_count; ++j) {
      if ((needed >> j & 1) != 0) ask_for(beam.live[j]);
    }
    return needed != 0;
  }

  // Adds the probability of the paths that end in this step, in or out of the N best.
  void add_mass(BeamImage& beam, const PathStep* steps, const Extensions& best) const {
    if (rules_.options.end_takes_slot) {
      for (int i = 0; i < best.size; ++i) {
        if (best.items[i].label == L_) beam.mass += std::exp(static_cast<double>(best.scores[i]));
      }
      return;
    }
    for (int j = 0; j < beam.live_count; ++j) {
      const PathStep& step = steps[j];
      if (step.kind != PathStep::Kind::kScored && step.kind != PathStep::Kind::kOnlyEnds) continue;
      beam.mass += std::exp(static_cast<double>(step.end_score));
    }
  }

  const bool patient_;
};

// Present labels of an image, or -1 where nothing is known of it.
int64_t present_labels(const ImageEmbeddings& images, int64_t image, int64_t L) {
  const int8_t* evidence = evidence_of(images, image);
  if (evidence == nullptr) return -1;
  int64_t present = 0, known = 0;
  for (int64_t l = 0; l < L; ++l) {
    present += evidence[l] > 0;
    known += evidence[l] != 0;
  }
  return known == 0 ? -1 : present;
}

}  // namespace

SearchStats beam_search_cpu(CpuHead* head, const SearchOptions& given,
                            const ImageEmbeddings& images, const SearchOutput& output,
                            const ParallelFor& parallel_for) {
  SearchOptions options = given;
  options.places = std::max(options.places, options.beam_size);
  const int64_t N = options.beam_size, T = options.max_labels, B = images.batch;
  const int64_t L = head->num_labels();
  std::fill_n(output.labels, B * N * T, int64_t{-1});
  std::fill_n(output.lengths, B * N, int64_t{0});
  std::fill_n(output.log_probs, B * N, -kInf);
  if (output.marginals != nullptr) std::fill_n(output.marginals, B * L, 0.0f);
  if (output.trace != nullptr) {
    std::fill_n(output.trace, B * (T + 1) * output.trace_width * 2, -1);
  }

  // Images of which nothing is known are searched by one beam, the others bank by bank.
  std::vector<int64_t> of_one_beam, of_banks;
  int64_t most_present = 0;
  for (int64_t image = 0; image < B; ++image) {
    const int64_t present = present_labels(images, image, L);
    const bool one_beam = present < 0 && options.places == N;
    (one_beam ? of_one_beam : of_banks).push_back(image);
    most_present = std::max(most_present, present);
  }
  PrefixTable& prefixes = head->prefixes();
  SearchStats stats;
  // Paths of length T need no state, nor does the root a new one.
  const int64_t deepest = std::max<int64_t>(T - 1, 0);
  for_slices(&prefixes, of_one_beam.size(), N * deepest,
             [&](int64_t first, int64_t last, uint32_t stamp) {
               std::vector<BeamImage> slice;
               slice.reserve(last - first);
               for (int64_t i = first; i < last; ++i)
                 slice.emplace_back(of_one_beam[i], options.beam_size);
               search_slice<BeamSearch>(head, &slice, N, parallel_for, stamp, &stats,
                                        [&](int64_t block, int64_t count) {
                                          return BeamSearch(head, options, images, output, stamp,
                                                            block, N, count >= kPatientImages);
                                        });
             });
  const int64_t most_live = options.places * (most_present + 1);
  for_slices(&prefixes, of_banks.size(), most_live * deepest,
             [&](int64_t first, int64_t last, uint32_t stamp) {
               std::vector<BankedImage> slice;
               slice.reserve(last - first);
               for (int64_t i = first; i < last; ++i) {
                 slice.emplace_back(of_banks[i], options, evidence_of(images, of_banks[i]), L);
               }
               search_slice<BankSearch>(head, &slice, most_live, parallel_for, stamp, &stats,
                                        [&](int64_t block, int64_t) {
                                          return BankSearch(head, options, images, output, stamp,
                                                            block, most_live);
                                        });
             });
  return finished(stats, prefixes);
}

}  // namespace cnnrnn
