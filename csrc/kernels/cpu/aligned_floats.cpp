#include "kernels/cpu/aligned_floats.h"

#include <algorithm>
#include <new>

namespace cnnrnn {
namespace {

constexpr std::align_val_t kCacheLine{64};

}  // namespace

AlignedFloats::AlignedFloats(int64_t n, float value) : AlignedFloats(unfilled(n)) {
  std::fill_n(data_.get(), n, value);
}

AlignedFloats AlignedFloats::unfilled(int64_t n) {
  const size_t bytes = static_cast<size_t>(n) * sizeof(float);
  AlignedFloats floats;
  floats.data_.reset(static_cast<float*>(::operator new[](bytes, kCacheLine)));
  return floats;
}

void AlignedFloats::Free::operator()(float* data) const { ::operator delete[](data, kCacheLine); }

}  // namespace cnnrnn
