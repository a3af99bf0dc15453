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

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <vector>

#include "cpu_head.h"
#include "cpu_kernels.h"
#include "prefix_table.h"
#include "search.h"
#include "topn.h"

namespace cnnrnn {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
// In marginal mode the search goes on until less probability than this is unfinished.
constexpr float kLiveMassFloor = 1e-3f;

// A block's scores stay in the second-level cache, and its rows fill register tiles.
constexpr int64_t kBlockBytes = 128 << 10;
constexpr int64_t kBlockRows = 64;
constexpr int64_t kSliceImages = 4096;
constexpr int64_t kCacheLineFloats = 16;
// States of so few images are bound by reading the weights: better all at once.
constexpr int64_t kPatientImages = 16;

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

using FinishedPaths = TopN<FinishedPath, kMaxBeamSize>;

// An image between two steps.
struct ImageState {
  ImageState(int64_t image, int beam_size) : image(image), done(beam_size) {
    live[0] = {0.0f, -1, -1};
  }

  int64_t image;
  int64_t step = 0;       // labels on each live path
  bool accepting = true;  // false once a literal stop has fixed the result
  int live_count = 1;
  LivePath live[kMaxBeamSize];
  FinishedPaths done;
};

enum class Outcome { kGoesOn, kEnded, kWaits };

// What one thread needs to search blocks of images.
class BlockSearch {
 public:
  BlockSearch(CpuHead* head, const SearchOptions& options, const ImageEmbeddings& images,
              const SearchOutput& output, uint32_t stamp, int64_t block_images, bool patient)
      : head_(*head),
        prefixes_(head->prefixes()),
        kernels_(head->kernels()),
        options_(options),
        images_(images),
        output_(output),
        stamp_(stamp),
        L_(head->num_labels()),
        D_(head->joint_dim()),
        N_(options.beam_size),
        stride_(head->score_vectors() * kernels_.lanes),
        keep_all_(output.marginals != nullptr),
        needs_all_(keep_all_ || options.stop == Stop::kLiteral),
        patient_(patient),
        joint_(block_images * N_ * D_),
        scores_(block_images * N_ * stride_),
        logits_(images.label_logits == nullptr ? 0 : block_images * stride_),
        later_most_(images.label_logits == nullptr ? 0 : block_images * stride_),
        paths_(block_images * N_) {}

  // Takes images as far as the states that are there allow.
  void run(ImageState** images, int64_t count) {
    active_.clear();
    slot_states_.assign(images, images + count);
    for (int64_t slot = 0; slot < count; ++slot) {
      if (begin(*images[slot], slot)) active_.push_back({images[slot], slot});
    }
    while (!active_.empty()) {
      rows_.clear();
      for (const Active& at : active_) look_up(*at.state, at.slot);
      score_rows();
      size_t left = 0;
      for (const Active& at : active_) {
        const Outcome outcome = finish_step(*at.state, at.slot);
        if (outcome == Outcome::kGoesOn) active_[left++] = at;
        if (outcome == Outcome::kWaits) waiting.push_back(at.state);
      }
      active_.resize(left);
    }
  }

  std::vector<ImageState*> waiting;
  std::vector<uint64_t> missing;  // keys of the states that they wait for
  int64_t lookups = 0;
  int64_t nonfinite_images = 0;

 private:
  struct Active {
    ImageState* state;
    int64_t slot;
  };

  struct Row {
    const float* projected;  // U_o o of the path [D]
    int32_t slot;
    int32_t path;  // index into paths_
    int32_t first_vector;
  };

  // What a step finds out about a live path.
  struct PathStep {
    enum class Kind : int8_t { kScored, kOnlyEnds, kMissing, kNotFinite };
    Kind kind;
    int32_t node;   // its prefix, where it has a state
    float* scores;  // [stride], where it is scored
    float log_sum_exp;
    float end_score;
  };

