// Uses every function of csrc/kernels/math.h, topn.h, cuda/row_best.h, prefix_key.h and beam.h in a
// kernel and on the host; run where there is a GPU, it compares the two.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "kernels/beam.h"
#include "kernels/cuda/row_best.h"
#include "kernels/math.h"
#include "kernels/prefix_key.h"
#include "kernels/topn.h"

namespace {

constexpr int kRows = 257;
constexpr int kValues = 28;  // written per row

// A search of three steps over four labels whose scores come from `row`; values [6].
CNNRNN_INLINE void search(int row, float* values) {
  using namespace cnnrnn;
  const Stop stop = row % 2 == 0 ? Stop::kNBest : Stop::kLiteral;
  const BeamRules rules{
      {2, 3, row % 3 == 0 ? 1 : 0, Order::kIncreasing, row % 5 == 0, stop}, 4, row % 7 == 0};
  Beam<2> beam(2);
  std::uint32_t needed = 0;
  float floors = 0.0f;
  bool nonfinite = false;
  while (beam.live_count > 0) {
    PathStep steps[kMaxBeamSize];
    Extensions<2> best(2);
    FinishedPaths<2> done = beam.done, best_case(2);
    for (int j = 0; j < beam.live_count; ++j) {
      const LivePath& path = beam.live[j];
      steps[j] = {PathStep::Kind::kScored, 10 * j, 0.0f, path.score};
      if (!is_scored(rules, path, beam.step)) {
        steps[j].kind = PathStep::Kind::kOnlyEnds;
        continue;
      }
      if (end_allowed(rules, beam.step)) steps[j].end_score -= 0.1f * ((row + j) % 11);
      for (int l = static_cast<int>(first_allowed(rules, path)); l < 4; ++l) {
        best.offer(path.score - 0.1f * ((3 * row + 5 * l + j) % 13), Extension{j, l});
      }
    }
    offer_ends(rules, beam, steps, &done);
    offer_chosen_ends(rules, beam, best, &done);
    const float floor = selection_floor(rules, beam, done);
    floors += floor > -100.0f && floor < 100.0f ? floor : 1.0f;
    nonfinite |= is_nonfinite(rules, beam, steps, done);
    take_step(rules, best, steps, done, &beam, nullptr);
    for (int j = 0; j < beam.live_count; ++j) steps[j].kind = PathStep::Kind::kMissing;
    needed = 4 * needed + states_needed(rules, beam, steps, beam.done, row % 2 == 0, &best_case);
  }
  values[0] = static_cast<float>(needed);
  values[1] = floors;
  values[2] = beam.done.size > 0 ? beam.done.scores[0] : 1.0f;
  values[3] = beam.done.size > 1 ? beam.done.worst() : 1.0f;
  values[4] = static_cast<float>(beam.step);
  values[5] = nonfinite ? 1.0f : 0.0f;
}

// The best labels of a path; values [2].
template <int kCapacity>
CNNRNN_INLINE void best_labels(int row, float* values) {
  alignas(16) unsigned char memory[cnnrnn::RowBest<kCapacity>::kSharedBytes + 1];
  cnnrnn::RowBest<kCapacity> best(memory, 3);
  best.clear();
  for (int label = 0; label < 12; ++label) {
    best.offer(-0.5f * static_cast<float>((row + 5 * label) % 7), label);
  }
  values[0] = best.bound();
  best.extend_path(-2.0f, 0.5f);
  best.drop_first();
  values[1] = best.first_score() + static_cast<float>(best.first_label());
}

// The same calls for both sides; `values` [kValues].
CNNRNN_INLINE void evaluate(int row, float* values) {
  const float x = 0.05f * static_cast<float>(row - kRows / 2);
  values[0] = cnnrnn::relu(x);
  values[1] = cnnrnn::sigmoid(x);
  values[2] = cnnrnn::activate(cnnrnn::Activation::kRelu, x);
  values[3] = cnnrnn::activate(cnnrnn::Activation::kTanh, x);
  values[4] = cnnrnn::activate(cnnrnn::Activation::kIdentity, x);
  cnnrnn::lstm_unit(x, 1.0f - x, 0.5f * x, -x, 0.3f, &values[5], &values[6]);
  cnnrnn::paper_unit(x, 1.0f - x, 0.5f * x, 1.0f + x, 0.3f, &values[7], &values[8]);
  values[9] = cnnrnn::step_log_prob(x, 2.0f) + cnnrnn::exponential(x);

  cnnrnn::TopN<int, 4> top(3);
  for (int item = 0; item < 12; ++item) {
    top.offer(item == 5 ? -INFINITY : -static_cast<float>((row + 7 * item) % 5), item);
  }
  values[10] = top.worst();
  values[11] = top.full() ? 1.0f : 0.0f;
  values[12] = top.admits(-2.0f) ? 1.0f : 0.0f;
  values[13] = static_cast<float>(top.items[0]);
  values[14] = static_cast<float>(top.items[2]);
  values[15] = static_cast<float>(top.size);

  const std::uint64_t key = cnnrnn::prefix_key(row, 3 * row);
  values[16] = static_cast<float>(cnnrnn::first_slot(key, 1023));
  values[17] = static_cast<float>(cnnrnn::key_parent(key) - cnnrnn::key_label(key));
  search(row, values + 18);
  best_labels<cnnrnn::kSmallBeam>(row, values + 24);
  best_labels<cnnrnn::kMaxBeamSize>(row, values + 26);
}

__global__ void evaluate_rows(float* values) {  // [kRows, kValues]
  const int row = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (row < kRows) evaluate(row, values + row * kValues);
}

}  // namespace

int main() {
  std::vector<float> actual(kRows * kValues), expected(kRows * kValues);
  for (int row = 0; row < kRows; ++row) evaluate(row, expected.data() + row * kValues);

  float* device = nullptr;
  const std::size_t bytes = actual.size() * sizeof(float);
  cudaError_t status = cudaMalloc(&device, bytes);
  if (status == cudaSuccess) {
    evaluate_rows<<<(kRows + 127) / 128, 128>>>(device);
    status = cudaMemcpy(actual.data(), device, bytes, cudaMemcpyDeviceToHost);
    cudaFree(device);
  }
  if (status != cudaSuccess) {
    std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(status));
    return 1;
  }
  int failures = 0;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    if (std::fabs(actual[i] - expected[i]) <= 1e-6f * (1.0f + std::fabs(expected[i]))) continue;
    std::fprintf(stderr, "row %zu, value %zu: device %g, host %g\n", i / kValues, i % kValues,
                 actual[i], expected[i]);
    ++failures;
  }
  return failures == 0 ? 0 : 1;
}
