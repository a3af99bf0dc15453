// Halves and mma.m16n8k16 on the CPU, from the fragment layouts of the PTX manual.

#include <bit>

#include "cuda_runtime.h"

namespace cnnrnn {
namespace {

float half_of(uint64_t words, int word, int half) {
  const auto bits = static_cast<uint16_t>(words >> (32 * word + 16 * half));
  return static_cast<float>(std::bit_cast<_Float16>(bits));
}

}  // namespace

uint32_t pack_halves(float low, float high) {
  const auto low_bits = std::bit_cast<uint16_t>(static_cast<_Float16>(low));
  const auto high_bits = std::bit_cast<uint16_t>(static_cast<_Float16>(high));
  return static_cast<uint32_t>(high_bits) << 16 | low_bits;
}

// The element (row, k) of a is in register k / 8 * 2 + row / 8 of lane row % 8 * 4 + k % 8 / 2,
// that of b (k, column) in register k / 8 of lane column * 4 + k % 8 / 2; of a pair of columns
// (rows in b) the even one is the low half. A lane's sums are of rows g, g, g + 8, g + 8, columns 2
// t, 2 t + 1.
void mma_m16n8k16(float (&sums)[4], const uint32_t (&a)[4], uint2 b) {
  uint64_t all_a[2][32], all_b[32];
  for (int half = 0; half < 2; ++half) {
    std::memcpy(all_a[half], cuda_on_cpu::meet("mma", a + 2 * half, 8), sizeof all_a[half]);
  }
  std::memcpy(all_b, cuda_on_cpu::meet("mma", &b, 8), sizeof all_b);
  for (int i = 0; i < 4; ++i) {
    const int row = cuda_on_cpu::lane / 4 + i / 2 * 8, column = cuda_on_cpu::lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      sums[i] += half_of(all_a[k / 8][row % 8 * 4 + k % 8 / 2], row / 8, k % 2) *
                 half_of(all_b[column * 4 + k % 8 / 2], k / 8, k % 2);
    }
  }
}

}  // namespace cnnrnn
