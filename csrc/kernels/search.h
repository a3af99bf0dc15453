// The contract of the beam search: parameter structs and entry points. No torch, no Python.
//
// Letters: B images, T longest path, N beam size, L labels (END not counted), H recurrent width,
// D joint width. All arrays are dense, row-major and owned by the caller. What the search computes
// is stated in docs/search.md and, in code to be read beside the paper, in
// cnnrnn/search/reference.py.
#pragma once

#include <cstdint>

#include "math.h"

namespace cnnrnn {

constexpr int kMaxBeamSize = 16;

enum class Order { kIncreasing, kUnique, kFree };
enum class Stop { kNBest, kLiteral };

struct HeadTables {
  int64_t num_labels;  // L
  int64_t joint_dim;   // D
  int64_t hidden_dim;  // H
  Cell cell;
  Activation activation;
  const float* score_weight;   // [D, L+1]  label embedding, transposed; END is column L
  const float* score_bias;     // [L+1]     or null
  const float* input_gates;    // [L+1, 4H] U_w w plus the biases; row L belongs to START
  const float* hidden_weight;  // [H, 4H]   U_r, transposed
  const float* output_weight;  // [H, D]    U_o, transposed
};

struct SearchOptions {
  int beam_size;       // N, 1..kMaxBeamSize
  int64_t max_labels;  // T
  int64_t min_labels;
  Order order;
  bool end_takes_slot;
  Stop stop;
};

struct ImageEmbeddings {
  int64_t batch;              // B
  const float* joint;         // [B, D]
  const float* label_logits;  // [B, L+1] or null
};

struct SearchOutput {
  int64_t* labels;   // [B, N, T] padded with -1
  int64_t* lengths;  // [B, N]
  float* log_probs;  // [B, N]    -inf where a path is absent; NaN marks a non-finite image
  float* marginals;  // [B, L]    or null
  // Decisions of every step, for tests that replay a search: rank j of step t holds the parent's
  // rank and the label of the j-th live path after that step, or -1.
  int32_t* trace;  // [B, T+1, N, 2] or null
};

struct SearchStats {
  int64_t prefix_lookups = 0;  // live paths that needed a recurrent state
  int64_t prefix_hits = 0;     // of those, states that were already there
  int64_t prefix_nodes = 0;    // label prefixes held at the end of the call
  int64_t prefix_bytes = 0;    // memory of those nodes
};

struct CpuKernels;  // cpu_kernels.h
class PrefixTable;  // prefix_table.h

// Finds the N best label paths of every image, on the calling thread, which holds `prefixes`. The
// table must have been used with these head tables and kernels alone.
SearchStats beam_search_cpu(const CpuKernels& kernels, const HeadTables& head,
                            const SearchOptions& options, const ImageEmbeddings& images,
                            PrefixTable* prefixes, const SearchOutput& output);

}  // namespace cnnrnn
