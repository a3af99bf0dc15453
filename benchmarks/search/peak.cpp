// Multiply-adds per second of one core: 20 independent sums that stay in registers. Prints vector
// instructions per second, the best of 20 tries in processor time.
#include <cstdio>
#include <ctime>

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
typedef float Vector __attribute__((vector_size(kBytes)));

int main() {
  constexpr int kSums = kBytes == 64 ? 20 : 10;
  constexpr long kRounds = 2'000'000;
  Vector sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = Vector{} + static_cast<float>(i);
  const Vector factor = Vector{} + 0.999f, term = Vector{} + 0.001f;
  double most = 0.0;
  for (int attempt = 0; attempt < 20; ++attempt) {
    const std::clock_t began = std::clock();
    for (long round = 0; round < kRounds; ++round) {
#pragma GCC unroll 20
      for (int i = 0; i < kSums; ++i) sums[i] = sums[i] * factor + term;
    }
    const double seconds = static_cast<double>(std::clock() - began) / CLOCKS_PER_SEC;
    const double rate = kRounds * kSums / seconds;
    if (rate > most) most = rate;
  }
  float used = 0.0f;  // so that no sum is left out
  for (const Vector& sum : sums) used += sum[0];
  std::fprintf(stderr, "%g\n", used);
  std::printf("%.0f\n", most);
}
