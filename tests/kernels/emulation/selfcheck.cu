// Checks cuda_on_cpu: what collectives give, that order shows a missing barrier, and, by a name on
// the command line, that what a GPU leaves undefined aborts.
// Exit status 1 and the failing lines on standard error where one does not hold.

#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "kernels/cuda/launch.h"

namespace cnnrnn {

extern __shared__ __align__(16) unsigned char dynamic_shared[];

namespace {

using cuda_on_cpu::LaneOrder;

int failures = 0;

void check(bool holds, const char* what, int line) {
  if (holds) return;
  std::fprintf(stderr, "line %d: %s does not hold\n", line, what);
  ++failures;
}
#define CHECK(condition) check((condition), #condition, __LINE__)

constexpr int kResults = 8;

__global__ void collect(int64_t* out) {  // [64, kResults]
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  int64_t* const mine = out + thread * kResults;
  const int64_t wide = int64_t{thread + 1} << 33;
  mine[0] = __shfl_sync(~0u, wide, 31 - lane);
  mine[1] = __shfl_xor_sync(~0u, static_cast<float>(thread), 5) == static_cast<float>(thread ^ 5);
  mine[2] = __ballot_sync(~0u, thread % 3 == 0);
  mine[3] = __any_sync(~0u, thread == 40);
  mine[4] = __all_sync(~0u, thread < 32);
  mine[5] = __reduce_min_sync(~0u, static_cast<unsigned>(100 - thread));
  mine[6] = __syncthreads_or(thread == 63);
  int* const sum = reinterpret_cast<int*>(dynamic_shared);
  if (thread == 0) *sum = 0;
  __syncthreads();
  const int before = atomicAdd(sum, thread);
  __syncthreads();
  mine[7] = *sum + (before < 0 ? 1 : 0);
}

void check_collectives() {
  std::vector<int64_t> out(64 * kResults, -1);
  launch("collect", collect, 1, 64, sizeof(int), nullptr, out.data());
  for (int thread = 0; thread < 64; ++thread) {
    const int64_t* mine = out.data() + thread * kResults;
    const int first = thread / 32 * 32;
    CHECK(mine[0] == int64_t{first + 31 - thread % 32 + 1} << 33);
    CHECK(mine[1] == 1);
    unsigned votes = 0;
    for (int l = 0; l < 32; ++l) votes |= ((first + l) % 3 == 0 ? 1u : 0u) << l;
    CHECK(static_cast<unsigned>(mine[2]) == votes);
    CHECK(mine[3] == (thread >= 32) && mine[4] == (thread < 32));
    CHECK(mine[5] == 100 - (first + 31));
    CHECK(mine[6] == 1 && mine[7] == 63 * 64 / 2);
  }
}

// Each lane hands a value to its neighbour, with a barrier or without.
__global__ void hand_over(int* out, bool synchronised) {
  int* const shared = reinterpret_cast<int*>(dynamic_shared);
  const int lane = static_cast<int>(threadIdx.x);
  shared[lane] = lane;
  if (synchronised) __syncwarp();
  out[lane] = shared[lane ^ 1];
}

bool hands_over(bool synchronised) {
  bool right = true;
  for (const LaneOrder order :
       {LaneOrder::kAscending, LaneOrder::kDescending, LaneOrder::kShuffled}) {
    cuda_on_cpu::set_lane_order(order, 1);
    std::vector<int> out(32, -1);
    launch("hand_over", hand_over, 1, 32, 32 * sizeof(int), nullptr, out.data(), synchronised);
    for (int lane = 0; lane < 32; ++lane) right = right && out[lane] == (lane ^ 1);
  }
  return right;
}

__global__ void diverge() {
  if (threadIdx.x < 7) {
    __syncwarp();
  } else {
    __any_sync(~0u, 1);
  }
}

__global__ void leave() {
  if (threadIdx.x < 7) return;
  __syncwarp();
}

__global__ void overrun() { dynamic_shared[64 + threadIdx.x] = 1; }

}  // namespace

int run(const std::string& planted) {
  if (planted == "diverge") launch("diverge", diverge, 1, 32, 0, nullptr);
  if (planted == "leave") launch("leave", leave, 1, 32, 0, nullptr);
  if (planted == "overrun") launch("overrun", overrun, 1, 32, 64, nullptr);
  if (!planted.empty()) return 0;
  check_collectives();
  CHECK(hands_over(true));
  CHECK(!hands_over(false));
  return failures == 0 ? 0 : 1;
}

}  // namespace cnnrnn

int main(int argc, char** argv) { return cnnrnn::run(argc > 1 ? argv[1] : ""); }
