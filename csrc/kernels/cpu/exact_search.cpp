// The most probable label sets with a proof: best first over label prefixes.
//
// A prefix's score bounds that of every set it begins, since scores only fall. So a complete path
// that comes off the queue before any prefix is the best one left. A scored prefix puts its best
// kChildren continuations into the queue, and one item that stands for all the others.

#include <algorithm>
#include <cmath>
#include <queue>
#include <vector>

#include "kernels/cpu/head.h"
#include "kernels/cpu/image_blocks.h"
#include "kernels/cpu/slices.h"
#include "kernels/search.h"

namespace cnnrnn {
namespace {

constexpr int kChildren = 16;
// Room is set aside for the states of so many prefixes of an image; the few that need more are
// searched again with room for more.
constexpr int64_t kUsualExpansions = 32;
constexpr int64_t kMoreExpansions = 8;  // times as many

struct QueueItem {
  float score;  // of the prefix or path; of the best continuation that is left
  enum class Kind : int8_t { kComplete, kPrefix, kOthers } kind;
  LivePath path;
  int32_t length;
  int32_t bank;        // labels known to be present that it lacks
  float path_score;    // kOthers: of the prefix, whose continuations up to
  int32_t last_child;  // this label at `score` have been taken

  // Of equal score, what ends comes first, then the shorter, then the lower label.
  bool operator<(const QueueItem& other) const {
    if (score != other.score) return score < other.score;
    if (kind != other.kind) return kind > other.kind;
    if (length != other.length) return length > other.length;
    return path.label > other.path.label;
  }
};

// An image between two expansions: a Beam's like with one live path, the prefix that is expanded.
struct ExactImage {
  ExactImage(int64_t index, const int8_t* evidence, int64_t L) : image(index) {
    for (int32_t l = 0; evidence != nullptr && l < L; ++l) {
      if (evidence[l] > 0) present.push_back(l);
      if (evidence[l] < 0) absent.push_back(l);
    }
    now = {0.0f,
           QueueItem::Kind::kPrefix,
           {0.0f, -1, -1},
           0,
           static_cast<int32_t>(present.size()),
           0.0f,
           -1};
    live[0] = now.path;
  }

  int64_t image;
  int64_t step = 0;  // labels on the prefix
  int live_count = 1;
  LivePath live[1];
  QueueItem now;
  std::vector<int32_t> present, absent;  // labels, ascending
  std::priority_queue<QueueItem> queue;
  std::vector<QueueItem> found;      // complete, best first
  std::vector<float> best_complete;  // a heap of the best scores of complete paths, worst on top
  int64_t expansions = 0;
  bool ended = false;  // nothing wanted is left
  bool nonfinite = false;
};

class ExactSearch : public ImageBlocks<ExactSearch, ExactImage> {
 public:
  using Image = ExactImage;

  ExactSearch(CpuHead* head, const SearchOptions& options, const ImageEmbeddings& images,
              const SearchOutput& output, uint32_t stamp, int64_t block, const SetsWanted& wanted,
              int64_t max_expansions)
      : ImageBlocks(head, options, images, output, stamp, block, 1),
        wanted_(wanted),
        max_expansions_(max_expansions) {}

  StepEnd finish_step(ExactImage& image, PathStep* steps, float* const* scores) {
    PathStep& step = steps[0];
    if (step.kind == PathStep::Kind::kMissing) {
      ask_for(image.live[0]);
      return StepEnd::kWaits;
    }
    lookups += take_ends(image, steps, scores);
    if (step.kind == PathStep::Kind::kNotFinite) return mark_nonfinite(image);
    ++image.expansions;
    expand(image, step, scores[0]);
    return next(image) ? StepEnd::kGoesOn : StepEnd::kEnded;
  }

  StepEnd mark_nonfinite(ExactImage& image) {
    image.nonfinite = true;
    ++nonfinite_images;
    return StepEnd::kEnded;
  }

 private:
  // What a path must exceed to be among the sets that are wanted.
  float floor(const ExactImage& image) const {
    const bool full = static_cast<int64_t>(image.best_complete.size()) == wanted_.count;
    return full ? image.best_complete.front() : -kInf;
  }

  void push_complete(ExactImage& image, float score) const {
    if (!(score > -kInf) || score < wanted_.least) return;
    QueueItem item = image.now;
    item.score = score;
    item.kind = QueueItem::Kind::kComplete;
    image.queue.push(item);
    std::vector<float>& best = image.best_complete;
    best.push_back(score);
    std::push_heap(best.begin(), best.end(), std::greater<>());
    if (static_cast<int64_t>(best.size()) > wanted_.count) {
      std::pop_heap(best.begin(), best.end(), std::greater<>());
      best.pop_back();
    }
  }

