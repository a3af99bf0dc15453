// What the CPU searches share: taking a block of images step by step as far as the states allow.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "kernels/beam.h"
#include "kernels/cpu/head.h"
#include "kernels/cpu/loops.h"
#include "kernels/cpu/prefix_table.h"
#include "kernels/cpu/row_scorer.h"
#include "kernels/search.h"

namespace cnnrnn {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

enum class StepEnd { kGoesOn, kEnded, kWaits };

// Calls use(label) for the labels of a path, the last one first.
template <typename Use>
void for_labels_backwards(const PrefixTable& prefixes, const FinishedPath& path, Use use) {
  if (path.length > 0) use(path.label);
  int32_t node = path.parent;
  for (int32_t t = path.length - 2; t >= 0; --t, node = prefixes.parent(node)) {
    use(prefixes.last_label(node));
  }
}

// What one thread needs to search blocks of images. `Image` is a Beam or its like, with its index
// `image`; `Search`, which derives from this, decides what a step leads to: finish_step(Image&,
// PathStep* steps, float* const* scores), and may have a mark_nonfinite(Image&) of its own.
template <typename Search, typename Image>
class ImageBlocks {
 public:
  // At most `block_images` at a time, with at most `most_live` live paths each.
  ImageBlocks(CpuHead* head, const SearchOptions& options, const ImageEmbeddings& images,
              const SearchOutput& output, uint32_t stamp, int64_t block_images, int64_t most_live)
      : prefixes_(head->prefixes()),
        kernels_(head->kernels()),
        rules_{options, head->num_labels(), output.marginals != nullptr},
        output_(output),
        stamp_(stamp),
        L_(head->num_labels()),
        N_(options.beam_size),
        most_live_(most_live),
        scorer_(head, rules_, images, block_images, block_images * most_live),
        steps_(block_images * most_live),
        path_scores_(block_images * most_live) {}

  // Takes images as far as the states that are there allow.
  void run(Image** images, int64_t count) {
    active_.clear();
    for (int64_t slot = 0; slot < count; ++slot) {
      if (begin(*images[slot], slot)) active_.push_back({images[slot], slot});
    }
    while (!active_.empty()) {
      scorer_.clear();
      for (const Active& at : active_) look_up(*at.image, at.slot);
      scorer_.score(steps_.data(), path_scores_.data());
      size_t left = 0;
      for (const Active& at : active_) {
        const int64_t first = at.slot * most_live_;
        const StepEnd end = static_cast<Search*>(this)->finish_step(
            *at.image, steps_.data() + first, path_scores_.data() + first);
        if (end == StepEnd::kGoesOn) active_[left++] = at;
        if (end == StepEnd::kWaits) waiting.push_back(at.image);
      }
      active_.resize(left);
    }
  }

  std::vector<Image*> waiting;
  std::vector<uint64_t> missing;  // keys of the states that they wait for
  int64_t lookups = 0;
  int64_t nonfinite_images = 0;

 protected:
  // Moves the end of each scored path out of its scores, which are then those of labels; returns
  // how many there are.
  int take_ends(const Image& image, PathStep* steps, float* const* scores) const {
    int scored = 0;
    for (int j = 0; j < image.live_count; ++j) {
      PathStep& step = steps[j];
      const float path_score = image.live[j].score;
      if (step.kind == PathStep::Kind::kOnlyEnds) step.end_score = path_score;
      if (step.kind != PathStep::Kind::kScored) continue;
      ++scored;
      if (std::isnan(step.log_sum_exp)) {
        step.kind = PathStep::Kind::kNotFinite;
        continue;
      }
      step.end_score = path_score + step_log_prob(scores[j][L_], step.log_sum_exp);
      scores[j][L_] = -kInf;
    }
    return scored;
  }