  // Prepares an image; false when it ended because a value is not finite.
  bool begin(ImageState& s, int64_t slot) {
    const float* joint = images_.joint + s.image * D_;
    const float* logits =
        images_.label_logits == nullptr ? nullptr : images_.label_logits + s.image * (L_ + 1);
    if (s.step == 0) {
      if (!all_finite(joint, D_) || (logits != nullptr && !all_finite(logits, L_ + 1))) {
        mark_nonfinite(s);
        return false;
      }
    }
    if (logits != nullptr) {
      kernels_.take_logits(logits, L_ + 1, logits_.data() + slot * stride_,
                           later_most_.data() + slot * stride_);
    }
    return true;
  }

  static bool all_finite(const float* values, int64_t n) {
    constexpr uint32_t kExponent = 0x7f800000;
    uint32_t bad = 0;
    for (int64_t i = 0; i < n; ++i) {
      uint32_t value;
      std::memcpy(&value, values + i, sizeof value);
      bad |= (value & kExponent) == kExponent ? 1 : 0;
    }
    return bad == 0;
  }

  // Finds the states of an image's live paths and lists the rows to score.
  void look_up(ImageState& s, int64_t slot) {
    const size_t rows_before = rows_.size();
    bool any_missing = false;
    for (int j = 0; j < s.live_count; ++j) {
      const LivePath& path = s.live[j];
      PathStep& step = paths_[slot * N_ + j];
      step.scores = nullptr;
      if (s.step == options_.max_labels || !anything_may_follow(path, s.step)) {
        step.kind = PathStep::Kind::kOnlyEnds;
        continue;
      }
      step.node =
          s.step == 0 ? PrefixTable::kRoot : prefixes_.find(path.parent, path.label, stamp_);
      if (step.node < 0) {
        step.kind = PathStep::Kind::kMissing;
        any_missing = true;
        continue;
      }
      step.kind = PathStep::Kind::kScored;
      rows_.push_back({prefixes_.projected_output(step.node), static_cast<int32_t>(slot),
                       static_cast<int32_t>(slot * N_ + j),
                       static_cast<int32_t>(first_allowed(path) / kernels_.lanes)});
      for (int64_t d = 0; d < D_; d += kCacheLineFloats) {
        __builtin_prefetch(rows_.back().projected + d);
      }
    }
    if (any_missing && needs_all_) rows_.resize(rows_before);  // it waits in any case
  }

  // Equations 4 and 5 and the softmax's denominator for all rows. Rows that need their labels from
  // nearby on share tiles.
  void score_rows() {
    const int64_t rows = static_cast<int64_t>(rows_.size());
    order_rows();
    x_.resize(rows);
    y_.resize(rows);
    first_vector_.resize(rows);
    for (int64_t at = 0; at < rows; ++at) {
      const Row& row = rows_[order_[at]];
      float* total = joint_.data() + at * D_;
      const int64_t image = slot_states_[row.slot]->image;
      kernels_.activate_sum(head_.activation(), row.projected, images_.joint + image * D_, total,
                            D_);
      x_[at] = total;
      y_[at] = scores_.data() + at * stride_;
      first_vector_[at] = row.first_vector;
      paths_[row.path].scores = y_[at];
    }
    kernels_.product({rows, D_, head_.score_vectors(), x_.data(), head_.score_panels(),
                      head_.score_start(), y_.data(), first_vector_.data()});
    row_scores_.resize(rows);
    log_sum_exp_.resize(rows);
    for (int64_t at = 0; at < rows; ++at) {
      const Row& row = rows_[order_[at]];
      const ImageState& s = *slot_states_[row.slot];
      const LivePath& path = s.live[row.path - row.slot * N_];
      forbid(path, s.step, y_[at]);
      const int64_t from = first_scored(path);
      row_scores_[at] = {y_[at] + from, nullptr, nullptr, stride_ - from};
      if (images_.label_logits == nullptr) continue;
      row_scores_[at].logits = logits_.data() + row.slot * stride_ + from;
      // What is forbidden lies in the first vector alone.
      if (end_allowed(s.step) && (options_.order != Order::kUnique || s.step == 0)) {
        row_scores_[at].later_most = later_most_.data() + row.slot * stride_ + from;
      }
    }
    kernels_.finish_scores(row_scores_.data(), rows, log_sum_exp_.data());
    for (int64_t at = 0; at < rows; ++at) {
      paths_[rows_[order_[at]].path].log_sum_exp = log_sum_exp_[at];
    }
  }

