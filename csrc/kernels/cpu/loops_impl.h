// Loops of loops.h, at the vector width of the instruction set that the including file is
// compiled for. Included once by each loops_*.cpp.
//
// The two products are where the arithmetic is. A register tile of kTileRows x kTileVectors sums
// stays in registers while k runs: 12 of 16 vector registers (24 of 32 with AVX-512), so that 7
// loads feed 12 multiply-adds (10 feed 24). What is left is written as plain loops over blocks of
// kLanes values without branches, which compilers turn into vector code.

#if defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#endif

#include "kernels/cpu/loops.h"

namespace cnnrnn {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16, kTileRows = 4, kTileVectors = 6, kStateRows = 6;
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8, kTileRows = 4, kTileVectors = 3, kStateRows = 3;
#else
constexpr int64_t kLanes = 4, kTileRows = 4, kTileVectors = 3, kStateRows = 3;
#endif
constexpr int64_t kGates = 4, kTileGates = kGates * kLanes;
constexpr int64_t kCachedPanelBytes = 24 << 10;  // panels that stay in L1 while rows go by

typedef float Vector __attribute__((vector_size(kLanes * 4)));
typedef float UnalignedVector __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t Mask __attribute__((vector_size(kLanes * 4)));

template <>
struct IntegersOf<Vector> {
  using type = Mask;
};

namespace {

inline Vector load(const float* from) { return *reinterpret_cast<const UnalignedVector*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<UnalignedVector*>(to) = value; }
inline Vector splat(float value) { return Vector{} + value; }

// Bit i is set where lane i is above `bound`.
inline uint32_t lanes_above(Vector value, float bound) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(value), _mm512_set1_ps(bound), _CMP_GT_OQ);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(value > bound)));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps(reinterpret_cast<__m128>(value > bound)));
#else
  uint32_t set = 0;
  for (int i = 0; i < kLanes; ++i) set |= value[i] > bound ? uint32_t{1} << i : 0;
  return set;
#endif
}

