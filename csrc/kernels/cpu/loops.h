// The inner loops of the CPU search, once per instruction set, behind function pointers.
//
// A file compiled for an instruction set holds these loops and nothing that the linker could share
// with another file: no standard containers, only static functions. Every sum has a fixed order,
// whatever rows stand beside a row, so a result does not depend on the batch it was computed in.
#pragma once

#include <cstdint>

#include "kernels/beam.h"
#include "kernels/math.h"

namespace cnnrnn {

// y[r, j] = start[j] + sum over k of x[r][k] w[k, j], in order of k. The columns of w lie in panels
// of `lanes` columns, zeros and starts past the last one: [vectors, K, lanes].
struct Product {
  int64_t rows;
  int64_t K;
  int64_t vectors;
  const float* const* x;  // `rows` pointers to [K]
  const float* panels;    // [vectors, K, lanes]
  const float* start;     // [vectors * lanes], or null for zeros
  float* const* y;        // `rows` pointers to [vectors * lanes]
  // Row r needs its vectors from first_vector[r] on, ascending in r; null for all of them. Earlier
  // ones may be left as they were.
  const int32_t* first_vector;
};

// The recurrent half of the gates of whatever follows `count` prefixes: the product of their states
// with the recurrent weights. Units come in tiles of `lanes`, the four gates of a tile side by
// side; widths are padded to whole tiles.
struct RecurrentGates {
  int64_t count;
  int64_t hidden_dim;            // H
  const float* hidden_panels;    // [tiles, H, 4, lanes]
  const float* const* fed_back;  // [H] each: what the recurrence reads of the prefix
  float* const* gates;           // [tiles, 4, lanes] each
};

// One step of the cell (equations 1 and 3) for new prefixes.
struct CellSteps {
  Cell cell;
  int64_t tiles;
  const float* const* input_gates;      // of the last label, biases included, [tiles, 4, lanes]
  const float* const* recurrent_gates;  // of the parent, [tiles, 4, lanes]
  const float* const* previous;         // the parent's cell, [tiles * lanes]
  float* const* output;                 // [tiles * lanes]
  float* const* next;                   // the cell, [tiles * lanes]
};

// Label scores of one path, from the first vector on that holds an allowed label. What is forbidden
// is -inf.
struct RowScores {
  float* scores;            // [n]
  const float* logits;      // [n] or null; shifted by the largest that is not forbidden when added
  const float* later_most;  // [lanes] largest logits after the first vector, or null where some of
                            // them are forbidden
  int64_t n;                // a multiple of lanes
};

struct CpuKernels {
  const char* name;
  int64_t lanes;  // floats per vector

  void (*product)(const Product& product);

  // total[d] = h(projected[d] + image[d]), equation 4.
  void (*activate_sum)(Activation activation, const float* projected, const float* image,
                       float* total, int64_t D);

  // Makes tiles first_tile..last_tile of every prefix's gates.
  void (*multiply_states)(const RecurrentGates& batch, int64_t first_tile, int64_t last_tile);

  // Makes the states first..last.
  void (*step_cells)(const CellSteps& steps, int64_t first, int64_t last);

  // Copies an image's logits, -inf after the last up to whole vectors. later_most[v, lanes] are the
  // largest logits of the vectors after v, lane by lane.
  void (*take_logits)(const float* from, int64_t count, float* logits, float* later_most);

  // Adds the logits to each row and makes the logarithm of the sum of its e^scores; NaN where a
  // score is NaN or the largest is not finite.
  void (*finish_scores)(const RowScores* rows, int64_t count, float* log_sum_exp);

  // Offers path_score + log-probability of every label from..n to `best`, in order, where it
  // exceeds `floor`. n - from is a multiple of lanes.
  void (*select)(const float* scores, int64_t from, int64_t n, float path_score, float log_sum_exp,
                 float floor, int32_t rank, Extensions<kMaxBeamSize>* best);
  void (*select_places)(const float* scores, int64_t from, int64_t n, float path_score,
                        float log_sum_exp, float floor, int32_t rank, Extensions<kMaxPlaces>* best);

  // sums[j] += e^(path_score + log-probability of j).
  void (*add_probabilities)(float* sums, const float* scores, int64_t n, float path_score,
                            float log_sum_exp);
};

// `name` is "portable", "avx2" or "avx512". Null where this build or this processor lacks it.
const CpuKernels* find_cpu_kernels(const char* name);

// The fastest that this processor has.
const CpuKernels& best_cpu_kernels();

}  // namespace cnnrnn