  // Sorts rows by their first vector: a counting sort.
  void order_rows() {
    const size_t rows = rows_.size();
    order_.resize(rows);
    const int64_t vectors = head_.score_vectors();
    if (options_.order != Order::kIncreasing || vectors == 1) {
      for (size_t i = 0; i < rows; ++i) order_[i] = static_cast<int32_t>(i);
      return;
    }
    begins_.assign(vectors + 1, 0);
    for (const Row& row : rows_) ++begins_[row.first_vector + 1];
    for (int64_t v = 1; v <= vectors; ++v) begins_[v] += begins_[v - 1];
    for (size_t i = 0; i < rows; ++i) {
      order_[begins_[rows_[i].first_vector]++] = static_cast<int32_t>(i);
    }
  }

  Outcome finish_step(ImageState& s, int64_t slot) {
    PathStep* paths = paths_.data() + slot * N_;
    const auto is_missing = [&](int j) { return paths[j].kind == PathStep::Kind::kMissing; };
    if (needs_all_) {
      bool waits = false;
      for (int j = 0; j < s.live_count; ++j) waits |= is_missing(j) && ask_for(s.live[j]);
      if (waits) return Outcome::kWaits;
    }

    // A search without marginals has already dropped paths at or below this score.
    const float floor_before = dropped_at(s.accepting, s.done);
    FinishedPaths done = s.done;
    int scored = 0;
    for (int j = 0; j < s.live_count; ++j) {
      if (is_missing(j)) continue;
      const LivePath& path = s.live[j];
      PathStep& step = paths[j];
      if (step.kind == PathStep::Kind::kOnlyEnds) {
        step.end_score = path.score;
      } else {
        ++scored;
        if (std::isnan(step.log_sum_exp)) {
          step.kind = PathStep::Kind::kNotFinite;
          continue;
        }
        step.end_score = path.score + step_log_prob(step.scores[L_], step.log_sum_exp);
        step.scores[L_] = -kInf;  // what is left are labels
      }
      if (!options_.end_takes_slot && s.accepting) {
        done.offer(step.end_score, finished(path, s.step));
      }
    }
    if (!options_.end_takes_slot && waits_for_states(s, paths, done)) return Outcome::kWaits;

    // Of the extensions only those that may live on matter, except for marginals.
    Extensions best(static_cast<int>(N_));
    const float floor = keep_all_                 ? -kInf
                        : options_.end_takes_slot ? floor_before
                                                  : dropped_at(s.accepting, done);
    for (int j = 0; j < s.live_count; ++j) {
      const PathStep& step = paths[j];
      if (step.kind == PathStep::Kind::kMissing || step.kind == PathStep::Kind::kNotFinite)
        continue;
      const LivePath& path = s.live[j];
      if (step.kind == PathStep::Kind::kScored) {
        kernels_.select(step.scores, first_scored(path), stride_, path.score, step.log_sum_exp,
                        floor, j, &best);
      }
      if (options_.end_takes_slot) {
        best.offer(step.end_score, Extension{j, static_cast<int32_t>(L_)});
      }
    }
    if (options_.end_takes_slot) {
      if (s.accepting) {
        for (int i = 0; i < best.size; ++i) {
          const Extension& extension = best.items[i];
          if (extension.label != L_) continue;
          done.offer(best.scores[i], finished(s.live[extension.parent_rank], s.step));
        }
      }
      if (waits_for_states(s, paths, done)) return Outcome::kWaits;
    }

    lookups += scored;
    const float floor_after = dropped_at(s.accepting, done);
    for (int j = 0; j < s.live_count; ++j) {
      if (paths[j].kind != PathStep::Kind::kNotFinite) continue;
      // A path that can change nothing may be out of range.
      if (s.live[j].score <= floor_before || s.live[j].score < floor_after) continue;
      mark_nonfinite(s);
      return Outcome::kEnded;
    }
    if (keep_all_) add_marginals(s, paths);
    s.done = done;
    take_extensions(best, paths, &s);
    if (s.live_count > 0) return Outcome::kGoesOn;
    write_paths(s);
    return Outcome::kEnded;
  }

