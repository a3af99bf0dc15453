#include "kernels/cpu/head.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace cnnrnn {
namespace {

constexpr int64_t kGates = 4;
constexpr int64_t kStateBatch = 1024;  // states made at once: their pointers, not their memory

int64_t vectors_of(int64_t n, int64_t lanes) { return (n + lanes - 1) / lanes; }

// Columns of a matrix [n, K], each column of the product a row here, as panels [vectors, K, lanes].
AlignedFloats panels(const float* rows, int64_t n, int64_t K, int64_t lanes,
                     const ParallelFor& parallel_for) {
  AlignedFloats packed(vectors_of(n, lanes) * K * lanes);
  parallel_for(vectors_of(n, lanes), [&](int64_t begin, int64_t end) {
    for (int64_t j = begin * lanes; j < std::min(end * lanes, n); ++j) {
      if (parallel_for.stopped()) return;
      float* to = packed.data() + j / lanes * K * lanes + j % lanes;
      for (int64_t k = 0; k < K; ++k) to[k * lanes] = rows[j * K + k];
    }
  });
  return packed;
}

}  // namespace

CpuHead::CpuHead(const HeadWeights& weights, const CpuKernels& kernels, int64_t prefix_bytes,
                 const ParallelFor& parallel_for)
    : kernels_(kernels),
      L_(weights.num_labels),
      D_(weights.joint_dim),
      H_(weights.hidden_dim),
      lanes_(kernels.lanes),
      tiles_(vectors_of(H_, lanes_)),
      cell_(weights.cell),
      activation_(weights.activation),
      score_vectors_(vectors_of(L_ + 1, lanes_)),
      joint_vectors_(vectors_of(D_, lanes_)),
      score_panels_(panels(weights.label_embedding, L_ + 1, D_, lanes_, parallel_for)),
      score_start_(score_vectors_ * lanes_, -std::numeric_limits<float>::infinity()),
      output_panels_(panels(weights.output_projection, D_, H_, lanes_, parallel_for)),
      zeros_(tiles_ * kGates * lanes_),
      prefixes_(tiles_ * lanes_, joint_vectors_ * lanes_, prefix_bytes) {
  for (int64_t l = 0; l <= L_; ++l) {
    score_start_.data()[l] = weights.score_bias == nullptr ? 0.0f : weights.score_bias[l];
  }
  pack_recurrent_weights(weights.hidden_weight, parallel_for);
  make_input_gates(weights, parallel_for);
  const uint64_t no_key = kFreeSlot;
  make_batch(&no_key, 1, PrefixTable::kRoot, parallel_for);
}

// Unit u of gate g is row g * H + u of torch's weights.
void CpuHead::pack_recurrent_weights(const float* weights, const ParallelFor& parallel_for) {
  hidden_panels_ = AlignedFloats(tiles_ * H_ * kGates * lanes_);
  parallel_for(tiles_, [&](int64_t begin, int64_t end) {
    for (int64_t g = 0; g < kGates; ++g) {
      for (int64_t u = begin * lanes_; u < std::min(end * lanes_, H_); ++u) {
        const float* row = weights + (g * H_ + u) * H_;
        float* to =
            hidden_panels_.data() + u / lanes_ * H_ * kGates * lanes_ + g * lanes_ + u % lanes_;
        for (int64_t k = 0; k < H_; ++k) to[k * kGates * lanes_] = row[k];
      }
    }
  });
}

// The gates' input half of every label and START, by the same product as everything else.
void CpuHead::make_input_gates(const HeadWeights& weights, const ParallelFor& parallel_for) {
  const int64_t columns = kGates * H_;
  const AlignedFloats input_panels =
      panels(weights.input_weight, columns, D_, lanes_, parallel_for);
  const int64_t vectors = vectors_of(columns, lanes_);
  AlignedFloats bias(vectors * lanes_);
  for (int64_t j = 0; j < columns; ++j) {
    bias.data()[j] = (weights.input_bias == nullptr ? 0.0f : weights.input_bias[j]) +
                     (weights.hidden_bias == nullptr ? 0.0f : weights.hidden_bias[j]);
  }
  input_gates_ = AlignedFloats((L_ + 1) * tiles_ * kGates * lanes_);
  parallel_for(L_ + 1, [&](int64_t begin, int64_t end) {
    AlignedFloats gates(vectors * lanes_);
    for (int64_t row = begin; row < end; ++row) {
      if (parallel_for.stopped()) return;
      const int64_t embedding = row < L_ ? row : L_ + 1;  // START comes after END
      const float* x = input_rows(weights) + embedding * D_;
      float* y = gates.data();
      kernels_.product({1, D_, vectors, &x, input_panels.data(), bias.data(), &y, nullptr});
      if (row == L_) add_product_with_zeros(weights.hidden_weight, y);
      float* to = input_gates_.data() + row * tiles_ * kGates * lanes_;
      for (int64_t g = 0; g < kGates; ++g) {
        for (int64_t u = 0; u < H_; ++u) {
          to[(u / lanes_ * kGates + g) * lanes_ + u % lanes_] = y[g * H_ + u];
        }
      }
    }
  });
}

