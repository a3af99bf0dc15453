// Stands in for CUDA's header where the package's .cu files are compiled as plain C++ and their
// kernels run on the CPU, for tests:
//   g++ -std=c++20 -fno-strict-aliasing -I tests/emulation -I csrc -x c++ file.cu cuda_on_cpu.cpp
//
// Blocks run one after another. Each thread of a block is a fiber that runs until it waits for its
// warp or its block, or exits. Warps are whole, and collectives need all 32 lanes: lanes that wait
// in different ones abort the program. Memory begins as NaNs. What is asked of the runtime is done
// when the call returns. x86-64 and GCC or Clang; what is here is what the kernels use.
#pragma once

#include <math.h>

#include <bit>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ thread_local  // as a static: the same one for all fibers

struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 : uint3 {
  dim3(unsigned x = 1) : uint3{x, 1, 1} {}
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
namespace cnnrnn {
extern __shared__ __align__(16) unsigned char dynamic_shared[];
}

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorMemoryAllocation };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum : unsigned { cudaEventDisableTiming = 2 };
using cudaStream_t = struct Stream*;
using cudaEvent_t = struct Event*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace cuda_on_cpu {

// The order of the blocks, of the warps of a block and, from one collective to the next, of the
// lanes of a warp: what is not synchronised comes out differently.
enum class LaneOrder { kAscending, kDescending, kShuffled };
void set_lane_order(LaneOrder order, uint32_t seed);
void set_multiprocessors(int count);    // of the device, three at first
void set_max_shared_memory(int bytes);  // of a block
int last_shared_memory();               // of a block of the last kernel that had any
void set_capturing(bool capturing);     // what every stream says of itself

extern int lane;  // of the running thread
// Waits for the warp; returns what its lanes gave, 4 or 8 bytes each.
const uint64_t* meet(const char* collective, const void* value, size_t bytes);
// Waits for the block; returns whether a thread voted.
bool meet_block(const char* collective, bool vote);
cudaError_t launch(const cudaLaunchConfig_t& config, std::function<void()> run_thread);
// Takes launches, if it is set and returns true: the kernel's address, blocks, threads and bytes of
// shared memory, and where its arguments stand and how long they are.
using TakeLaunch = bool (*)(const void* kernel, unsigned blocks, unsigned threads, size_t shared,
                            int count, const void* const* arguments, const size_t* sizes);
extern TakeLaunch take_launch;
void* allocate(size_t bytes);

template <typename T>
T given(const uint64_t& bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::meet_block("__syncthreads", false); }
inline int __syncthreads_or(int vote) {
  return cuda_on_cpu::meet_block("__syncthreads_or", vote != 0);
}
inline void __syncwarp() { cuda_on_cpu::meet("__syncwarp", nullptr, 0); }
template <typename T>
T __shfl_sync(unsigned, T value, int from) {
  return cuda_on_cpu::given<T>(cuda_on_cpu::meet("__shfl_sync", &value, sizeof value)[from]);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int by) {
  const int from = cuda_on_cpu::lane ^ by;
  return cuda_on_cpu::given<T>(cuda_on_cpu::meet("__shfl_xor_sync", &value, sizeof value)[from]);
}
inline unsigned __ballot_sync(unsigned, int vote) {
  const uint64_t* votes = cuda_on_cpu::meet("__ballot_sync", &vote, sizeof vote);
  unsigned yes = 0;
  for (int l = 0; l < 32; ++l) yes |= (votes[l] != 0 ? 1u : 0u) << l;
  return yes;
}
inline int __any_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) != 0; }
inline int __all_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) == ~0u; }
inline unsigned __reduce_min_sync(unsigned, unsigned value) {
  const uint64_t* values = cuda_on_cpu::meet("__reduce_min_sync", &value, sizeof value);
  for (int l = 0; l < 32; ++l) value = values[l] < value ? static_cast<unsigned>(values[l]) : value;
  return value;
}

inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return ~__reduce_min_sync(mask, ~value);
}

// A fiber never stops within an atomic.
template <typename T>
T atomicAdd(T* at, std::type_identity_t<T> value) {
  return std::exchange(*at, *at + value);
}
template <typename T>
T atomicMax(T* at, std::type_identity_t<T> value) {
  return std::exchange(*at, *at < value ? value : *at);
}
template <typename T>
T atomicCAS(T* at, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return *at == expected ? std::exchange(*at, value) : *at;
}

// What the kernels write in PTX; tensor_cores.cpp.
namespace cnnrnn {
inline float exp2_approx(float x) { return exp2f(x); }
uint32_t pack_halves(float low, float high);
void mma_m16n8k16(float (&sums)[4], const uint32_t (&a)[4], uint2 b);
}  // namespace cnnrnn

#define __logf logf
inline float __fmul_ru(float x, float y) {  // rounded up
  const float nearest = x * y;
  const double exact = static_cast<double>(x) * y;
  return nearest < exact ? std::nextafter(nearest, INFINITY) : nearest;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory" : "invalid argument";
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaMallocHost(void** to, size_t bytes) {
  *to = cuda_on_cpu::allocate(bytes);
  return *to == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}
inline cudaError_t cudaMalloc(void** to, size_t bytes) { return cudaMallocHost(to, bytes); }
inline cudaError_t cudaFreeHost(void* memory) { return std::free(memory), cudaSuccess; }
inline cudaError_t cudaFree(void* memory) { return cudaFreeHost(memory); }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  return std::memmove(to, from, bytes), cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return std::memset(to, value, bytes), cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t*, unsigned) { return cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaFuncSetAttribute(auto*, cudaFuncAttribute, int) { return cudaSuccess; }
template <typename... Formals>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Formals...),
                               auto&&... actuals) {
  const std::tuple<std::decay_t<Formals>...> values(static_cast<Formals>(actuals)...);
  if (cuda_on_cpu::take_launch != nullptr) {
    const void* arguments[sizeof...(Formals)];
    std::apply(
        [&](auto&... value) {
          int i = 0;
          ((arguments[i++] = &value), ...);
        },
        values);
    const size_t sizes[] = {sizeof(std::decay_t<Formals>)...};
    if (cuda_on_cpu::take_launch(reinterpret_cast<const void*>(kernel), config->gridDim.x,
                                 config->blockDim.x, config->dynamicSmemBytes, sizeof...(Formals),
                                 arguments, sizes)) {
      return cudaSuccess;
    }
  }
  return cuda_on_cpu::launch(*config, [=] { std::apply(kernel, values); });
}