  static FinishedPath finished(const LivePath& path, int64_t length) {
    return {path.parent, path.label, static_cast<int32_t>(length)};
  }

  bool ask_for(const LivePath& path) {
    missing.push_back(prefix_key(path.parent, path.label));
    return true;
  }

  // Asks for missing states that can still change the result, given the ends found without them.
  // While many images wait, only for those that will be needed whatever the others turn out to be:
  // with each state an end comes that may make the next one needless, and asking again is cheap.
  bool waits_for_states(const ImageState& s, const PathStep* paths, const FinishedPaths& done) {
    const float floor = dropped_at(s.accepting, done);
    FinishedPaths best_case = done;  // as if every state asked for ended its path for nothing
    bool waits = false;
    for (int j = 0; j < s.live_count; ++j) {
      if (paths[j].kind != PathStep::Kind::kMissing) continue;
      const float score = s.live[j].score;
      // At equal score its end could still go ahead of one of a later path.
      if (score < (patient_ ? dropped_at(s.accepting, best_case) : floor)) continue;
      waits |= ask_for(s.live[j]);
      best_case.offer(score, FinishedPath{});
    }
    return waits;
  }

  // Writes -inf where `scores` belong to what may not follow, in the vectors that are scored.
  void forbid(const LivePath& path, int64_t length, float* scores) const {
    if (options_.order == Order::kIncreasing) {
      std::fill(scores + first_scored(path), scores + first_allowed(path), -kInf);
    } else if (options_.order == Order::kUnique && length > 0) {
      scores[path.label] = -kInf;
      for (int32_t at = path.parent; at != PrefixTable::kRoot; at = prefixes_.parent(at)) {
        scores[prefixes_.last_label(at)] = -kInf;
      }
    }
    if (!end_allowed(length)) scores[L_] = -kInf;
  }

  bool end_allowed(int64_t length) const { return length >= options_.min_labels; }

  bool anything_may_follow(const LivePath& path, int64_t length) const {
    if (end_allowed(length) || options_.order == Order::kFree) return true;
    return options_.order == Order::kUnique ? length < L_ : first_allowed(path) < L_;
  }

  int64_t first_allowed(const LivePath& path) const {
    return options_.order == Order::kIncreasing ? path.label + 1 : 0;
  }

  // The first label of the first vector that holds an allowed one.
  int64_t first_scored(const LivePath& path) const {
    return first_allowed(path) / kernels_.lanes * kernels_.lanes;
  }

  // Live paths at or below this score can no longer change the returned paths.
  float dropped_at(bool accepting, const FinishedPaths& done) const {
    if (!accepting) return kInf;
    return options_.stop == Stop::kNBest && done.full() ? done.worst() : -kInf;
  }

  void add_marginals(const ImageState& s, const PathStep* paths) {
    float* sums = output_.marginals + s.image * L_;
    for (int j = 0; j < s.live_count; ++j) {
      if (paths[j].kind != PathStep::Kind::kScored) continue;
      const int64_t from = first_scored(s.live[j]);
      kernels_.add_probabilities(sums + from, paths[j].scores + from, L_ - from, s.live[j].score,
                                 paths[j].log_sum_exp);
    }
  }

