#include <algorithm>
#include <cstdio>
#include <numeric>
#include <random>
#include <vector>

#include "cuda_runtime.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;
__shared__ __align__(16) unsigned char cnnrnn::dynamic_shared[228 * 1024];

// Leaves the registers that calls preserve on this stack and its top in *from; goes on where the
// stack with the top `to` was left. swapcontext would make a system call each time.
extern "C" void cuda_on_cpu_switch(void** from, void* to);
asm(R"(.text
cuda_on_cpu_switch:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi); mov %rsi, %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; pop %rcx; jmp *%rcx)");

namespace cuda_on_cpu {

int lane;
TakeLaunch take_launch;

namespace {

constexpr size_t kStackBytes = 256 * 1024;  // which take memory as they are touched
constexpr size_t kGuardBytes = 1024;        // after a block's shared memory, not to be written

struct Fiber {
  void* stack_top = nullptr;    // while it does not run
  const char* waits = nullptr;  // in which collective; null: it has exited
  bool for_block = false;       // rather than for its warp
};

std::vector<Fiber> fibers;  // by thread; made once
Fiber* running;
void* scheduler_top;
std::function<void()> run_thread;
uint64_t exchanges[32][2][32];  // by warp: lanes may fill one while others still read the last
int turn[32];                   // the one being filled
bool block_votes, block_result, capturing;
LaneOrder lane_order;
std::mt19937 random_bits;
int multiprocessors = 3, max_shared = 227 * 1024, last_shared;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_cpu: block %u: %s\n", blockIdx.x, what);
  std::abort();
}

void wait(const char* collective, bool for_block) {
  running->waits = collective;
  running->for_block = for_block;
  cuda_on_cpu_switch(&running->stack_top, scheduler_top);
}

void run_fiber() {
  for (;;) {
    run_thread();
    wait(nullptr, false);
  }
}

Fiber make_fiber() {
  void** end = static_cast<void**>(std::malloc(kStackBytes)) + kStackBytes / sizeof(void*);
  end[-2] = reinterpret_cast<void*>(run_fiber);  // to where the first switch goes
  return {.stack_top = end - 8};
}

// 0 to count - 1 in the order of execution.
std::vector<unsigned> ordered(unsigned count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (lane_order == LaneOrder::kDescending) std::reverse(order.begin(), order.end());
  if (lane_order == LaneOrder::kShuffled) std::shuffle(order.begin(), order.end(), random_bits);
  return order;
}

// Runs each lane of a warp up to its next collective; returns whether that is one of the warp.
bool advance(unsigned warp) {
  for (const unsigned l : ordered(32)) {
    running = &fibers[32 * warp + l];
    if (running->waits == nullptr) continue;
    lane = static_cast<int>(l);
    threadIdx = {32 * warp + l, 0, 0};
    cuda_on_cpu_switch(&scheduler_top, running->stack_top);
  }
  const Fiber* const first = &fibers[32 * warp];
  for (const Fiber* other = first + 1; other < first + 32; ++other) {
    const char *one = first->waits, *two = other->waits;
    if (one == two || (one != nullptr && two != nullptr && std::strcmp(one, two) == 0)) continue;
    std::fprintf(stderr, "warp %u: lane 0 %s, lane %d %s\n", warp, one == nullptr ? "exits" : one,
                 static_cast<int>(other - first), two == nullptr ? "exits" : two);
    fail("lanes of a warp do not meet");
  }
  if (first->waits == nullptr || first->for_block) return false;
  turn[warp] ^= 1;
  return true;
}

void run_block(unsigned threads) {
  for (unsigned i = 0; i < threads; ++i) fibers[i].waits = "the start";
  bool alive = true;
  while (alive) {
    std::vector<unsigned> ready = ordered(threads / 32);
    while (!ready.empty()) {
      const auto shuffled = lane_order == LaneOrder::kShuffled;
      const auto next = ready.begin() + (shuffled ? random_bits() % ready.size() : 0);
      if (!advance(*next)) ready.erase(next);
    }
    block_result = std::exchange(block_votes, false);
    alive = std::any_of(fibers.begin(), fibers.begin() + threads,
                        [](const Fiber& fiber) { return fiber.waits != nullptr; });
  }
}

}  // namespace

void set_lane_order(LaneOrder order, uint32_t seed) {
  lane_order = order;
  random_bits.seed(seed);
}

void set_multiprocessors(int count) { multiprocessors = count; }

void set_max_shared_memory(int bytes) { max_shared = bytes; }

int last_shared_memory() { return last_shared; }

void set_capturing(bool now) { capturing = now; }

const uint64_t* meet(const char* collective, const void* value, size_t bytes) {
  const auto warp = (running - fibers.data()) / 32;
  uint64_t* const exchange = exchanges[warp][turn[warp]];
  exchange[lane] = 0;
  if (bytes > 0) std::memcpy(&exchange[lane], value, bytes);
  wait(collective, false);
  return exchange;
}

bool meet_block(const char* collective, bool vote) {
  block_votes |= vote;
  wait(collective, true);
  return block_result;
}

cudaError_t launch(const cudaLaunchConfig_t& config, std::function<void()> run) {
  const unsigned threads = config.blockDim.x, blocks = config.gridDim.x;
  const size_t shared = config.dynamicSmemBytes;
  if (threads == 0 || threads > 1024 || blocks == 0 || shared > static_cast<size_t>(max_shared)) {
    return cudaErrorInvalidValue;
  }
  if (shared > 0) last_shared = static_cast<int>(shared);
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  run_thread = std::move(run);
  const unsigned whole = (threads + 31) / 32 * 32;
  while (fibers.size() < whole) fibers.push_back(make_fiber());
  for (const unsigned block : ordered(blocks)) {
    blockIdx = {block, 0, 0};
    std::memset(cnnrnn::dynamic_shared, 0xFF, shared + kGuardBytes);
    if (threads < 32) {  // without collectives
      for (threadIdx = {}; threadIdx.x < threads; ++threadIdx.x) run_thread();
    } else {
      run_block(whole);
    }
    const auto* guard = cnnrnn::dynamic_shared + shared;
    if (std::count(guard, guard + kGuardBytes, 0xFF) != kGuardBytes) {
      fail("wrote past its dynamic shared memory");
    }
  }
  return cudaSuccess;
}

void* allocate(size_t bytes) {
  void* memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  if (memory != nullptr) std::memset(memory, 0xFF, bytes);
  return memory;
}

}  // namespace cuda_on_cpu

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? cuda_on_cpu::multiprocessors
                                                       : cuda_on_cpu::max_shared;
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cuda_on_cpu::capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
