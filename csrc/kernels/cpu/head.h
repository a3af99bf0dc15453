// A head as the CPU search reads it: weights packed for one instruction set, and the prefix states
// that were made with them.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/cpu/aligned_floats.h"
#include "kernels/cpu/loops.h"
#include "kernels/cpu/prefix_table.h"
#include "kernels/search.h"

namespace cnnrnn {

class CpuHead {
 public:
  // Copies the weights. Kept prefix states take at most `prefix_bytes`, but always what one image
  // needs.
  CpuHead(const HeadWeights& weights, const CpuKernels& kernels, int64_t prefix_bytes,
          const ParallelFor& parallel_for = on_this_thread);

  const CpuKernels& kernels() const { return kernels_; }
  PrefixTable& prefixes() { return prefixes_; }
  int64_t num_labels() const { return L_; }
  int64_t joint_dim() const { return D_; }
  int64_t hidden_dim() const { return H_; }
  Activation activation() const { return activation_; }

  // Label scores: vectors per row, their weights [vectors, D, lanes] and their bias, which is -inf
  // past END.
  int64_t score_vectors() const { return score_vectors_; }
  const float* score_panels() const { return score_panels_.data(); }
  const float* score_start() const { return score_start_.data(); }

  // Makes the states of the prefixes under `keys`, ascending, whose parents are there. The product
  // with the recurrent weights, which is nearly all of the work, depends on the parent alone: it is
  // made when the first child is, and kept for the others.
  void make_states(const std::vector<uint64_t>& keys, uint32_t stamp,
                   const ParallelFor& parallel_for);

 private:
  void pack_recurrent_weights(const float* weights, const ParallelFor& parallel_for);
  void make_input_gates(const HeadWeights& weights, const ParallelFor& parallel_for);
  void add_product_with_zeros(const float* weights, float* gates) const;
  void make_recurrent_gates(const uint64_t* keys, int64_t count, const ParallelFor& parallel_for);
  void make_batch(const uint64_t* keys, int64_t count, int32_t first,
                  const ParallelFor& parallel_for);

  const CpuKernels& kernels_;
  const int64_t L_, D_, H_, lanes_, tiles_;  // tiles of `lanes` recurrent units
  const Cell cell_;
  const Activation activation_;
  const int64_t score_vectors_, joint_vectors_;
  AlignedFloats score_panels_;   // [score vectors, D, lanes]
  AlignedFloats score_start_;    // [score vectors, lanes]
  AlignedFloats input_gates_;    // [L+1, tiles, 4, lanes]; U_w w and the biases; row L is START
  AlignedFloats hidden_panels_;  // [tiles, H, 4, lanes]
  AlignedFloats output_panels_;  // [joint vectors, H, lanes]
  AlignedFloats zeros_;          // [tiles, 4, lanes]: gates and state before START
  PrefixTable prefixes_;
};

}  // namespace cnnrnn