  void take_extensions(const Extensions& best, const PathStep* paths, ImageState* s) {
    Extension taken[kMaxBeamSize];
    int count = 0;
    for (int i = 0; i < best.size; ++i) {
      const Extension& extension = best.items[i];
      if (extension.label == L_) continue;
      s->live[count] = {best.scores[i], paths[extension.parent_rank].node, extension.label};
      prefixes_.prefetch(s->live[count].parent, extension.label);  // for the next step
      taken[count++] = extension;
    }
    // The paper's rule: every intermediate path is less probable than all candidates.
    if (options_.stop == Stop::kLiteral && count > 0 && s->done.size > 0 &&
        s->live[0].score < s->done.worst()) {
      s->accepting = false;
    }
    s->live_count = count;
    prune(s);
    if (output_.trace != nullptr) {
      int32_t* trace =
          output_.trace + (s->image * (options_.max_labels + 1) + s->step) * options_.beam_size * 2;
      for (int j = 0; j < s->live_count; ++j) {
        trace[2 * j] = taken[j].parent_rank;
        trace[2 * j + 1] = taken[j].label;
      }
    }
    ++s->step;
  }

  void prune(ImageState* s) const {
    const float floor = dropped_at(s->accepting, s->done);
    if (keep_all_) {
      float mass = 0.0f;
      for (int j = 0; j < s->live_count; ++j) mass += std::exp(s->live[j].score);
      const bool settled = s->live_count > 0 && s->live[0].score <= floor;
      if (mass < kLiveMassFloor && settled) s->live_count = 0;
    } else {
      while (s->live_count > 0 && s->live[s->live_count - 1].score <= floor) --s->live_count;
    }
  }

  void write_paths(const ImageState& s) {
    const int64_t T = options_.max_labels;
    for (int i = 0; i < s.done.size; ++i) {
      const FinishedPath& path = s.done.items[i];
      const int64_t row = s.image * N_ + i;
      output_.log_probs[row] = s.done.scores[i];
      output_.lengths[row] = path.length;
      int64_t* labels = output_.labels + row * T;
      if (path.length > 0) labels[path.length - 1] = path.label;
      int32_t node = path.parent;
      for (int64_t t = path.length - 2; t >= 0; --t, node = prefixes_.parent(node)) {
        labels[t] = prefixes_.last_label(node);
      }
    }
  }

  void mark_nonfinite(const ImageState& s) {
    std::fill_n(output_.log_probs + s.image * N_, N_, kNaN);
    if (keep_all_) std::fill_n(output_.marginals + s.image * L_, L_, kNaN);
    ++nonfinite_images;
  }

