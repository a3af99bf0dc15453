// The search where labels of an image are known: a beam for each number of present labels that a
// path still lacks, its bank. One beam would not do: prefixes that put off a present label look
// better and crowd out those that take it. Also where banks are wider than a beam, for marginals.
//
// Evidence says which complete paths are answers. It is applied after the softmax, so it makes no
// path more probable: an absent label is never taken, and while present ones are lacking neither is
// END, nor a label that leaves no way to them. Marginals come from the complete paths found.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/cpu/image_blocks.h"

namespace cnnrnn {

struct BankedPath : LivePath {
  int32_t bank;  // present labels that it lacks
};

// An image between two steps: a Beam's like. Live paths stand bank by bank, best first in each.
struct BankedImage {
  BankedImage(int64_t index, const SearchOptions& options, const int8_t* evidence, int64_t L)
      : image(index), live{{{0.0f, -1, -1}, 0}}, done(options.beam_size) {
    for (int32_t l = 0; evidence != nullptr && l < L; ++l) {
      if (evidence[l] > 0) present.push_back(l);
      if (evidence[l] < 0) absent.push_back(l);
    }
    live[0].bank = static_cast<int32_t>(present.size());
  }

  bool is_given() const { return !present.empty() || !absent.empty(); }

  int64_t image;
  int64_t step = 0;
  bool accepting = true;
  std::vector<int32_t> present, absent;  // labels, ascending
  int live_count = 1;
  std::vector<BankedPath> live;
  FinishedPaths<kMaxBeamSize> done;
  std::vector<FinishedPath> complete;  // all that ended, in a search for marginals
  std::vector<float> complete_scores;
};

class BankSearch : public ImageBlocks<BankSearch, BankedImage> {
 public:
  using Image = BankedImage;
  using ImageBlocks::ImageBlocks;

  StepEnd finish_step(BankedImage& image, PathStep* steps, float* const* scores) {
    if (needs_all_states(rules_) && waits(image, steps, -kInf)) return StepEnd::kWaits;
    const int scored = take_ends(image, steps, scores);
    for (int j = 0; j < image.live_count; ++j) {
      if (image.live[j].bank > 0) steps[j].end_score = -kInf;
    }
    FinishedPaths<kMaxBeamSize> done = image.done;
    offer_ends(rules_, image, steps, &done);
    if (!rules_.options.end_takes_slot &&
        waits(image, steps, dropped_at(rules_, image.accepting, done))) {
      return StepEnd::kWaits;
    }
    choose(image, steps, scores, selection_floor(rules_, image, done));
    offer_chosen_ends(rules_, image, banks_[0], &done);
    if (rules_.options.end_takes_slot &&
        waits(image, steps, dropped_at(rules_, image.accepting, done))) {
      return StepEnd::kWaits;
    }
    lookups += scored;
    if (is_nonfinite(rules_, image, steps, done)) return mark_nonfinite(image);
    if (rules_.keep_all) {
      if (!image.is_given()) add_marginals(image, steps, scores);
      collect_complete(image, steps);
    }
    take_step(image, steps, done);
    if (image.live_count > 0) return StepEnd::kGoesOn;
    write_paths(image);
    if (rules_.keep_all) write_evidence(image);
    return StepEnd::kEnded;
  }

 private:
  // Asks for the missing states of paths that score at least this; false when there are none.
  bool waits(const BankedImage& image, const PathStep* steps, float floor) {
    bool any = false;
    for (int j = 0; j < image.live_count; ++j) {
      if (steps[j].kind != PathStep::Kind::kMissing || image.live[j].score < floor) continue;
      ask_for(image.live[j]);
      any = true;
    }
    return any;
  }

  // Fills banks_ with the best continuations of each.
  void choose(const BankedImage& image, const PathStep* steps, float* const* scores, float floor) {
    const int places = rules_.options.places;
    banks_.assign(image.present.size() + 1, Extensions<kMaxPlaces>(places));
    for (int j = 0; j < image.live_count; ++j) {
      const PathStep& step = steps[j];
      const BankedPath& path = image.live[j];
      if (step.kind == PathStep::Kind::kScored) {
        const bool takes_only_present = offer_present(image, j, step, scores[j], floor);
        if (!takes_only_present) {
          for (const int32_t label : image.absent) scores[j][label] = -kInf;
          kernels_.select_places(scores[j], scorer_.first_scored(path), scorer_.stride(),
                                 path.score, step.log_sum_exp, floor, j, &banks_[path.bank]);
        }
      }
      const bool ends =
          step.kind == PathStep::Kind::kScored || step.kind == PathStep::Kind::kOnlyEnds;
      if (rules_.options.end_takes_slot && ends && path.bank == 0) {
        banks_[0].offer(step.end_score, Extension{j, static_cast<int32_t>(L_)});
      }
    }
  }

