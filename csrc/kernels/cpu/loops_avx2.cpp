#include "kernels/cpu/loops_impl.h"

namespace cnnrnn {

extern const CpuKernels kCpuKernels_avx2;
const CpuKernels kCpuKernels_avx2 = kernels_of("avx2");

}  // namespace cnnrnn
