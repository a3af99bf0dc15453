// The formulas of the model, once: every implementation loops over these functions.
//
// Compiled as plain C++ for the CPU search and by nvcc for the device. Paper references are to
// Wang et al., CVPR 2016. Everything here is static: files compiled for different instruction sets
// include it, and a shared copy could run on a processor that lacks the instructions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define CNNRNN_DEVICE __host__ __device__
#else
#define CNNRNN_DEVICE
#endif
#define CNNRNN_INLINE CNNRNN_DEVICE static inline
// Before a loop that must be unrolled on the device: arrays in registers have no run-time index.
#if defined(__CUDA_ARCH__)
#define CNNRNN_UNROLL _Pragma("unroll")
#else
#define CNNRNN_UNROLL
#endif
// A method that leaves no copy behind for the linker to share between instruction sets.
#define CNNRNN_METHOD CNNRNN_DEVICE inline __attribute__((always_inline))

namespace cnnrnn {

enum class Cell { kLstm, kPaper };
enum class Activation { kRelu, kTanh, kIdentity };

// Keeps NaN.
CNNRNN_INLINE float relu(float x) {
#if defined(__CUDA_ARCH__)
  float positive;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(positive) : "f"(x));  // one instruction
  return positive;
#else
  return x < 0.0f ? 0.0f : x;
#endif
}

// A float, or a vector of them, and the integers of the same width: what `exponential` is written
// for. Files for an instruction set add their vector type.
template <typename F>
struct IntegersOf;
template <>
struct IntegersOf<float> {
  using type = int32_t;
};

// e^x = 2^n e^r with |r| <= ln 2 / 2: returns e^r, by a polynomial, and n. For x within the range
// of normal floats. Without a branch or a call, so that it becomes vector code.
template <typename F>
CNNRNN_INLINE F reduced_exponential(F x, typename IntegersOf<F>::type* n) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
  const F shifted = x * 1.44269504f + kRound;
  const F whole = shifted - kRound;
  const F r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  memcpy(n, &shifted, sizeof shifted);
  *n -= 0x4B400000;
  F p = F{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return (p * r) * r + r + 1.0f;
}

// 2^n for n in -126..127.
template <typename F>
CNNRNN_INLINE F power_of_two(typename IntegersOf<F>::type n) {
  const typename IntegersOf<F>::type bits = (n + 127) << 23;
  F power;
  memcpy(&power, &bits, sizeof power);
  return power;
}

constexpr float kSmallestExponent = -87.33654f;  // below it e^x is subnormal, and taken for 0

// e^x within 2 ulp; 0 where it would be subnormal, infinity above the largest float; keeps NaN.
template <typename F>
CNNRNN_INLINE F exponential(F x) {
  const F zero{}, smallest = zero + kSmallestExponent, largest = zero + 88.72283f;
  // What lies outside is replaced below; 0 stands in, since arithmetic on subnormals is slow.
  const F above = x < smallest ? zero : x;
  const F clamped = above > largest ? zero : above;
  typename IntegersOf<F>::type n;
  const F e_r = reduced_exponential(clamped, &n);
  // Two halves, since 2^128 is no float but e^88.7 is.
  const F value = e_r * power_of_two<F>(n >> 1) * power_of_two<F>(n - (n >> 1));
  const F not_below = x < smallest ? zero : value;
  return x > largest ? zero + INFINITY : not_below;
}

// The same bits for x <= 0, in fewer instructions.
template <typename F>
CNNRNN_INLINE F exponential_of_nonpositive(F x) {
  const F zero{}, smallest = zero + kSmallestExponent;
  const F above = x < smallest ? zero : x;
  typename IntegersOf<F>::type n;
  const F e_r = reduced_exponential(above, &n);
  const F value = e_r * power_of_two<F>(n);
  return x < smallest ? zero : value;
}

CNNRNN_INLINE float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

CNNRNN_INLINE float hyperbolic_tangent(float x) {
  return 1.0f - 2.0f / (1.0f + exponential(2.0f * x));
}

// h of equation 4.
CNNRNN_INLINE float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kRelu:
      return relu(x);
    case Activation::kTanh:
      return hyperbolic_tangent(x);
    default:
      return x;
  }
}

// One unit of a standard LSTM; `gates` are the four pre-activations in torch's order i, f, g, o.
CNNRNN_INLINE void lstm_unit(float gate_i, float gate_f, float gate_g, float gate_o,
                             float previous_cell, float* output, float* cell) {
  const float c = sigmoid(gate_f) * previous_cell + sigmoid(gate_i) * hyperbolic_tangent(gate_g);
  *cell = c;
  *output = sigmoid(gate_o) * hyperbolic_tangent(c);
}

// One unit of equation 1 taken literally: x = relu(.), i, f, g = relu(.), r = f r' + i x, o = r g.
CNNRNN_INLINE void paper_unit(float input, float gate_i, float gate_f, float gate_g,
                              float previous_cell, float* output, float* cell) {
  const float r = relu(gate_f) * previous_cell + relu(gate_i) * relu(input);
  *cell = r;
  *output = r * relu(gate_g);
}

// A step's log-probability. The clamp keeps rounding from lifting it above 0, so that scores of
// paths only fall: dropping paths by score is exact because of it.
template <typename F>
CNNRNN_INLINE F step_log_prob(F score, float log_sum_exp) {
  const F zero{};
  const F log_prob = score - log_sum_exp;
  return log_prob > zero ? zero : log_prob;  // keeps NaN
}

// The logarithm of a sum of probabilities, given by their logarithms one after the other.
struct LogSum {
  float most = -INFINITY;
  float sum = 0.0f;  // over e^most

  CNNRNN_METHOD void add(float log_prob) {
    if (log_prob == -INFINITY) return;
    const bool larger = log_prob > most;
    const float base = larger ? log_prob : most;
    sum = larger ? sum * expf(most - base) + 1.0f : sum + expf(log_prob - base);
    most = base;
  }

  CNNRNN_METHOD float log() const { return most + logf(sum); }  // -inf of none
};

}  // namespace cnnrnn
