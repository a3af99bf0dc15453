// The CUDA search without torch, for compute-sanitizer: both kinds of kernels, both precisions,
// marginals, label logits and a table that overflows, held against the CPU search.
// Exit status 1, and what went wrong on standard error, where results differ by more than ties.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <random>
#include <vector>

#include "cuda_runtime.h"
#include "kernels/cpu/head.h"
#include "kernels/cpu/loops.h"
#include "kernels/cuda/head.h"
#include "kernels/cuda/launch.h"

namespace {

using cnnrnn::check_cuda;

class Allocations : public cnnrnn::DeviceMemory {
 public:
  ~Allocations() override {
    for (void* block : blocks_) cudaFree(block);
  }
  void* allocate(int64_t bytes) override {
    void* block = nullptr;
    check_cuda(cudaMalloc(&block, static_cast<size_t>(bytes)), "allocating");
    blocks_.push_back(block);
    return block;
  }

  // A copy of values in device memory.
  const float* copy(const std::vector<float>& values, cudaStream_t stream) {
    if (values.empty()) return nullptr;
    void* const to = allocate(static_cast<int64_t>(values.size() * sizeof(float)));
    check_cuda(cudaMemcpyAsync(to, values.data(), values.size() * sizeof(float),
                               cudaMemcpyHostToDevice, stream),
               "copying");
    return static_cast<const float*>(to);
  }

 private:
  std::vector<void*> blocks_;
};

std::vector<float> uniform(std::mt19937* random, int64_t count, float bound) {
  std::uniform_real_distribution<float> values(-bound, bound);
  std::vector<float> drawn(count);
  for (float& value : drawn) value = values(*random);
  return drawn;
}

struct Case {
  const char* name;
  int64_t L, D, H, B;
  cnnrnn::SearchOptions options;
  bool logits, marginals;
  int64_t prefix_bytes;
  int present = 0;  // labels known of each second image, and as many that are absent
};

template <typename T>
void fetch(const T* from, std::vector<T>* to, cudaStream_t stream) {
  check_cuda(
      cudaMemcpyAsync(to->data(), from, to->size() * sizeof(T), cudaMemcpyDeviceToHost, stream),
      "copying");
  check_cuda(cudaStreamSynchronize(stream), "searching");
}

bool run(const Case& c, cudaStream_t stream) {
  const auto& [name, L, D, H, B, options, with_logits, with_marginals, prefix_bytes, present] = c;
  const int64_t N = options.beam_size, T = options.max_labels;
  std::mt19937 random(7);
  const auto matrix = [&](int64_t rows, int64_t columns) {
    return uniform(&random, rows * columns, 3.0f / std::sqrt(static_cast<float>(columns)));
  };
  const std::vector<float> embedding = matrix(L + 2, D), read = matrix(L + 2, D),
                           bias = matrix(1, L + 1), input = matrix(4 * H, D),
                           hidden = matrix(4 * H, H), hidden_bias = matrix(1, 4 * H),
                           projection = matrix(D, H), joint = uniform(&random, B * D, 3.0f),
                           logits = with_logits ? uniform(&random, B * (L + 1), 4.0f)
                                                : std::vector<float>();
  const auto weights = [&](const std::function<const float*(const std::vector<float>&)>& at) {
    return cnnrnn::HeadWeights{.num_labels = L,
                               .joint_dim = D,
                               .hidden_dim = H,
                               .cell = cnnrnn::Cell::kLstm,
                               .activation = cnnrnn::Activation::kRelu,
                               .label_embedding = at(embedding),
                               .input_embedding = with_logits ? at(read) : nullptr,
                               .score_bias = at(bias),
                               .input_weight = at(input),
                               .hidden_weight = at(hidden),
                               .input_bias = nullptr,
                               .hidden_bias = at(hidden_bias),
                               .output_projection = at(projection)};
  };

  std::vector<int8_t> evidence(present > 0 ? B * L : 0);
  for (int64_t b = 0; present > 0 && b < B; b += 2) {
    for (int i = 0; i < 2 * present; ++i) {
      const int64_t label = (b + i * (L / (2 * present))) % L;
      evidence[b * L + label] = i % 2 == 0 ? 1 : -1;
    }
  }
  const int8_t* const known = present > 0 ? evidence.data() : nullptr;
  std::vector<int64_t> labels(B * N * T), lengths(B * N), gpu_labels(B * N * T);
  std::vector<float> scores(B * N), sums(with_marginals ? B * L : 0), gpu_scores(B * N),
      gpu_sums(sums.size());
  cnnrnn::CpuHead cpu(weights([](const std::vector<float>& v) { return v.data(); }),
                      cnnrnn::best_cpu_kernels(), int64_t{1} << 28);
  cnnrnn::beam_search_cpu(&cpu, options,
                          {B, joint.data(), with_logits ? logits.data() : nullptr, known, L},
                          {labels.data(), lengths.data(), scores.data(),
                           with_marginals ? sums.data() : nullptr, nullptr, nullptr},
                          cnnrnn::on_this_thread);

  Allocations memory;
  cnnrnn::CudaHead head(
      weights([&](const std::vector<float>& v) { return memory.copy(v, stream); }), prefix_bytes, 0,
      &memory, stream);
  const cnnrnn::ImageEmbeddings images{B, memory.copy(joint, stream), memory.copy(logits, stream),
                                       known, L};
  auto* const out_labels = static_cast<int64_t*>(memory.allocate(B * N * T * 8));
  auto* const out_lengths = static_cast<int64_t*>(memory.allocate(B * N * 8));
  auto* const out_scores = static_cast<float*>(memory.allocate(B * N * 4));
  auto* const out_sums = with_marginals ? static_cast<float*>(memory.allocate(B * L * 4)) : nullptr;
  Allocations scratch;
  bool right = true;
  for (int again = 0; again < 2; ++again) {  // with an empty table, then with what is kept
    head.search(options, images, {out_labels, out_lengths, out_scores, out_sums, nullptr, nullptr},
                &scratch, stream);
    fetch(out_labels, &gpu_labels, stream);
    fetch(out_scores, &gpu_scores, stream);
    if (with_marginals) fetch(out_sums, &gpu_sums, stream);
    const bool fast = options.precision == cnnrnn::Precision::kFast;
    const float tolerance = fast ? 0.05f : 1e-4f;
    int64_t other_paths = 0, far_scores = 0, far_sums = 0;
    for (int64_t b = 0; b < B; ++b) {
      const bool same = std::equal(labels.begin() + b * N * T, labels.begin() + b * N * T + T,
                                   gpu_labels.begin() + b * N * T);
      if (!same) ++other_paths;
      const float difference = std::fabs(scores[b * N] - gpu_scores[b * N]);
      if (!(difference <= tolerance * (1.0f + std::fabs(scores[b * N])))) ++far_scores;
    }
    for (size_t i = 0; i < sums.size(); ++i) {
      if (!(std::fabs(sums[i] - gpu_sums[i]) <= tolerance)) ++far_sums;
    }
    if (other_paths * 20 <= B && far_scores == 0 && far_sums == 0) continue;
    right = false;
    std::fprintf(stderr, "%s, pass %d: %lld best paths, %lld scores and %lld marginals differ\n",
                 name, again, static_cast<long long>(other_paths),
                 static_cast<long long>(far_scores), static_cast<long long>(far_sums));
  }
  return right;
}

}  // namespace

