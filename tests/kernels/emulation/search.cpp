// The CUDA search, run on the CPU by cuda_runtime.h beside this, behind C functions for ctypes.

#include <cstdio>
#include <exception>
#include <memory>
#include <vector>

#include "cuda_runtime.h"
#include "kernels/cuda/head.h"

namespace {

using cnnrnn::CudaHead;

class Allocations : public cnnrnn::DeviceMemory {
 public:
  ~Allocations() override {
    for (void* block : blocks_) std::free(block);
  }
  void* allocate(int64_t bytes) override {
    blocks_.push_back(cuda_on_cpu::allocate(static_cast<size_t>(bytes)));
    if (blocks_.back() == nullptr) throw std::bad_alloc();
    return blocks_.back();
  }

 private:
  std::vector<void*> blocks_;
};

struct OwnedHead {
  Allocations memory;
  std::unique_ptr<CudaHead> head;
};

// Runs `work`; false, with the message in `error`, where it throws.
template <typename Work>
bool caught(char* error, size_t size, Work work) {
  try {
    work();
    return true;
  } catch (const std::exception& e) {
    std::snprintf(error, size, "%s", e.what());
    return false;
  }
}

}  // namespace

extern "C" {

void* new_head(const cnnrnn::HeadWeights* weights, int64_t prefix_bytes, char* error,
               size_t error_size) {
  auto owned = std::make_unique<OwnedHead>();
  const bool made = caught(error, error_size, [&] {
    owned->head = std::make_unique<CudaHead>(*weights, prefix_bytes, 0, &owned->memory, nullptr);
  });
  return made ? owned.release() : nullptr;
}

void delete_head(void* head) { delete static_cast<OwnedHead*>(head); }

void clear_head(void* head) { static_cast<OwnedHead*>(head)->head->clear(nullptr); }

// `captured`: as in a stream that is being captured.
bool search(void* head, const cnnrnn::SearchOptions* options, const cnnrnn::ImageEmbeddings* images,
            const cnnrnn::SearchOutput* output, bool captured, int64_t rounds,
            cnnrnn::SearchStats* stats, char* error, size_t error_size) {
  cuda_on_cpu::set_capturing(captured);
  const bool ended = caught(error, error_size, [&] {
    Allocations scratch;
    *stats = static_cast<OwnedHead*>(head)->head->search(*options, *images, *output, &scratch,
                                                         nullptr, rounds);
  });
  cuda_on_cpu::set_capturing(false);
  return ended;
}

void set_lane_order(int order, uint32_t seed) {
  cuda_on_cpu::set_lane_order(static_cast<cuda_on_cpu::LaneOrder>(order), seed);
}

void set_take_launch(cuda_on_cpu::TakeLaunch take) { cuda_on_cpu::take_launch = take; }

int last_shared_memory() { return cuda_on_cpu::last_shared_memory(); }

void set_multiprocessors(int count) { cuda_on_cpu::set_multiprocessors(count); }

void set_max_shared_memory(int bytes) { cuda_on_cpu::set_max_shared_memory(bytes); }

}  // extern "C"