  // Adds the probability of every label after every scored path that does not hold it. Nothing
  // reads a step's scores after this, which leaves out labels that a path holds.
  void add_marginals(const Image& image, const PathStep* steps, float* const* scores) const {
    float* sums = output_.marginals + image.image * L_;
    for (int j = 0; j < image.live_count; ++j) {
      if (steps[j].kind != PathStep::Kind::kScored) continue;
      const LivePath& path = image.live[j];
      if (rules_.options.order == Order::kFree && image.step > 0) {
        scorer_.forbid_held(path, scores[j]);
      }
      const int64_t from = scorer_.first_scored(path);
      kernels_.add_probabilities(sums + from, scores[j] + from, L_ - from, path.score,
                                 steps[j].log_sum_exp);
    }
  }

  // Where the decisions of an image's step go: [W, 2]; null where none are wanted.
  int32_t* trace_of(const Image& image) const {
    if (output_.trace == nullptr) return nullptr;
    const int64_t steps = rules_.options.max_labels + 1;
    return output_.trace + (image.image * steps + image.step) * output_.trace_width * 2;
  }

  void write_paths(const Image& image) const {
    const int64_t T = rules_.options.max_labels;
    for (int i = 0; i < image.done.size; ++i) {
      const FinishedPath& path = image.done.items[i];
      const int64_t row = image.image * N_ + i;
      output_.log_probs[row] = image.done.scores[i];
      output_.lengths[row] = path.length;
      int64_t* labels = output_.labels + row * T;
      for_labels_backwards(prefixes_, path,
                           [&, t = path.length](int32_t label) mutable { labels[--t] = label; });
    }
  }

  StepEnd mark_nonfinite(const Image& image) {
    std::fill_n(output_.log_probs + image.image * N_, N_, kNaN);
    if (rules_.keep_all) {
      std::fill_n(output_.marginals + image.image * L_, L_, kNaN);
      write_log_evidence(image, kNaN);
    }
    ++nonfinite_images;
    return StepEnd::kEnded;
  }

  void write_log_evidence(const Image& image, double value) const {
    if (output_.log_evidence == nullptr) return;
    output_.log_evidence[image.image] = static_cast<float>(value);
  }

  void ask_for(const LivePath& path) { missing.push_back(prefix_key(path.parent, path.label)); }

  const PrefixTable& prefixes_;
  const CpuKernels& kernels_;
  const BeamRules rules_;
  const SearchOutput& output_;
  const uint32_t stamp_;
  const int64_t L_, N_;

 private:
  struct Active {
    Image* image;
    int64_t slot;
  };

  // Prepares an image; false when it ended because a value is not finite.
  bool begin(Image& image, int64_t slot) {
    if (image.step == 0 && !scorer_.is_finite(image.image)) {
      static_cast<Search*>(this)->mark_nonfinite(image);
      return false;
    }
    scorer_.take_logits(slot, image.image);
    return true;
  }

  // Finds the states of an image's live paths and lists the rows to score.
  void look_up(const Image& image, int64_t slot) {
    const size_t rows_before = scorer_.size();
    bool any_missing = false;
    for (int j = 0; j < image.live_count; ++j) {
      const LivePath& path = image.live[j];
      PathStep& step = steps_[slot * most_live_ + j];
      if (!is_scored(rules_, path, image.step)) {
        step.kind = PathStep::Kind::kOnlyEnds;
        continue;
      }
      step.node =
          image.step == 0 ? PrefixTable::kRoot : prefixes_.find(path.parent, path.label, stamp_);
      if (step.node < 0) {
        step.kind = PathStep::Kind::kMissing;
        any_missing = true;
        continue;
      }
      step.kind = PathStep::Kind::kScored;
      scorer_.add(image.image, slot, slot * most_live_ + j, path, image.step, step.node);
    }
    // It waits anyhow.
    if (any_missing && needs_all_states(rules_)) scorer_.drop_after(rows_before);
  }

  const int64_t most_live_;

 protected:
  RowScorer scorer_;

 private:
  std::vector<PathStep> steps_;      // [images, most_live]
  std::vector<float*> path_scores_;  // [images, most_live]; [stride] each, where a path is scored
  std::vector<Active> active_;
};

}  // namespace cnnrnn
