// The inner loops of the CPU search, once per instruction set, behind function pointers.
//
// A file compiled for an instruction set holds these loops and nothing that the linker could share
// with another file: no standard containers, only static functions. Sums have a fixed order, so a
// result does not depend on what was computed before or beside it.
#pragma once

#include <cstdint>

#include "math.h"

namespace cnnrnn {

struct CpuKernels {
  const char* name;

  // y[j] = start[j] + sum over k of x[k] w[k, j], in order of k. `start` may be null (zeros) or y.
  void (*affine)(const float* x, int64_t K, const float* w, int64_t row_stride, const float* start,
                 float* y, int64_t n);

  // total[d] = h(projected[d] + image[d]), equation 4.
  void (*activate_sum)(Activation activation, const float* projected, const float* image,
                       float* total, int64_t D);

  // One step of the cell from its four gates [4H]; `previous` is null before the first step.
  void (*cell_step)(Cell cell, const float* gates, const float* previous, float* output,
                    float* next, int64_t H);

  // The largest of n values, -inf for none; NaN is passed over.
  float (*largest)(const float* values, int64_t n);

  // Turns scores, -inf where forbidden, into path_score + log-probabilities. False, with the scores
  // undefined, where one is NaN or the largest is not finite.
  bool (*log_softmax)(float* scores, int64_t n, float path_score);

  // sums[j] += e^scores[j].
  void (*add_exponentials)(float* sums, const float* scores, int64_t n);

  // The first index from `from` on whose value exceeds `bound`; n where there is none.
  int64_t (*find_above)(const float* values, int64_t from, int64_t n, float bound);
};

// `name` is "portable", "avx2" or "avx512". Null where this build or this processor lacks it.
const CpuKernels* find_cpu_kernels(const char* name);

// The fastest that this processor has.
const CpuKernels& best_cpu_kernels();

}  // namespace cnnrnn
