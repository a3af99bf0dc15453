// The contract of the beam search: parameter structs and entry points. No torch, no Python.
//
// Letters: B images, T longest path, N beam size, L labels (END not counted), H recurrent width,
// D joint width. All arrays are dense, row-major and owned by the caller. What the search computes
// is stated in docs/search.md and, in code to be read beside the paper, in
// cnnrnn/search/reference.py.
#pragma once

#include <cstdint>
#include <functional>
#include <utility>

#include "kernels/math.h"

namespace cnnrnn {

constexpr int kMaxBeamSize = 16;
constexpr int kMaxPlaces = 64;
constexpr int kMaxCudaPaths = 32;  // live paths of an image on a GPU, all banks together

enum class Order { kIncreasing, kUnique, kFree };
enum class Stop { kNBest, kLiteral };
enum class Precision { kExact, kFast };  // of label scores on a GPU; the CPU's are exact

// A head's parameters as torch lays them out.
struct HeadWeights {
  int64_t num_labels;  // L
  int64_t joint_dim;   // D
  int64_t hidden_dim;  // H
  Cell cell;
  Activation activation;
  const float* label_embedding;    // [L+2, D] labels, END, START
  const float* input_embedding;    // [L+2, D] what the recurrence reads; null: label_embedding
  const float* score_bias;         // [L+1]    or null
  const float* input_weight;       // [4H, D]  U_w
  const float* hidden_weight;      // [4H, H]  U_r
  const float* input_bias;         // [4H]     or null
  const float* hidden_bias;        // [4H]     or null
  const float* output_projection;  // [D, H]   U_o
};

// The rows that the recurrence reads: [L+2, D].
inline const float* input_rows(const HeadWeights& weights) {
  return weights.input_embedding == nullptr ? weights.label_embedding : weights.input_embedding;
}

struct SearchOptions {
  int beam_size;       // N, 1..kMaxBeamSize
  int64_t max_labels;  // T
  int64_t min_labels;
  Order order;
  bool end_takes_slot;
  Stop stop;
  Precision precision = Precision::kExact;
  int places = 0;  // live paths of a bank, N..kMaxPlaces; 0: N
};

struct ImageEmbeddings {
  int64_t batch;              // B
  const float* joint;         // [B, D]
  const float* label_logits;  // [B, L+1] or null
  // What is known of labels: 1 present, -1 absent, 0 unknown; image b's at evidence + b *
  // evidence_stride [L]. Or null. Present labels are at most T.
  const int8_t* evidence = nullptr;
  int64_t evidence_stride = 0;  // L, or 0 where all images share one
};

// What is known of an image's labels [L]; null where nothing is of any.
inline const int8_t* evidence_of(const ImageEmbeddings& images, int64_t image) {
  return images.evidence == nullptr ? nullptr : images.evidence + image * images.evidence_stride;
}

struct SearchOutput {
  int64_t* labels;   // [B, N, T] padded with -1
  int64_t* lengths;  // [B, N]
  float* log_probs;  // [B, N]    -inf where a path is absent; NaN marks a non-finite image
  float* marginals;  // [B, L]    that a path holds a label; or null
  // [B] logarithm of the probability of all complete paths found, with marginals; or null
  float* log_evidence;
  // Decisions of every step, for tests that replay a search: rank j of step t holds the parent's
  // rank and the label of the j-th live path after that step, or -1.
  int32_t* trace;           // [B, T+1, W, 2] or null
  int64_t trace_width = 0;  // W, at least the live paths of any image
};

struct SearchStats {
  int64_t prefix_lookups = 0;    // scored live paths: each needed a recurrent state
  int64_t prefix_hits = 0;       // of those, states that this call did not have to make
  int64_t prefix_nodes = 0;      // label prefixes held at the end of the call
  int64_t prefix_parents = 0;    // of those, prefixes that were extended
  int64_t prefix_bytes = 0;      // memory of all that is held
  int64_t nonfinite_images = 0;  // images that were marked
};

// Of making missing states, where the search cannot look how many it takes.
constexpr int64_t kAllRounds = -1;

using Work = std::function<void(int64_t begin, int64_t end)>;

// Threads that a caller lends.
class ParallelFor {
 public:
  using Run = std::function<void(int64_t n, const Work& work)>;

  // run(n, work) calls work(begin, end) on parts of 0..n, perhaps on several threads, and returns
  // when all ended. stopped() says, in any of them, that the caller wants no more: work then leaves
  // out what is left, and run throws. A search passes that on, and its head stays good.
  ParallelFor(Run run, std::function<bool()> stopped)
      : run_(std::move(run)), stopped_(std::move(stopped)) {}
  template <typename Function>
  ParallelFor(Function run) : run_(std::move(run)) {}  // NOLINT: a function is one

  void operator()(int64_t n, const Work& work) const { run_(n, work); }
  bool stopped() const { return stopped_ && stopped_(); }

 private:
  Run run_;
  std::function<bool()> stopped_;
};

inline void on_this_thread(int64_t n, const Work& work) {
  if (n > 0) work(0, n);
}

class CpuHead;  // cpu/head.h

// The most probable label sets, for a search along increasing paths that proves what it finds.
struct SetsWanted {
  int64_t count;       // K
  int64_t max_labels;  // T
  int64_t min_labels;
  float least;             // sets of a lower log-probability are not wanted
  int64_t max_expansions;  // prefixes of an image that are scored, at most
};

struct SetsFound {
  int64_t* labels;      // [B, K, T] padded with -1
  int64_t* lengths;     // [B, K]
  float* log_probs;     // [B, K] descending; -inf past the last, NaN marks a non-finite image
  int64_t* proved;      // [B] the first so many are the most probable sets
  bool* ended;          // [B] no further set is left that is wanted
  int64_t* expansions;  // [B]
};

// Finds the N best label paths of every image. Safe to call from several threads with one head;
// the result depends on neither the number of threads nor what the head has kept.
SearchStats beam_search_cpu(CpuHead* head, const SearchOptions& options,
                            const ImageEmbeddings& images, const SearchOutput& output,
                            const ParallelFor& parallel_for);

// Finds the K most probable label sets of every image. Safe to call as beam_search_cpu is.
SearchStats best_sets_cpu(CpuHead* head, const SetsWanted& wanted, const ImageEmbeddings& images,
                          const SetsFound& found, const ParallelFor& parallel_for);

}  // namespace cnnrnn
