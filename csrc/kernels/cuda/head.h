// A head on one GPU: its packed weights, its prefix table, and the search that uses them.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>

#include "kernels/cuda/device_head.h"
#include "kernels/cuda/search.h"
#include "kernels/cuda/states.h"
#include "kernels/search.h"

namespace cnnrnn {

// Where device memory comes from: the caller's allocator, which frees in the stream's order.
class DeviceMemory {
 public:
  virtual ~DeviceMemory() = default;
  virtual void* allocate(int64_t bytes) = 0;  // 256-byte aligned; freed with this object
};

class CudaHead {
 public:
  // Copies the weights, which are in the memory of `device`. Kept prefix states take about
  // `prefix_bytes`, all of which `memory` is asked for here; it must outlive the head.
  CudaHead(const HeadWeights& weights, int64_t prefix_bytes, int device, DeviceMemory* memory,
           cudaStream_t stream);
  ~CudaHead();
  CudaHead(const CudaHead&) = delete;
  CudaHead& operator=(const CudaHead&) = delete;

  int64_t num_labels() const { return head_.num_labels; }
  int64_t joint_dim() const { return head_.joint_dim; }

  // Finds the N best label paths of every image, whose embeddings are on the device, as outputs
  // are; `images.evidence` is not. An image may have kMaxCudaPaths live paths over all its banks.
  // Safe to call from several threads and on several streams: calls for one head follow each
  // other, on the device too. Returns when all is written, but in a stream that is being captured
  // at once: the statistics are zeros then, and an image for which the table has no room is marked
  // by a length of -1.
  SearchStats search(const SearchOptions& options, const ImageEmbeddings& images,
                     const SearchOutput& output, DeviceMemory* scratch, cudaStream_t stream,
                     int64_t rounds = kAllRounds);

  // Whether a graph has been captured, which reads this head's memory whenever it is replayed.
  bool was_captured() const { return was_captured_; }

  // Forgets all prefix states but the root's.
  void clear(cudaStream_t stream);

 private:
  struct Scratch;

  void search_group(SearchPass pass, int64_t count, const Scratch& scratch, bool counts_are_clear,
                    bool captured, int64_t rounds, cudaStream_t stream);
  void search_slice(const SearchPass& slice, const Scratch& scratch, bool counts_are_clear,
                    cudaStream_t stream);
  int64_t run_rounds(SearchPass pass, const Scratch& scratch, bool counts_are_clear,
                     cudaStream_t stream);
  void enqueue_rounds(SearchPass pass, const Scratch& scratch, int64_t rounds, cudaStream_t stream);
  void read_counts(cudaStream_t stream);

  CudaDevice device_;
  DeviceHead head_;
  DeviceCounts* counts_;   // pinned: a copy of the device's
  cudaEvent_t last_call_;  // where the last call ends
  std::atomic<bool> was_captured_ = false;
  std::mutex mutex_;
};

}  // namespace cnnrnn
