// Loops of cpu_kernels.h, written so that compilers turn them into vector code at any width: fixed
// blocks of kLanes values side by side, no branches inside. Included once by each
// cpu_kernels_*.cpp, which sets the instruction set by its compiler flags.
//
// `affine` is where the time goes: a tile of kTile sums stays in registers (four 512-bit or eight
// 256-bit ones) while k runs, so each weight is read once and no sum is stored before its last
// term.

#include "cpu_kernels.h"

namespace cnnrnn {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kTile = 64;

template <int64_t kWidth>
inline void affine_tile(const float* __restrict x, int64_t K, const float* __restrict w,
                        int64_t row_stride, const float* start, float* y) {
  float sums[kWidth];
  for (int64_t j = 0; j < kWidth; ++j) sums[j] = start == nullptr ? 0.0f : start[j];
  for (int64_t k = 0; k < K; ++k) {
    const float* __restrict row = w + k * row_stride;
    for (int64_t j = 0; j < kWidth; ++j) sums[j] += x[k] * row[j];
  }
  for (int64_t j = 0; j < kWidth; ++j) y[j] = sums[j];
}

void affine(const float* x, int64_t K, const float* w, int64_t row_stride, const float* start,
            float* y, int64_t n) {
  int64_t j = 0;
  for (; j + kTile <= n; j += kTile) {
    affine_tile<kTile>(x, K, w + j, row_stride, start == nullptr ? nullptr : start + j, y + j);
  }
  for (; j + kLanes <= n; j += kLanes) {
    affine_tile<kLanes>(x, K, w + j, row_stride, start == nullptr ? nullptr : start + j, y + j);
  }
  for (; j < n; ++j) {
    affine_tile<1>(x, K, w + j, row_stride, start == nullptr ? nullptr : start + j, y + j);
  }
}

void activate_sum(Activation activation, const float* __restrict projected,
                  const float* __restrict image, float* __restrict total, int64_t D) {
  switch (activation) {
    case Activation::kRelu:
      for (int64_t d = 0; d < D; ++d) {
        total[d] = activate(Activation::kRelu, projected[d] + image[d]);
      }
      break;
    case Activation::kTanh:
      for (int64_t d = 0; d < D; ++d) {
        total[d] = activate(Activation::kTanh, projected[d] + image[d]);
      }
      break;
    default:
      for (int64_t d = 0; d < D; ++d) total[d] = projected[d] + image[d];
  }
}

void cell_step(Cell cell, const float* __restrict gates, const float* __restrict previous,
               float* __restrict output, float* __restrict next, int64_t H) {
  const float *first = gates, *second = gates + H, *third = gates + 2 * H, *fourth = gates + 3 * H;
  if (cell == Cell::kLstm) {
    for (int64_t u = 0; u < H; ++u) {
      const float before = previous == nullptr ? 0.0f : previous[u];
      lstm_unit(first[u], second[u], third[u], fourth[u], before, output + u, next + u);
    }
  } else {
    for (int64_t u = 0; u < H; ++u) {
      const float before = previous == nullptr ? 0.0f : previous[u];
      paper_unit(first[u], second[u], third[u], fourth[u], before, output + u, next + u);
    }
  }
}

float largest(const float* values, int64_t n) {
  float lanes[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) lanes[i] = -INFINITY;
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      lanes[i] = values[j + i] > lanes[i] ? values[j + i] : lanes[i];
    }
  }
  float best = -INFINITY;
  for (int64_t i = 0; i < kLanes; ++i) best = lanes[i] > best ? lanes[i] : best;
  for (; j < n; ++j) best = values[j] > best ? values[j] : best;
  return best;
}

bool log_softmax(float* scores, int64_t n, float path_score) {
  const float most = largest(scores, n);
  if (!(most > -INFINITY && most < INFINITY)) return false;
  float lanes[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] += exponential(scores[j + i] - most);
  }
  float sum = 0.0f;
  for (int64_t i = 0; i < kLanes; ++i) sum += lanes[i];
  for (; j < n; ++j) sum += exponential(scores[j] - most);
  if (!(sum > 0.0f)) return false;  // NaN
  const float log_sum_exp = most + logf(sum);
  for (int64_t l = 0; l < n; ++l) scores[l] = path_score + step_log_prob(scores[l], log_sum_exp);
  return true;
}

void add_exponentials(float* __restrict sums, const float* __restrict scores, int64_t n) {
  for (int64_t j = 0; j < n; ++j) sums[j] += exponential(scores[j]);
}

int64_t find_above(const float* values, int64_t from, int64_t n, float bound) {
  int64_t j = from;
  for (; j + kLanes <= n; j += kLanes) {
    int32_t above = 0;
    for (int64_t i = 0; i < kLanes; ++i) above |= values[j + i] > bound ? 1 : 0;
    if (above != 0) break;
  }
  for (; j < n; ++j) {
    if (values[j] > bound) return j;
  }
  return n;
}

constexpr CpuKernels kernels_of(const char* name) {
  return {name,    affine,      activate_sum,     cell_step,
          largest, log_softmax, add_exponentials, find_above};
}

}  // namespace
}  // namespace cnnrnn