int main() {
  using cnnrnn::Order, cnnrnn::Precision, cnnrnn::Stop;
  const Order up = Order::kIncreasing;
  const auto exact = Precision::kExact, fast = Precision::kFast;
  constexpr int64_t kMuch = int64_t{1} << 24;
  const Case cases[] = {
      {"resident", 81, 64, 40, 70, {4, 5, 0, up, false, Stop::kNBest, exact}, false, false, kMuch},
      {"resident, fast",
       81,
       64,
       40,
       70,
       {4, 5, 0, up, false, Stop::kNBest, fast},
       false,
       false,
       kMuch},
      {"streamed",
       333,
       20,
       24,
       40,
       {7, 4, 1, Order::kUnique, false, Stop::kNBest, exact},
       true,
       true,
       kMuch},
      {"streamed, fast",
       333,
       20,
       24,
       40,
       {7, 4, 1, Order::kUnique, true, Stop::kLiteral, fast},
       true,
       false,
       kMuch},
      {"marginals", 40, 64, 16, 33, {2, 6, 0, up, false, Stop::kNBest, exact}, true, true, kMuch},
      {"free marginals",
       40,
       64,
       16,
       33,
       {4, 6, 0, Order::kFree, false, Stop::kNBest, exact},
       true,
       true,
       kMuch},
      {"overflow",
       300,
       16,
       8,
       40,
       {16, 6, 0, Order::kFree, false, Stop::kNBest, exact},
       true,
       false,
       0},
      {"known labels",
       81,
       64,
       40,
       33,
       {4, 5, 0, up, false, Stop::kNBest, exact},
       true,
       false,
       kMuch,
       2},
      {"known labels, marginals, overflow",
       200,
       20,
       16,
       33,
       {6, 5, 0, Order::kUnique, false, Stop::kNBest, exact},
       false,
       true,
       0,
       2},
      {"known labels, fast",
       81,
       64,
       16,
       33,
       {2, 6, 0, Order::kFree, true, Stop::kNBest, fast},
       true,
       false,
       kMuch,
       3},
  };
  bool right = true;
  try {
    for (const Case& c : cases) right = run(c, nullptr) && right;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
  if (right) std::puts("all as on the CPU");
  return right ? 0 : 1;
}
