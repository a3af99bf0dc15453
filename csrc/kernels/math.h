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
// A method that leaves no copy behind for the linker to share between instruction sets.
#define CNNRNN_METHOD CNNRNN_DEVICE inline __attribute__((always_inline))

namespace cnnrnn {

enum class Cell { kLstm, kPaper };
enum class Activation { kRelu, kTanh, kIdentity };

CNNRNN_INLINE float relu(float x) { return x < 0.0f ? 0.0f : x; }  // keeps NaN

// A float, or a vector of them, and the integers of the same width: what `exponential` is written
// for. Files for an instruction set add their vector type.
template <typename F>
struct IntegersOf;
template <>
struct IntegersOf<float> {
  using type = int32_t;
};

// e^x without a branch or a call, so that it becomes vector code: x = n ln 2 + r, a polynomial in
// r, and n added to the exponent. Within 2 ulp of e^x; 0 below the smallest normal number, infinity
// above the largest; keeps NaN.
template <typename F>
CNNRNN_INLINE F exponential(F x) {
  using I = typename IntegersOf<F>::type;
  const F zero{};
  const F smallest = zero - 87.33654f, largest = zero + 88.72283f, infinite = zero + INFINITY;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
  // What lies outside is replaced below; 0 stands in, since arithmetic on subnormals is slow.
  const F above = x < smallest ? zero : x;
  const F clamped = above > largest ? zero : above;
  const F shifted = clamped * 1.44269504f + kRound;
  const F n = shifted - kRound;
  const F r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  F p = zero + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  // Two halves, since 2^128 is no float but e^88.7 is.
  I exponent;
  memcpy(&exponent, &shifted, sizeof exponent);
  exponent -= 0x4B400000;
  const I half = exponent >> 1;
  const I first_bits = (half + 127) << 23, second_bits = (exponent - half + 127) << 23;
  F first, second;
  memcpy(&first, &first_bits, sizeof first);
  memcpy(&second, &second_bits, sizeof second);
  const F value = p * first * second;
  const F not_below = x < smallest ? zero : value;
  return x > largest ? infinite : not_below;
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

}  // namespace cnnrnn
