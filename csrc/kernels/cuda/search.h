// Entry points of search.cu: packing label embeddings, and one pass of the search over images.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/device_head.h"

namespace cnnrnn {

struct CudaDevice {
  int index;
  int multiprocessors;
  int64_t shared_bytes;  // that a block may ask for
};

// Takes the images of a pass as far as the states that are there allow: they end, or are parked and
// have asked for states.
void search_images(const DeviceHead& head, const SearchPass& pass, const CudaDevice& device,
                   cudaStream_t stream);

// Lays out the label embedding, which is in device memory, for either precision.
void pack_panels(const HeadWeights& weights, const DeviceHead& head, unsigned char* exact,
                 unsigned char* fast, const CudaDevice& device, cudaStream_t stream);
int64_t exact_panel_bytes(int joint_stride);
int64_t fast_panel_bytes(int joint_stride);

// Memory of a parked image.
int64_t parked_beam_bytes(int beam_size, bool banked);

}  // namespace cnnrnn
