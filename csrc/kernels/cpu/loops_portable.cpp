#include "kernels/cpu/loops_impl.h"

namespace cnnrnn {

extern const CpuKernels kCpuKernels_portable;
const CpuKernels kCpuKernels_portable = kernels_of("portable");

}  // namespace cnnrnn
