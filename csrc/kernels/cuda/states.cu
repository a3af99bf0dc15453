// Makes the states of label prefixes on the device: equations 1 and 3 for all that are missing.
//
// Four launches a round, whatever is missing; each reads on the device how much there is to do.
// 1. multiply_rows: U_r r' of every prefix that is extended for the first time, once for all its
//    children. Nearly all of the work: 4 H^2 multiply-adds each. A block owns 64 rows x 64 columns,
//    a thread 4 x 4 of them, and sums over k in ascending order whatever the number of rows, so
//    that a state is the same bits in whichever batch it is first made.
// 2. step_cells: a thread owns one unit of one new prefix, and the first one publishes its node.
// 3. multiply_rows: U_o o of the new prefixes, which is all that scoring reads.
// 4. end_round: one thread says that they are ready.
// From the roofline, not measured: 4 H^2 = 1 M multiply-adds a parent at H = 512 are 31 ns at an
// H200's 33.5 T/s; U_r (4 MB) stays in the second-level cache.

#include <cstdint>

#include "kernels/cuda/device_head.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/states.h"
#include "kernels/math.h"

namespace cnnrnn {

extern __shared__ __align__(16) unsigned char dynamic_shared[];

namespace {

constexpr int kThreads = 256;
constexpr int kBlock = 64;           // rows and columns of a block
constexpr int kDepth = 16;           // of k in shared memory at once
constexpr int kOwn = 4;              // rows and columns of a thread
constexpr int kStride = kBlock + 4;  // keeps 16-byte alignment, spreads the banks
constexpr int kLoads = kBlock * kDepth / kThreads;
constexpr size_t kProductShared = 2 * kDepth * kStride * sizeof(float);
static_assert(kThreads * kOwn * kOwn == kBlock * kBlock);

// out[r] = bias + x[source(r)] weight^T for rows first..last.
struct MatrixProduct {
  const float* x;           // [*, K]
  const int32_t* source;    // [rows] or null: row r itself
  const float* weight;      // [columns, K]
  const float* bias;        // [columns] or null
  const float* other_bias;  // [columns] or null
  float* out;               // [rows, columns]
  int32_t K, columns;
  const int32_t *first, *last;  // on the device; null: 0 and limit
  int32_t limit;                // `last` may not pass it
};

// One thread's share of a block's kDepth columns of 64 rows; 0 outside.
__device__ __forceinline__ void fetch(const float* rows, const int32_t* source, int32_t first,
                                      int32_t last, int32_t K, int32_t k0,
                                      float (&values)[kLoads]) {
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int at = static_cast<int>(threadIdx.x) + i * kThreads;
    const int32_t r = first + at / kDepth, k = k0 + at % kDepth;
    const bool inside = r < last && k < K;
    const int64_t row = !inside ? 0 : source == nullptr ? r : source[r];
    values[i] = inside ? rows[row * K + k] : 0.0f;
  }
}

__device__ __forceinline__ void put(const float (&values)[kLoads], float* shared) {
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int at = static_cast<int>(threadIdx.x) + i * kThreads;
    shared[at % kDepth * kStride + at / kDepth] = values[i];
  }
}

