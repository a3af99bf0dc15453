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

namespace cnnrnn {

enum class Cell { kLstm, kPaper };
enum class Activation { kRelu, kTanh, kIdentity };

CNNRNN_INLINE float relu(float x) { return x < 0.0f ? 0.0f : x; }  // keeps NaN

// e^x without a branch or a call, so that a loop over it becomes vector code: x = n ln 2 + r, a
// polynomial in r, and n added to the exponent. Within 2 ulp of e^x; 0 below the smallest normal
// number, infinity above the largest; keeps NaN.
CNNRNN_INLINE float exponential(float x) {
  constexpr float kSmallest = -87.33654f, kLargest = 88.72283f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
  const float clamped = x < kSmallest ? kSmallest : (x > kLargest ? kLargest : x);
  const float shifted = clamped * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  // Two halves, since 2^128 is no float but e^88.7 is.
  int32_t exponent;
  memcpy(&exponent, &shifted, sizeof exponent);
  exponent -= 0x4B400000;
  const int32_t half = exponent >> 1;
  const int32_t first_bits = (half + 127) << 23, second_bits = (exponent - half + 127) << 23;
  float first, second;
  memcpy(&first, &first_bits, sizeof first);
  memcpy(&second, &second_bits, sizeof second);
  const float value = p * first * second;
  return x < kSmallest ? 0.0f : (x > kLargest ? INFINITY : value);
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
CNNRNN_INLINE float step_log_prob(float score, float log_sum_exp) {
  const float log_prob = score - log_sum_exp;
  return log_prob > 0.0f ? 0.0f : log_prob;  // keeps NaN
}

}  // namespace cnnrnn
