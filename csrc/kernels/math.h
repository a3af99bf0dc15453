// The formulas of the model, once: every implementation loops over these functions.
//
// Compiled as plain C++ for the CPU search and by nvcc for the device. Paper references are to
// Wang et al., CVPR 2016.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define CNNRNN_INLINE __host__ __device__ inline
#else
#define CNNRNN_INLINE inline
#endif

namespace cnnrnn {

enum class Cell { kLstm, kPaper };
enum class Activation { kRelu, kTanh, kIdentity };

CNNRNN_INLINE float relu(float x) { return x < 0.0f ? 0.0f : x; }  // keeps NaN

CNNRNN_INLINE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// h of equation 4.
CNNRNN_INLINE float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kRelu:
      return relu(x);
    case Activation::kTanh:
      return tanhf(x);
    default:
      return x;
  }
}

// One unit of a standard LSTM; `gates` are the four pre-activations in torch's order i, f, g, o.
CNNRNN_INLINE void lstm_unit(float gate_i, float gate_f, float gate_g, float gate_o,
                             float previous_cell, float* output, float* cell) {
  const float c = sigmoid(gate_f) * previous_cell + sigmoid(gate_i) * tanhf(gate_g);
  *cell = c;
  *output = sigmoid(gate_o) * tanhf(c);
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