template <int kRows, int kVectors>
inline void product_tile(const Product& p, int64_t row, int64_t vector) {
  const float* const* x = p.x + row;
  const float* panel = p.panels + vector * p.K * kLanes;
  Vector sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    const Vector start = p.start == nullptr ? Vector{} : load(p.start + (vector + v) * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sums[r][v] = start;
  }
  for (int64_t k = 0; k < p.K; ++k) {
    Vector w[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) w[v] = load(panel + (v * p.K + k) * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const float factor = x[r][k];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[r][v] += factor * w[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(p.y[row + r] + (vector + v) * kLanes, sums[r][v]);
  }
}

template <int kRows>
void product_strip(const Product& p, int64_t row, int64_t vector, int64_t end) {
  for (; vector + kTileVectors <= end; vector += kTileVectors) {
    product_tile<kRows, kTileVectors>(p, row, vector);
  }
  switch (end - vector) {
#if defined(__AVX512F__)
    case 5:
      return product_tile<kRows, 5>(p, row, vector);
    case 4:
      return product_tile<kRows, 4>(p, row, vector);
    case 3:
      return product_tile<kRows, 3>(p, row, vector);
#endif
    case 2:
      return product_tile<kRows, 2>(p, row, vector);
    case 1:
      return product_tile<kRows, 1>(p, row, vector);
    default:
      return;
  }
}

void product(const Product& p) {
  int64_t chunk = kCachedPanelBytes / (p.K * kLanes * static_cast<int64_t>(sizeof(float)));
  chunk = chunk < kTileVectors ? kTileVectors : chunk;
  for (int64_t begin = 0; begin < p.vectors; begin += chunk) {
    const int64_t end = begin + chunk < p.vectors ? begin + chunk : p.vectors;
    for (int64_t row = 0; row < p.rows; row += kTileRows) {
      const int64_t first = p.first_vector == nullptr ? 0 : p.first_vector[row];
      const int64_t from = first > begin ? first : begin;
      if (from >= end) break;  // so are all later rows
      switch (p.rows - row) {
        case 1:
          product_strip<1>(p, row, from, end);
          break;
        case 2:
          product_strip<2>(p, row, from, end);
          break;
        case 3:
          product_strip<3>(p, row, from, end);
          break;
        default:
          product_strip<kTileRows>(p, row, from, end);
      }
    }
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

// Adds the terms k_begin..k_end of one tile of units to the gates of kRows prefixes. Storing a sum
// and loading it again changes no bit of it.
template <int kRows>
inline void gates_tile(const RecurrentGates& b, int64_t row, int64_t tile, int64_t k_begin,
                       int64_t k_end) {
  const float* const* x = b.fed_back + row;
  float* const* y = b.gates + row;
  const float* panel = b.hidden_panels + tile * b.hidden_dim * kTileGates;
  Vector sums[kRows][kGates];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int g = 0; g < kGates; ++g) {
      sums[r][g] = k_begin == 0 ? Vector{} : load(y[r] + tile * kTileGates + g * kLanes);
    }
  }
  for (int64_t k = k_begin; k < k_end; ++k) {
    Vector w[kGates];
#pragma GCC unroll 4
    for (int g = 0; g < kGates; ++g) w[g] = load(panel + k * kTileGates + g * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const float factor = x[r][k];
#pragma GCC unroll 4
      for (int g = 0; g < kGates; ++g) sums[r][g] += factor * w[g];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int g = 0; g < kGates; ++g) store(y[r] + tile * kTileGates + g * kLanes, sums[r][g]);
  }
}

// Up to kStateRows prefixes from `row` on.
inline void gates_strip(const RecurrentGates& b, int64_t row, int64_t end, int64_t tile,
                        int64_t k_begin, int64_t k_end) {
  switch (end - row) {
    case 1:
      return gates_tile<1>(b, row, tile, k_begin, k_end);
    case 2:
      return gates_tile<2>(b, row, tile, k_begin, k_end);
#if defined(__AVX512F__)
    case 3:
      return gates_tile<3>(b, row, tile, k_begin, k_end);
    case 4:
      return gates_tile<4>(b, row, tile, k_begin, k_end);
    case 5:
      return gates_tile<5>(b, row, tile, k_begin, k_end);
#endif
    default:
      return gates_tile<kStateRows>(b, row, tile, k_begin, k_end);
  }
}

// A part of a tile's weights stays in L1 while a group of prefixes goes by, and the tile in L2
// while all groups do.
void multiply_states(const RecurrentGates& b, int64_t first_tile, int64_t last_tile) {
  constexpr int64_t kGroup = 16 * kStateRows;
  constexpr int64_t kPart = 128 * 8 / kLanes;  // 16 KB of weights
  for (int64_t tile = first_tile; tile < last_tile; ++tile) {
    for (int64_t group = 0; group < b.count; group += kGroup) {
      const int64_t end = b.count < group + kGroup ? b.count : group + kGroup;
      for (int64_t k = 0; k < b.hidden_dim; k += kPart) {
        const int64_t k_end = k + kPart < b.hidden_dim ? k + kPart : b.hidden_dim;
        for (int64_t row = group; row < end; row += kStateRows) {
          gates_strip(b, row, end, tile, k, k_end);
        }
      }
    }
  }
}

// One tile of units of the cell.
inline void cell_tile(Cell cell, const float* __restrict input, const float* __restrict recurrent,
                      const float* __restrict previous, float* __restrict output,
                      float* __restrict next) {
  float g[kTileGates];
  for (int i = 0; i < kTileGates; ++i) g[i] = input[i] + recurrent[i];
  if (cell == Cell::kLstm) {
    for (int i = 0; i < kLanes; ++i) {
      lstm_unit(g[i], g[kLanes + i], g[2 * kLanes + i], g[3 * kLanes + i], previous[i], output + i,
                next + i);
    }
  } else {
    for (int i = 0; i < kLanes; ++i) {
      paper_unit(g[i], g[kLanes + i], g[2 * kLanes + i], g[3 * kLanes + i], previous[i], output + i,
                 next + i);
    }
  }
}

void step_cells(const CellSteps& s, int64_t first, int64_t last) {
  for (int64_t r = first; r < last; ++r) {
    for (int64_t tile = 0; tile < s.tiles; ++tile) {
      const int64_t unit = tile * kLanes;
      cell_tile(s.cell, s.input_gates[r] + tile * kTileGates,
                s.recurrent_gates[r] + tile * kTileGates, s.previous[r] + unit, s.output[r] + unit,
                s.next[r] + unit);
    }
  }
}

// Over the lanes, in an order that is fixed: halves against halves.
inline float largest_lane(Vector lanes) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(reinterpret_cast<__m512>(lanes));
#elif defined(__AVX2__)
  const __m256 all = reinterpret_cast<__m256>(lanes);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
#else
  const float low = lanes[0] > lanes[2] ? lanes[0] : lanes[2];
  const float high = lanes[1] > lanes[3] ? lanes[1] : lanes[3];
  return low > high ? low : high;
#endif
}

inline float sum_of_lanes(Vector lanes) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(lanes));
#elif defined(__AVX2__)
  const __m256 all = reinterpret_cast<__m256>(lanes);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
#endif
}

void take_logits(const float* from, int64_t count, float* logits, float* later_most) {
  const int64_t n = (count + kLanes - 1) / kLanes * kLanes;
  for (int64_t j = 0; j < count; ++j) logits[j] = from[j];
  for (int64_t j = count; j < n; ++j) logits[j] = -INFINITY;
  Vector most = splat(-INFINITY);
  for (int64_t j = n - kLanes; j >= 0; j -= kLanes) {
    store(later_most + j, most);
    const Vector logit = load(logits + j);
    most = logit > most ? logit : most;
  }
}