  CpuHead& head_;
  const PrefixTable& prefixes_;
  const CpuKernels& kernels_;
  const SearchOptions& options_;
  const ImageEmbeddings& images_;
  const SearchOutput& output_;
  const uint32_t stamp_;
  const int64_t L_, D_, N_;
  const int64_t stride_;         // floats per row of scores
  const bool keep_all_;          // marginals: no live path is dropped
  const bool needs_all_;         // every live path's state is needed
  const bool patient_;           // ask only for states that are needed in any case
  AlignedFloats joint_;          // [rows, D]
  AlignedFloats scores_;         // [rows, stride]
  AlignedFloats logits_;         // [images, stride]
  AlignedFloats later_most_;     // [images, stride]
  std::vector<PathStep> paths_;  // [images, N]
  std::vector<Active> active_;
  std::vector<ImageState*> slot_states_;
  std::vector<Row> rows_;
  std::vector<int32_t> order_, begins_, first_vector_;
  std::vector<const float*> x_;
  std::vector<float*> y_;
  std::vector<RowScores> row_scores_;
  std::vector<float> log_sum_exp_;
};

int64_t images_per_block(const CpuHead& head, const SearchOptions& options) {
  const int64_t row_bytes =
      head.score_vectors() * head.kernels().lanes * static_cast<int64_t>(sizeof(float));
  const int64_t rows = std::min(kBlockRows, kBlockBytes / row_bytes);
  return std::max<int64_t>(1, rows / options.beam_size);
}

// Searches images begin..end, whose prefixes fit into the table together.
void search_slice(CpuHead* head, const SearchOptions& options, const ImageEmbeddings& images,
                  const SearchOutput& output, const ParallelFor& parallel_for, int64_t begin,
                  int64_t end, uint32_t stamp, SearchStats* stats) {
  std::vector<ImageState> states;
  states.reserve(end - begin);
  std::vector<ImageState*> pending;
  pending.reserve(end - begin);
  for (int64_t image = begin; image < end; ++image) {
    states.emplace_back(image, options.beam_size);
    pending.push_back(&states.back());
  }
  while (!pending.empty()) {
    const int64_t count = static_cast<int64_t>(pending.size());
    const int64_t block = std::min(images_per_block(*head, options), count);
    const bool patient = count >= kPatientImages;
    std::mutex merging;
    std::vector<ImageState*> waiting;
    std::vector<uint64_t> missing;
    parallel_for((count + block - 1) / block, [&](int64_t first, int64_t last) {
      BlockSearch search(head, options, images, output, stamp, block, patient);
      for (int64_t at = first * block; at < std::min(last * block, count); at += block) {
        search.run(pending.data() + at, std::min(block, count - at));
      }
      const std::lock_guard lock(merging);
      waiting.insert(waiting.end(), search.waiting.begin(), search.waiting.end());
      missing.insert(missing.end(), search.missing.begin(), search.missing.end());
      stats->prefix_lookups += search.lookups;
      stats->nonfinite_images += search.nonfinite_images;
    });
    std::sort(missing.begin(), missing.end());
    missing.erase(std::unique(missing.begin(), missing.end()), missing.end());
    head->make_states(missing, stamp, parallel_for);
    stats->prefix_hits -= static_cast<int64_t>(missing.size());
    pending = std::move(waiting);
  }
}

}  // namespace

SearchStats beam_search_cpu(CpuHead* head, const SearchOptions& options,
                            const ImageEmbeddings& images, const SearchOutput& output,
                            const ParallelFor& parallel_for) {
  const int64_t N = options.beam_size;
  const int64_t T = options.max_labels;
  const int64_t B = images.batch;
  std::fill_n(output.labels, B * N * T, int64_t{-1});
  std::fill_n(output.lengths, B * N, int64_t{0});
  std::fill_n(output.log_probs, B * N, -kInf);
  if (output.marginals != nullptr) std::fill_n(output.marginals, B * head->num_labels(), 0.0f);
  if (output.trace != nullptr) std::fill_n(output.trace, B * (T + 1) * N * 2, -1);

  PrefixTable& prefixes = head->prefixes();
  // Paths of length T need no state, nor does the root a new one.
  const int64_t nodes_per_image = N * std::max<int64_t>(T - 1, 0);
  const int64_t image_bytes = std::max<int64_t>(1, nodes_per_image * prefixes.node_bytes());
  const int64_t slice =
      std::clamp<int64_t>(prefixes.byte_budget() / 4 / image_bytes, 1, kSliceImages);
  SearchStats stats;
  for (int64_t begin = 0; begin < B; begin += slice) {
    const int64_t end = std::min(begin + slice, B);
    const PrefixTable::Stay stay(&prefixes, (end - begin) * nodes_per_image);
    search_slice(head, options, images, output, parallel_for, begin, end, stay.stamp(), &stats);
  }
  stats.prefix_hits += stats.prefix_lookups;
  stats.prefix_nodes = prefixes.size();
  stats.prefix_parents = prefixes.parents();
  stats.prefix_bytes = prefixes.bytes();
  return stats;
}

}  // namespace cnnrnn
