// Chooses the inner loops that this processor can run.

#include <cstring>
#include <initializer_list>

#include "kernels/cpu/loops.h"

namespace cnnrnn {

extern const CpuKernels kCpuKernels_portable;
#if defined(CNNRNN_X86_KERNELS)
extern const CpuKernels kCpuKernels_avx2;
extern const CpuKernels kCpuKernels_avx512;
#endif

const CpuKernels* find_cpu_kernels(const char* name) {
  if (std::strcmp(name, "portable") == 0) return &kCpuKernels_portable;
#if defined(CNNRNN_X86_KERNELS)
  if (std::strcmp(name, "avx2") == 0 && __builtin_cpu_supports("avx2") &&
      __builtin_cpu_supports("fma")) {
    return &kCpuKernels_avx2;
  }
  if (std::strcmp(name, "avx512") == 0 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return &kCpuKernels_avx512;
  }
#endif
  return nullptr;
}

const CpuKernels& best_cpu_kernels() {
  for (const char* name : {"avx512", "avx2"}) {
    if (const CpuKernels* found = find_cpu_kernels(name)) return *found;
  }
  return kCpuKernels_portable;
}

}  // namespace cnnrnn
