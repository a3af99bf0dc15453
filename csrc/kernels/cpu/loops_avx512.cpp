#include "kernels/cpu/loops_impl.h"

namespace cnnrnn {

extern const CpuKernels kCpuKernels_avx512;
const CpuKernels kCpuKernels_avx512 = kernels_of("avx512");

}  // namespace cnnrnn