// The state before START is zeros: the recurrent weights add nothing to START's gates [4H], or NaN
// where one is not finite.
void CpuHead::add_product_with_zeros(const float* weights, float* gates) const {
  for (int64_t j = 0; j < kGates * H_; ++j) {
    const float* row = weights + j * H_;
    const bool finite = std::all_of(row, row + H_, [](float w) { return std::isfinite(w); });
    if (!finite) gates[j] = std::numeric_limits<float>::quiet_NaN();
  }
}

void CpuHead::make_states(const std::vector<uint64_t>& keys, uint32_t stamp,
                          const ParallelFor& parallel_for) {
  const int64_t total = static_cast<int64_t>(keys.size());
  for (int64_t begin = 0; begin < total; begin += kStateBatch) {
    const int64_t count = std::min(kStateBatch, total - begin);
    make_recurrent_gates(keys.data() + begin, count, parallel_for);
    const int32_t first = prefixes_.add(count);
    make_batch(keys.data() + begin, count, first, parallel_for);
    prefixes_.publish(keys.data() + begin, count, first, stamp);
  }
}

// Of the parents that have none yet.
void CpuHead::make_recurrent_gates(const uint64_t* keys, int64_t count,
                                   const ParallelFor& parallel_for) {
  std::vector<int32_t> parents;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t parent = key_parent(keys[i]);
    if (!parents.empty() && parents.back() == parent) continue;
    if (prefixes_.recurrent_gates(parent) == nullptr) parents.push_back(parent);
  }
  if (parents.empty()) return;
  const int64_t made = static_cast<int64_t>(parents.size());
  const int32_t first = prefixes_.add_recurrent_gates(made);
  std::vector<const float*> fed_back(made);
  std::vector<float*> gates(made);
  for (int64_t i = 0; i < made; ++i) {
    // An LSTM feeds its output back, equation 1 its cell.
    fed_back[i] = cell_ == Cell::kLstm ? prefixes_.output(parents[i]) : prefixes_.cell(parents[i]);
    gates[i] = prefixes_.unpublished_gates(static_cast<int32_t>(first + i));
  }
  const RecurrentGates batch{made, H_, hidden_panels_.data(), fed_back.data(), gates.data()};
  // Each thread takes units, so that every weight is read by one thread alone.
  parallel_for(tiles_,
               [&](int64_t begin, int64_t end) { kernels_.multiply_states(batch, begin, end); });
  prefixes_.publish_recurrent_gates(parents.data(), made, first);
}

// States of nodes first, first + 1, ...; without a key, that of the root.
void CpuHead::make_batch(const uint64_t* keys, int64_t count, int32_t first,
                         const ParallelFor& parallel_for) {
  std::vector<const float*> input(count), recurrent(count), previous(count), outputs(count);
  std::vector<float*> output(count), next(count), projected(count);
  for (int64_t i = 0; i < count; ++i) {
    const int32_t node = static_cast<int32_t>(first + i);
    const bool is_root = keys[i] == kFreeSlot;
    const int64_t input_row = is_root ? L_ : key_label(keys[i]);
    input[i] = input_gates_.data() + input_row * tiles_ * kGates * lanes_;
    recurrent[i] = is_root ? zeros_.data() : prefixes_.recurrent_gates(key_parent(keys[i]));
    previous[i] = is_root ? zeros_.data() : prefixes_.cell(key_parent(keys[i]));
    outputs[i] = output[i] = prefixes_.output(node);
    next[i] = prefixes_.cell(node);
    projected[i] = prefixes_.projected_output(node);
  }
  const CellSteps steps{cell_,           tiles_,        input.data(), recurrent.data(),
                        previous.data(), output.data(), next.data()};
  parallel_for(count, [&](int64_t begin, int64_t end) {
    kernels_.step_cells(steps, begin, end);
    kernels_.product({end - begin, H_, joint_vectors_, outputs.data() + begin,
                      output_panels_.data(), nullptr, projected.data() + begin, nullptr});
  });
}

}  // namespace cnnrnn
