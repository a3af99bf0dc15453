// Arrays of floats that begin on a cache line, so that a vector never lies across two.
#pragma once

#include <cstdint>
#include <memory>

namespace cnnrnn {

class AlignedFloats {
 public:
  AlignedFloats() = default;
  explicit AlignedFloats(int64_t n, float value = 0.0f);

  // Not written to, so that what is not used yet takes no memory.
  static AlignedFloats unfilled(int64_t n);

  float* data() const { return data_.get(); }  // as a pointer is constant, not what it points to

 private:
  struct Free {
    void operator()(float* data) const;
  };
  std::unique_ptr<float[], Free> data_;
};

}  // namespace cnnrnn
