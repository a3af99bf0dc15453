// Small heads and searches, drawn from fixed seeds, for the programs beside this file.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/cpu/head.h"
#include "kernels/search.h"

namespace cnnrnn::cases {

using Floats = std::vector<float>;

inline Floats uniform(int64_t n, float bound, std::mt19937* random) {
  std::uniform_real_distribution<float> draw(-bound, bound);
  Floats values(n);
  for (float& value : values) value = draw(*random);
  return values;
}

// Weights whose distributions are neither flat nor one-hot, as in tests/replay.py.
class RandomWeights {
 public:
  RandomWeights(int64_t L, int64_t D, int64_t H, Cell cell, unsigned seed)
      : L_(L), D_(D), H_(H), cell_(cell), random_(seed) {
    const float scale = cell == Cell::kPaper ? 1.0f : 3.0f;  // a ReLU cell squares its input
    const float joint = scale / std::sqrt(static_cast<float>(D));
    const float hidden = scale / std::sqrt(static_cast<float>(H));
    label_embedding_ = uniform((L + 2) * D, joint, &random_);
    input_embedding_ = uniform((L + 2) * D, joint, &random_);
    score_bias_ = uniform(L + 1, 1.0f, &random_);
    input_weight_ = uniform(4 * H * D, joint, &random_);
    hidden_weight_ = uniform(4 * H * H, hidden, &random_);
    bias_ = uniform(4 * H, 1.0f, &random_);
    output_projection_ = uniform(D * H, hidden, &random_);
  }

  HeadWeights view() const {
    return {.num_labels = L_,
            .joint_dim = D_,
            .hidden_dim = H_,
            .cell = cell_,
            .activation = Activation::kTanh,
            .label_embedding = label_embedding_.data(),
            .input_embedding = input_embedding_.data(),
            .score_bias = score_bias_.data(),
            .input_weight = input_weight_.data(),
            .hidden_weight = hidden_weight_.data(),
            .input_bias = bias_.data(),
            .hidden_bias = nullptr,
            .output_projection = output_projection_.data()};
  }

 private:
  const int64_t L_, D_, H_;
  const Cell cell_;
  std::mt19937 random_;
  Floats label_embedding_, input_embedding_, score_bias_, input_weight_, hidden_weight_, bias_,
      output_projection_;
};

// The arguments of one call.
struct Search {
  SearchOptions options;
  int64_t batch;
  Floats joint;         // [B, D]
  Floats label_logits;  // [B, L+1] or empty
  bool marginals;

  Search(const SearchOptions& options, const HeadWeights& head, int64_t batch, bool label_logits,
         bool marginals, unsigned seed)
      : options(options), batch(batch), marginals(marginals) {
    std::mt19937 random(seed);
    joint = uniform(batch * head.joint_dim, 3.0f, &random);
    if (label_logits) this->label_logits = uniform(batch * (head.num_labels + 1), 4.0f, &random);
  }
};

// What a call wrote.
struct Result {
  std::vector<int64_t> labels, lengths;
  Floats log_probs, marginals;
  std::vector<int32_t> trace;
  SearchStats stats;

  Result(const Search& search, int64_t num_labels) {
    const int64_t B = search.batch, N = search.options.beam_size, T = search.options.max_labels;
    labels.resize(B * N * T);
    lengths.resize(B * N);
    log_probs.resize(B * N);
    if (search.marginals) marginals.resize(B * num_labels);
    trace.resize(B * (T + 1) * N * 2);
  }
};

inline void search_into(CpuHead* head, const Search& search, const ParallelFor& parallel_for,
                        Result* result) {
  result->stats =
      beam_search_cpu(head, search.options,
                      {search.batch, search.joint.data(),
                       search.label_logits.empty() ? nullptr : search.label_logits.data()},
                      {result->labels.data(), result->lengths.data(), result->log_probs.data(),
                       search.marginals ? result->marginals.data() : nullptr, nullptr,
                       result->trace.data(), search.options.beam_size},
                      parallel_for);
}

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  if (a.size() != b.size()) return false;
  return a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

inline bool same_bits(const Result& a, const Result& b) {
  return same_bits(a.labels, b.labels) && same_bits(a.lengths, b.lengths) &&
         same_bits(a.log_probs, b.log_probs) && same_bits(a.marginals, b.marginals) &&
         same_bits(a.trace, b.trace);
}

inline std::vector<const CpuKernels*> instruction_sets() {
  std::vector<const CpuKernels*> found;
  for (const char* name : {"portable", "avx2", "avx512"}) {
    if (const CpuKernels* kernels = find_cpu_kernels(name)) found.push_back(kernels);
  }
  return found;
}

}  // namespace cnnrnn::cases