  // Offers a path's present labels to the bank below, and takes them and what leaves no way to them
  // out of its scores. Returns whether no other label may follow.
  bool offer_present(const BankedImage& image, int j, const PathStep& step, float* scores,
                     float floor) {
    const BankedPath& path = image.live[j];
    if (path.bank == 0) return false;
    Extensions<kMaxPlaces>* below = &banks_[path.bank - 1];
    const auto offer = [&](int32_t label) {
      const float score = path.score + step_log_prob(scores[label], step.log_sum_exp);
      if (score > floor) below->offer(score, Extension{j, label});
      scores[label] = -kInf;
    };
    if (rules_.options.order == Order::kIncreasing) {
      const int32_t lowest = image.present[image.present.size() - path.bank];
      offer(lowest);
      std::fill(scores + lowest, scores + L_, -kInf);
    } else {
      for (const int32_t label : image.present) {
        if (!holds(path, image.step, label)) offer(label);
      }
    }
    return rules_.options.max_labels - image.step == path.bank;
  }

  bool holds(const LivePath& path, int64_t length, int32_t label) const {
    bool found = false;
    for_labels_backwards(prefixes_, {path.parent, path.label, static_cast<int32_t>(length)},
                         [&](int32_t held) { found |= held == label; });
    return found;
  }

  void collect_complete(BankedImage& image, const PathStep* steps) const {
    const auto add = [&](float score, const LivePath& path) {
      image.complete.push_back({path.parent, path.label, static_cast<int32_t>(image.step)});
      image.complete_scores.push_back(score);
    };
    if (rules_.options.end_takes_slot) {
      for (int i = 0; i < banks_[0].size; ++i) {
        const Extension& extension = banks_[0].items[i];
        if (extension.label == L_) add(banks_[0].scores[i], image.live[extension.parent_rank]);
      }
      return;
    }
    for (int j = 0; j < image.live_count; ++j) {
      const bool ends =
          steps[j].kind == PathStep::Kind::kScored || steps[j].kind == PathStep::Kind::kOnlyEnds;
      if (ends && steps[j].end_score > -kInf) add(steps[j].end_score, image.live[j]);
    }
  }

  void take_step(BankedImage& image, const PathStep* steps,
                 const FinishedPaths<kMaxBeamSize>& done) {
    image.done = done;
    int32_t* trace = trace_of(image);
    next_.clear();
    float best = -kInf;
    ranks_.clear();
    for (size_t bank = 0; bank < banks_.size(); ++bank) {
      for (int i = 0; i < banks_[bank].size; ++i) {
        const Extension& extension = banks_[bank].items[i];
        if (extension.label == L_) continue;
        const float score = banks_[bank].scores[i];
        next_.push_back({{score, steps[extension.parent_rank].node, extension.label},
                         static_cast<int32_t>(bank)});
        ranks_.push_back(extension.parent_rank);
        best = std::max(best, score);
      }
    }
    if (rules_.options.stop == Stop::kLiteral && !next_.empty() && done.size > 0 &&
        best < done.worst()) {
      image.accepting = false;
    }
    const float floor = dropped_at(rules_, image.accepting, done);
    const bool all_go = rules_.keep_all && best <= floor && is_settled(image);
    image.live.clear();
    for (size_t i = 0; i < next_.size(); ++i) {
      if (all_go || (!rules_.keep_all && next_[i].score <= floor)) continue;
      if (trace != nullptr) {
        *trace++ = ranks_[i];
        *trace++ = next_[i].label;
      }
      prefixes_.prefetch(next_[i].parent, next_[i].label);
      image.live.push_back(next_[i]);
    }
    image.live_count = static_cast<int>(image.live.size());
    ++image.step;
  }

  // Whether hardly any probability is unfinished: of what fits the evidence, where labels are
  // known.
  bool is_settled(const BankedImage& image) const {
    float most = 0.0f;
    double found = 1.0, live = 0.0;
    if (image.is_given()) {
      most = largest(image);
      found = sum(image, most);
    }
    for (const BankedPath& path : next_) live += std::exp(static_cast<double>(path.score - most));
    return live < kLiveMassFloor * found;
  }

  static float largest(const BankedImage& image) {
    float most = -kInf;
    for (const float score : image.complete_scores) most = std::max(most, score);
    return most;
  }

  // Of the complete paths' probabilities, over e^most.
  static double sum(const BankedImage& image, float most) {
    double total = 0.0;
    for (const float score : image.complete_scores) {
      total += std::exp(static_cast<double>(score - most));
    }
    return total;
  }

  void write_evidence(const BankedImage& image) {
    const float most = largest(image);
    const double total = sum(image, most);
    write_log_evidence(image, image.complete.empty() ? -kInf : most + std::log(total));
    if (!image.is_given()) return;
    float* marginals = output_.marginals + image.image * L_;
    if (image.complete.empty()) {
      std::fill_n(marginals, L_, kNaN);
      return;
    }
    sums_.assign(L_, 0.0);
    for (size_t i = 0; i < image.complete.size(); ++i) {
      const double share = std::exp(static_cast<double>(image.complete_scores[i] - most)) / total;
      held_.clear();
      for_labels_backwards(prefixes_, image.complete[i],
                           [&](int32_t label) { held_.push_back(label); });
      std::sort(held_.begin(), held_.end());  // in order free a label may stand there twice
      held_.erase(std::unique(held_.begin(), held_.end()), held_.end());
      for (const int32_t label : held_) sums_[label] += share;
    }
    std::copy(sums_.begin(), sums_.end(), marginals);
  }

  std::vector<Extensions<kMaxPlaces>> banks_;  // by what is lacking
  std::vector<BankedPath> next_;
  std::vector<int32_t> ranks_, held_;
  std::vector<double> sums_;
};

}  // namespace cnnrnn
