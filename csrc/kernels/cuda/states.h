// Entry points of states.cu: packing the recurrence and making prefix states.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/device_head.h"
#include "kernels/search.h"

namespace cnnrnn {

// The recurrence's arrays of a DeviceHead, to be written.
struct RecurrentWeights {
  float* input_gates;
  float* hidden_weight;
  float* output_projection;
};

// Lays out the recurrence's weights, which are in device memory. `head` holds the sizes.
void pack_recurrence(const HeadWeights& weights, const DeviceHead& head,
                     const RecurrentWeights& packed, int multiprocessors, cudaStream_t stream);

// Empties the prefix table, but for the root, where it has no room for so many more nodes and
// parents. Before the root's state has been made, `root_ready` is false.
void make_prefix_room(const DeviceHead& head, int64_t nodes, int64_t parents, bool root_ready,
                      cudaStream_t stream);

// Makes the states of all prefixes that were entered since the last call; `most_new` bounds their
// number for the choice of grids alone. Sets *next_parked_count to 0 unless it is null.
void make_states(const DeviceHead& head, int64_t most_new, int32_t* next_parked_count,
                 int multiprocessors, cudaStream_t stream);

}  // namespace cnnrnn