// The largest logit of what is not forbidden.
inline float largest_logit(const RowScores& row) {
  const Vector none = splat(-INFINITY);
  const auto allowed = [&](int64_t j) {
    return load(row.scores + j) == none ? none : load(row.logits + j);
  };
  Vector most = allowed(0);
  if (row.later_most != nullptr) {
    const Vector later = load(row.later_most);
    most = most > later ? most : later;
  } else {
    for (int64_t j = kLanes; j < row.n; j += kLanes) {
      const Vector logit = allowed(j);
      most = logit > most ? logit : most;
    }
  }
  return largest_lane(most);
}

// Adds the logits, shifted, and returns the largest score, passing over NaN.
inline float add_logits(const RowScores& row, float shift) {
  Vector most = splat(-INFINITY);
  for (int64_t j = 0; j < row.n; j += kLanes) {
    const Vector score = load(row.scores + j) + (load(row.logits + j) - shift);
    store(row.scores + j, score);
    most = score > most ? score : most;
  }
  return largest_lane(most);
}

inline float largest_score(const RowScores& row) {
  Vector most = splat(-INFINITY);
  for (int64_t j = 0; j < row.n; j += kLanes) {
    const Vector score = load(row.scores + j);
    most = score > most ? score : most;
  }
  return largest_lane(most);
}

inline float sum_of_exponentials(const RowScores& row, float largest) {
  Vector sums{};
  for (int64_t j = 0; j < row.n; j += kLanes) {
    sums += exponential_of_nonpositive(load(row.scores + j) - largest);
  }
  return sum_of_lanes(sums);
}

// Each step of a row waits for a sum or maximum over all lanes; several rows wait together.
void finish_scores(const RowScores* rows, int64_t count, float* log_sum_exp) {
  constexpr int64_t kTogether = 4;
  for (int64_t begin = 0; begin < count; begin += kTogether) {
    const int64_t end = begin + kTogether < count ? begin + kTogether : count;
    float shift[kTogether], largest[kTogether], sum[kTogether];
    for (int64_t r = begin; r < end; ++r) {
      shift[r - begin] = rows[r].logits == nullptr ? 0.0f : largest_logit(rows[r]);
    }
    for (int64_t r = begin; r < end; ++r) {
      largest[r - begin] = rows[r].logits == nullptr ? largest_score(rows[r])
                                                     : add_logits(rows[r], shift[r - begin]);
    }
    for (int64_t r = begin; r < end; ++r) {
      sum[r - begin] = sum_of_exponentials(rows[r], largest[r - begin]);
    }
    for (int64_t r = begin; r < end; ++r) {
      const float most = largest[r - begin];
      const bool finite = most > -INFINITY && most < INFINITY;
      log_sum_exp[r] = finite ? most + logf(sum[r - begin]) : NAN;  // NaN where a score is
    }
  }
}

template <int kCapacity>
void select(const float* scores, int64_t from, int64_t n, float path_score, float log_sum_exp,
            float floor, int32_t rank, Extensions<kCapacity>* best) {
  float bound = best->bound() > floor ? best->bound() : floor;
  if (path_score <= bound) return;  // scores only fall
  for (int64_t j = from; j < n; j += kLanes) {
    const Vector lanes = path_score + step_log_prob(load(scores + j), log_sum_exp);
    for (uint32_t above = lanes_above(lanes, bound); above != 0; above &= above - 1) {
      const int64_t label = j + __builtin_ctz(above);
      const float score = path_score + step_log_prob(scores[label], log_sum_exp);
      if (!(score > bound)) continue;  // it has risen within this vector
      best->offer(score, Extension{rank, static_cast<int32_t>(label)});
      bound = best->bound() > floor ? best->bound() : floor;
    }
  }
}

void add_probabilities(float* sums, const float* scores, int64_t n, float path_score,
                       float log_sum_exp) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    const Vector score = path_score + step_log_prob(load(scores + j), log_sum_exp);
    store(sums + j, load(sums + j) + exponential_of_nonpositive(score));
  }
  for (; j < n; ++j) {
    sums[j] += exponential_of_nonpositive(path_score + step_log_prob(scores[j], log_sum_exp));
  }
}

constexpr CpuKernels kernels_of(const char* name) {
  return {name,
          kLanes,
          product,
          activate_sum,
          multiply_states,
          step_cells,
          take_logits,
          finish_scores,
          select<kMaxBeamSize>,
          select<kMaxPlaces>,
          add_probabilities};
}

}  // namespace
}  // namespace cnnrnn