__global__ void __launch_bounds__(kThreads) multiply_rows(MatrixProduct p) {
  float* const xs = reinterpret_cast<float*>(dynamic_shared);  // [kDepth, kStride]
  float* const ws = xs + kDepth * kStride;                     // [kDepth, kStride]
  const int32_t first = p.first == nullptr ? 0 : *p.first;
  const int32_t last = p.last == nullptr || *p.last > p.limit ? p.limit : *p.last;
  const int column_blocks = (p.columns + kBlock - 1) / kBlock;
  const int64_t row_blocks = (last - first + kBlock - 1) / kBlock;
  const int row = static_cast<int>(threadIdx.x) / (kBlock / kOwn) * kOwn;
  const int column = static_cast<int>(threadIdx.x) % (kBlock / kOwn) * kOwn;
  for (int64_t block = blockIdx.x; block < row_blocks * column_blocks; block += gridDim.x) {
    const int32_t r0 = first + static_cast<int32_t>(block / column_blocks) * kBlock;
    const int32_t c0 = static_cast<int32_t>(block % column_blocks) * kBlock;
    float sums[kOwn][kOwn];
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int32_t c = c0 + column + j;
      float bias = 0.0f;
      if (c < p.columns) {
        if (p.bias != nullptr) bias = p.bias[c];
        if (p.other_bias != nullptr) bias += p.other_bias[c];
      }
#pragma unroll
      for (int i = 0; i < kOwn; ++i) sums[i][j] = bias;
    }
    float x_next[kLoads], w_next[kLoads];
    fetch(p.x, p.source, r0, last, p.K, 0, x_next);
    fetch(p.weight, nullptr, c0, p.columns, p.K, 0, w_next);
    for (int32_t k0 = 0; k0 < p.K; k0 += kDepth) {
      __syncthreads();  // the last values have been read
      put(x_next, xs);
      put(w_next, ws);
      __syncthreads();
      if (k0 + kDepth < p.K) {
        fetch(p.x, p.source, r0, last, p.K, k0 + kDepth, x_next);
        fetch(p.weight, nullptr, c0, p.columns, p.K, k0 + kDepth, w_next);
      }
#pragma unroll
      for (int k = 0; k < kDepth; ++k) {
        const float4 x4 = *reinterpret_cast<const float4*>(xs + k * kStride + row);
        const float4 w4 = *reinterpret_cast<const float4*>(ws + k * kStride + column);
        const float x[kOwn] = {x4.x, x4.y, x4.z, x4.w};
        const float w[kOwn] = {w4.x, w4.y, w4.z, w4.w};
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
#pragma unroll
          for (int j = 0; j < kOwn; ++j) sums[i][j] = fmaf(x[i], w[j], sums[i][j]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        const int32_t r = r0 + row + i, c = c0 + column + j;
        if (r < last && c < p.columns) p.out[static_cast<int64_t>(r) * p.columns + c] = sums[i][j];
      }
    }
  }
}

__device__ __forceinline__ int32_t new_nodes_end(const DeviceHead& head) {
  return head.counts->prefix.nodes < head.node_capacity ? head.counts->prefix.nodes
                                                        : head.node_capacity;
}

__global__ void __launch_bounds__(kThreads) step_cells(DeviceHead head) {
  const int32_t first = head.counts->prefix.ready_nodes, last = new_nodes_end(head);
  const int64_t H = head.hidden_dim, total = (last - first) * H;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total;
       i += step) {
    const int32_t node = first + static_cast<int32_t>(i / H);
    const int64_t unit = i % H;
    const int32_t parent = head.node_parent[node];
    const float* input = head.input_gates + static_cast<int64_t>(head.node_label[node]) * 4 * H;
    float gates[4], previous = 0.0f;
#pragma unroll
    for (int g = 0; g < 4; ++g) gates[g] = input[g * H + unit];
    if (parent >= 0) {
      const int32_t row = head.node_gates[parent];
      if (row < 0) continue;  // the table was full: the node stays pending until it is cleared
      const float* recurrent = head.recurrent_gates + static_cast<int64_t>(row) * 4 * H;
#pragma unroll
      for (int g = 0; g < 4; ++g) gates[g] += recurrent[g * H + unit];
      previous = head.cell_state[parent * H + unit];
    }
    float* const output = head.output + node * H + unit;
    float* const cell = head.cell_state + node * H + unit;
    if (head.cell == Cell::kLstm) {
      lstm_unit(gates[0], gates[1], gates[2], gates[3], previous, output, cell);
    } else {
      paper_unit(gates[0], gates[1], gates[2], gates[3], previous, output, cell);
    }
    if (unit == 0 && node != kRootNode) publish_node(head.slots + head.node_slot[node], node);
  }
}

// The state before START is zeros: the recurrent weights add nothing to START's gates [4H], or NaN
// where one is not finite.
__global__ void __launch_bounds__(kThreads)
    add_product_with_zeros(const float* hidden_weight, int64_t H, float* gates) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < 4 * H * H;
       i += step) {
    if (!isfinite(hidden_weight[i])) gates[i / H] = NAN;
  }
}

// What was new is ready; the next pass begins its list of parked images anew.
__global__ void end_round(DeviceHead head, int32_t* next_parked_count) {
  head.counts->prefix.ready_nodes = new_nodes_end(head);
  head.counts->prefix.ready_parents = head.counts->prefix.parents < head.parent_capacity
                                          ? head.counts->prefix.parents
                                          : head.parent_capacity;
  if (next_parked_count != nullptr) *next_parked_count = 0;
}

