// Uses every function of csrc/kernels/math.h and topn.h in a kernel and on the host; run where
// there is a GPU, it compares the two.

#include <cmath>
#include <cstdio>
#include <vector>

#include "kernels/math.h"
#include "kernels/topn.h"

namespace {

constexpr int kRows = 257;
constexpr int kValues = 16;  // written per row

// The same calls for both sides; `values` [kValues].
CNNRNN_INLINE void evaluate(int row, float* values) {
  const float x = 0.05f * static_cast<float>(row - kRows / 2);
  values[0] = cnnrnn::relu(x);
  values[1] = cnnrnn::sigmoid(x);
  values[2] = cnnrnn::activate(cnnrnn::Activation::kRelu, x);
  values[3] = cnnrnn::activate(cnnrnn::Activation::kTanh, x);
  values[4] = cnnrnn::activate(cnnrnn::Activation::kIdentity, x);
  cnnrnn::lstm_unit(x, 1.0f - x, 0.5f * x, -x, 0.3f, &values[5], &values[6]);
  cnnrnn::paper_unit(x, 1.0f - x, 0.5f * x, 1.0f + x, 0.3f, &values[7], &values[8]);
  values[9] = cnnrnn::step_log_prob(x, 2.0f) + cnnrnn::exponential(x);

  cnnrnn::TopN<int, 4> top(3);
  for (int item = 0; item < 12; ++item) {
    top.offer(item == 5 ? -INFINITY : -static_cast<float>((row + 7 * item) % 5), item);
  }
  values[10] = top.worst();
  values[11] = top.full() ? 1.0f : 0.0f;
  values[12] = top.admits(-2.0f) ? 1.0f : 0.0f;
  values[13] = static_cast<float>(top.items[0]);
  values[14] = static_cast<float>(top.items[2]);
  values[15] = static_cast<float>(top.size);
}

__global__ void evaluate_rows(float* values) {  // [kRows, kValues]
  const int row = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (row < kRows) evaluate(row, values + row * kValues);
}

}  // namespace

int main() {
  std::vector<float> actual(kRows * kValues), expected(kRows * kValues);
  for (int row = 0; row < kRows; ++row) evaluate(row, expected.data() + row * kValues);

  float* device = nullptr;
  const std::size_t bytes = actual.size() * sizeof(float);
  cudaError_t status = cudaMalloc(&device, bytes);
  if (status == cudaSuccess) {
    evaluate_rows<<<(kRows + 127) / 128, 128>>>(device);
    status = cudaMemcpy(actual.data(), device, bytes, cudaMemcpyDeviceToHost);
    cudaFree(device);
  }
  if (status != cudaSuccess) {
    std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(status));
    return 1;
  }
  int failures = 0;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    if (std::fabs(actual[i] - expected[i]) <= 1e-6f * (1.0f + std::fabs(expected[i]))) continue;
    std::fprintf(stderr, "row %zu, value %zu: device %g, host %g\n", i / kValues, i % kValues,
                 actual[i], expected[i]);
    ++failures;
  }
  return failures == 0 ? 0 : 1;
}
