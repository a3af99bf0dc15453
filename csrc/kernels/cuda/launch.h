// CUDA calls that cannot go on after an error, and kernel launches.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace cnnrnn {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(status));
}

template <typename... Formals, typename... Actuals>
void launch(const char* name, void (*kernel)(Formals...), int64_t blocks, int threads,
            size_t shared_bytes, cudaStream_t stream, Actuals... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

}  // namespace cnnrnn