  void expand(ExactImage& image, const PathStep& step, float* scores) {
    const QueueItem& now = image.now;
    const bool again = now.kind == QueueItem::Kind::kOthers;
    if (!again && now.bank == 0) push_complete(image, step.end_score);
    if (step.kind != PathStep::Kind::kScored) return;
    const int32_t lowest =
        now.bank > 0 ? image.present[image.present.size() - now.bank] : static_cast<int32_t>(L_);
    std::fill(scores + std::min<int64_t>(lowest + 1, L_), scores + L_, -kInf);
    for (const int32_t label : image.absent) scores[label] = -kInf;
    const int64_t from = scorer_.first_scored(now.path);
    if (now.bank > 0 && rules_.options.max_labels - now.length == now.bank) {
      std::fill(scores + from, scores + lowest, -kInf);
    }
    if (again) {  // those that were taken
      for (int64_t l = from; l < L_; ++l) {
        const float score = now.path_score + step_log_prob(scores[l], step.log_sum_exp);
        if (score > now.score || (score == now.score && l <= now.last_child)) scores[l] = -kInf;
      }
    }
    Extensions<kMaxPlaces> best(kChildren);
    const float least = std::max(floor(image), std::nextafter(wanted_.least, -kInf));
    kernels_.select_places(scores, from, scorer_.stride(), now.path_score, step.log_sum_exp, least,
                           0, &best);
    for (int i = 0; i < best.size; ++i) {
      const int32_t label = best.items[i].label;
      const float score = best.scores[i];
      image.queue.push({score,
                        QueueItem::Kind::kPrefix,
                        {score, step.node, label},
                        now.length + 1,
                        now.bank - (label == lowest),
                        score,
                        -1});
    }
    if (best.full()) {
      QueueItem others = now;
      others.kind = QueueItem::Kind::kOthers;
      others.score = best.worst();
      others.last_child = best.items[best.size - 1].label;
      image.queue.push(others);
    }
  }

  // Takes complete paths off the queue and makes the best prefix the live one; false when the image
  // has ended.
  bool next(ExactImage& image) const {
    while (!image.queue.empty() && static_cast<int64_t>(image.found.size()) < wanted_.count) {
      const QueueItem item = image.queue.top();
      if (item.kind != QueueItem::Kind::kComplete) {
        if (image.expansions == max_expansions_) return false;
        image.queue.pop();
        image.now = item;
        image.live[0] = item.path;
        image.live[0].score = item.path_score;
        image.step = item.length;
        return true;
      }
      image.queue.pop();
      image.found.push_back(item);
    }
    // With all that were wanted, sets below the last may have been left out.
    image.ended = image.queue.empty() && static_cast<int64_t>(image.found.size()) < wanted_.count;
    return false;
  }

  const SetsWanted& wanted_;
  const int64_t max_expansions_;
};

// Writes what was found, proved or not.
void write_sets(const PrefixTable& prefixes, ExactImage* image, const SetsWanted& wanted, int64_t T,
                const SetsFound& out) {
  const int64_t b = image->image;
  if (image->nonfinite) {
    std::fill_n(out.log_probs + b * wanted.count, wanted.count, kNaN);
    return;
  }
  out.proved[b] = static_cast<int64_t>(image->found.size());
  out.ended[b] = image->ended;
  out.expansions[b] = image->expansions;
  std::vector<QueueItem>& found = image->found;
  for (; static_cast<int64_t>(found.size()) < wanted.count && !image->queue.empty();
       image->queue.pop()) {
    if (image->queue.top().kind == QueueItem::Kind::kComplete) found.push_back(image->queue.top());
  }
  for (size_t i = 0; i < found.size(); ++i) {
    const QueueItem& item = found[i];
    const int64_t row = b * wanted.count + static_cast<int64_t>(i);
    out.log_probs[row] = item.score;
    out.lengths[row] = item.length;
    int64_t* labels = out.labels + row * T;
    for_labels_backwards(prefixes, {item.path.parent, item.path.label, item.length},
                         [&, t = item.length](int32_t label) mutable { labels[--t] = label; });
  }
}

}  // namespace

SearchStats best_sets_cpu(CpuHead* head, const SetsWanted& wanted, const ImageEmbeddings& images,
                          const SetsFound& out, const ParallelFor& parallel_for) {
  const int64_t B = images.batch, T = wanted.max_labels, L = head->num_labels();
  std::fill_n(out.labels, B * wanted.count * T, int64_t{-1});
  std::fill_n(out.lengths, B * wanted.count, int64_t{0});
  std::fill_n(out.log_probs, B * wanted.count, -kInf);
  for (int64_t* figures : {out.proved, out.expansions}) std::fill_n(figures, B, int64_t{0});
  std::fill_n(out.ended, B, false);
  SearchOptions options{};
  options.beam_size = 1;
  options.max_labels = T;
  options.min_labels = wanted.min_labels;
  options.order = Order::kIncreasing;
  options.stop = Stop::kNBest;
  const SearchOutput no_output{};
  PrefixTable& prefixes = head->prefixes();
  SearchStats stats;
  std::vector<int64_t> pending(B);
  for (int64_t b = 0; b < B; ++b) pending[b] = b;
  for (int64_t most = std::min(kUsualExpansions, wanted.max_expansions); !pending.empty();
       most = std::min(most * kMoreExpansions, wanted.max_expansions)) {
    std::vector<int64_t> further;
    for_slices(&prefixes, pending.size(), most, [&](int64_t first, int64_t last, uint32_t stamp) {
      std::vector<ExactImage> slice;
      slice.reserve(last - first);
      for (int64_t i = first; i < last; ++i) {
        slice.emplace_back(pending[i], evidence_of(images, pending[i]), L);
      }
      search_slice<ExactSearch>(
          head, &slice, 1, parallel_for, stamp, &stats, [&](int64_t block, int64_t) {
            return ExactSearch(head, options, images, no_output, stamp, block, wanted, most);
          });
      for (ExactImage& image : slice) {
        const bool cut = image.expansions == most && !image.ended &&
                         static_cast<int64_t>(image.found.size()) < wanted.count;
        if (cut && most < wanted.max_expansions) {
          further.push_back(image.image);
        } else {
          write_sets(prefixes, &image, wanted, T, out);
        }
      }
    });
    pending = std::move(further);
  }
  return finished(stats, prefixes);
}

}  // namespace cnnrnn