// Empties the table where it lacks room for so many more: a new generation frees every slot. The
// root's state is the same in each; without one yet, `root_ready` 0, it is to be made.
__global__ void __launch_bounds__(kThreads)
    make_room(DeviceHead head, int32_t nodes, int32_t parents, int32_t root_ready) {
  PrefixCounts& counts = head.counts->prefix;
  const bool has_room = nodes <= head.node_capacity - counts.nodes &&
                        parents <= head.parent_capacity - counts.parents;
  const bool forgets = counts.generation == kLastGeneration;
  __syncthreads();  // all threads have read the counts
  if (has_room) return;
  if (forgets) {
    for (uint64_t i = threadIdx.x; i <= head.slot_mask; i += kThreads) head.slots[i] = {0, 0};
  }
  if (threadIdx.x != 0) return;
  counts = {forgets ? 1 : counts.generation + 1, 1, 0, root_ready, 0};
  head.node_parent[kRootNode] = -1;
  head.node_label[kRootNode] = head.num_labels + 1;  // START
  head.node_gates[kRootNode] = kNoGates;
}

int64_t blocks_for(int64_t work, int64_t per_block, int multiprocessors) {
  const int64_t wanted = (work + per_block - 1) / per_block;
  const int64_t most = int64_t{4} * multiprocessors;
  return wanted < 1 ? 1 : wanted < most ? wanted : most;
}

}  // namespace

void pack_recurrence(const HeadWeights& weights, const DeviceHead& head,
                     const RecurrentWeights& packed, int multiprocessors, cudaStream_t stream) {
  const int64_t D = head.joint_dim, H = head.hidden_dim;
  const auto copy = [&](float* to, const float* from, int64_t floats) {
    check_cuda(cudaMemcpyAsync(to, from, floats * sizeof(float), cudaMemcpyDeviceToDevice, stream),
               "copying a head's weights");
  };
  copy(packed.hidden_weight, weights.hidden_weight, 4 * H * H);
  check_cuda(
      cudaMemsetAsync(packed.output_projection, 0, head.joint_stride * H * sizeof(float), stream),
      "clearing a head's weights");
  copy(packed.output_projection, weights.output_projection, D * H);
  const int32_t rows = head.num_labels + 2, columns = static_cast<int32_t>(4 * H);
  const MatrixProduct input{input_rows(weights),
                            nullptr,
                            weights.input_weight,
                            weights.input_bias,
                            weights.hidden_bias,
                            packed.input_gates,
                            head.joint_dim,
                            columns,
                            nullptr,
                            nullptr,
                            rows};
  launch("multiply_rows", multiply_rows,
         blocks_for(int64_t{rows} * columns, kBlock * kBlock, multiprocessors), kThreads,
         kProductShared, stream, input);
  launch("add_product_with_zeros", add_product_with_zeros,
         blocks_for(4 * H * H, kThreads, multiprocessors), kThreads, 0, stream,
         static_cast<const float*>(packed.hidden_weight), H,
         packed.input_gates + (rows - 1) * 4 * H);
}

void make_prefix_room(const DeviceHead& head, int64_t nodes, int64_t parents, bool root_ready,
                      cudaStream_t stream) {
  launch("make_room", make_room, 1, kThreads, 0, stream, head, static_cast<int32_t>(nodes),
         static_cast<int32_t>(parents), root_ready ? 1 : 0);
}

void make_states(const DeviceHead& head, int64_t most_new, int32_t* next_parked_count,
                 int multiprocessors, cudaStream_t stream) {
  const int32_t H = head.hidden_dim;
  const float* fed_back = head.cell == Cell::kLstm ? head.output : head.cell_state;
  const MatrixProduct gates{fed_back,
                            head.gates_parent,
                            head.hidden_weight,
                            nullptr,
                            nullptr,
                            head.recurrent_gates,
                            H,
                            4 * H,
                            &head.counts->prefix.ready_parents,
                            &head.counts->prefix.parents,
                            head.parent_capacity};
  launch("multiply_rows", multiply_rows,
         blocks_for(most_new * 4 * H, kBlock * kBlock, multiprocessors), kThreads, kProductShared,
         stream, gates);
  launch("step_cells", step_cells, blocks_for(most_new * H, kThreads, multiprocessors), kThreads, 0,
         stream, head);
  const MatrixProduct projection{head.output,
                                 nullptr,
                                 head.output_projection,
                                 nullptr,
                                 nullptr,
                                 head.projected,
                                 H,
                                 head.joint_stride,
                                 &head.counts->prefix.ready_nodes,
                                 &head.counts->prefix.nodes,
                                 head.node_capacity};
  launch("multiply_rows", multiply_rows,
         blocks_for(most_new * head.joint_stride, kBlock * kBlock, multiprocessors), kThreads,
         kProductShared, stream, projection);
  launch("end_round", end_round, 1, 1, 0, stream, head, next_parked_count);
}

}  // namespace cnnrnn
