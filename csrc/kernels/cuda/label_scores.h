// How a warp scores 16 rows against a panel of 32 labels: z = U_l x + bias, twice. Device code.
//
// ExactScores multiplies in fp32. A lane owns 4 rows x 4 labels, so that 8 loads of 16 bytes feed
// 64 multiply-adds; 8 lanes, a group, share their rows. FastScores multiplies fp16 on the tensor
// cores and sums in fp32 (mma.m16n8k16). A lane owns what that instruction gives it: 2 rows x 8
// labels; 4 lanes are a group.
//
// For both, the rows of a lane are group, group + kGroups, ..., its labels ascend, and the lane's
// place in its group says which.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/device_head.h"

namespace cnnrnn {

constexpr int kWarpLanes = 32;

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % kWarpLanes; }

// Where the kernels run on the CPU, for tests, their stand-in for CUDA's header has these three.
#if defined(__CUDACC__)

// 2^x within 2 ulp; 0 where it would be subnormal.
__device__ __forceinline__ float exp2_approx(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// Two floats, rounded to nearest: `low` in the low half.
__device__ __forceinline__ uint32_t pack_halves(float low, float high) {
  uint32_t halves;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(halves) : "f"(high), "f"(low));
  return halves;
}

// sums += a b for a [16, 16] and b [16, 8] of halves, spread over the warp as PTX lays down.
__device__ __forceinline__ void mma_m16n8k16(float (&sums)[4], const uint32_t (&a)[4], uint2 b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
}

#endif

struct ExactScores {
  static constexpr int kLanesPerRow = 8, kRows = 4, kLabels = 4;
  static constexpr int kGroups = kWarpLanes / kLanesPerRow;
  using Scores = float[kRows][kLabels];
  using Element = float;              // of the rows in shared memory
  static constexpr int kPadding = 4;  // elements after each row, against bank conflicts

  // The j-th label of a lane within a panel.
  CNNRNN_METHOD static int label(int lane, int j) { return lane % kLanesPerRow + kLanesPerRow * j; }

  // A lane's scores of one row into that row [32], and back.
  static __device__ __forceinline__ void put_scores(float* row, const float (&scores)[kLabels]) {
#pragma unroll
    for (int j = 0; j < kLabels; ++j) row[label(lane_id(), j)] = scores[j];
  }
  static __device__ __forceinline__ void get_scores(const float* row, float (&scores)[kLabels]) {
#pragma unroll
    for (int j = 0; j < kLabels; ++j) scores[j] = row[label(lane_id(), j)];
  }

  // A panel in memory: weights [stride / 4, 32, 4], so that the lanes of a warp read 16 bytes side
  // by side, then the bias [32], -inf past END.
  CNNRNN_METHOD static int64_t bias_at(int stride) {
    return static_cast<int64_t>(sizeof(float)) * kPanelLabels * stride;
  }
  __device__ static void put_weight(unsigned char* panel, int, int at, int d, float weight) {
    reinterpret_cast<float*>(panel)[(d / 4 * kPanelLabels + at) * 4 + d % 4] = weight;
  }

  __device__ static void put_row(Element* row, int quad, float4 x) {
    reinterpret_cast<float4*>(row)[quad] = x;
  }

  // The rows of a lane, as they stand in shared memory.
  template <int kJoint>
  struct Rows {
    const float* first;

    __device__ __forceinline__ Rows(const Element* joint, int stride)
        : first(joint + lane_id() / kLanesPerRow * (stride + kPadding)) {}
  };

  // kJoint is the stride where it is known when compiling, else 0.
  template <int kJoint>
  static __device__ __forceinline__ void multiply(const Rows<kJoint>& rows,
                                                  const unsigned char* panel, int stride,
                                                  Scores& z) {
    const int D = kJoint > 0 ? kJoint : stride;
    const float4* weights = reinterpret_cast<const float4*>(panel) + lane_id() % kLanesPerRow;
    const float* bias = reinterpret_cast<const float*>(panel + bias_at(D));
#pragma unroll
    for (int j = 0; j < kLabels; ++j) {
      const float of_label = bias[label(lane_id(), j)];
#pragma unroll
      for (int i = 0; i < kRows; ++i) z[i][j] = of_label;
    }
#pragma unroll 1  // more would pass the 128 registers of two blocks a multiprocessor
    for (int quad = 0; quad < D / 4; ++quad) {
      float4 x[kRows], w[kLabels];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        x[i] = reinterpret_cast<const float4*>(rows.first + i * kGroups * (D + kPadding))[quad];
      }
#pragma unroll
      for (int j = 0; j < kLabels; ++j) w[j] = weights[quad * kPanelLabels + j * kLanesPerRow];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kLabels; ++j) {
          z[i][j] = fmaf(x[i].x, w[j].x, z[i][j]);
          z[i][j] = fmaf(x[i].y, w[j].y, z[i][j]);
          z[i][j] = fmaf(x[i].z, w[j].z, z[i][j]);
          z[i][j] = fmaf(x[i].w, w[j].w, z[i][j]);
        }
      }
    }
  }
};

struct FastScores {
  static constexpr int kLanesPerRow = 4, kRows = 2, kLabels = 8;
  static constexpr int kGroups = kWarpLanes / kLanesPerRow;
  using Scores = float[kRows][kLabels];
  using Element = uint16_t;  // the bits of a half
  static constexpr int kPadding = 8;
  static constexpr int kStep = 16;  // of k in one instruction

  CNNRNN_METHOD static int label(int lane, int j) {
    return j / 2 * 8 + lane % kLanesPerRow * 2 + j % 2;
  }

  static __device__ __forceinline__ void put_scores(float* row, const float (&scores)[kLabels]) {
#pragma unroll
    for (int j = 0; j < kLabels; j += 2) {
      *reinterpret_cast<float2*>(row + label(lane_id(), j)) = make_float2(scores[j], scores[j + 1]);
    }
  }
  static __device__ __forceinline__ void get_scores(const float* row, float (&scores)[kLabels]) {
#pragma unroll
    for (int j = 0; j < kLabels; j += 2) {
      const float2 two = *reinterpret_cast<const float2*>(row + label(lane_id(), j));
      scores[j] = two.x;
      scores[j + 1] = two.y;
    }
  }

  // A panel in memory: what each lane gives the instruction, [2 pairs of tiles of 8 labels,
  // stride / 16, 32 lanes] of four halves for either tile, then the bias [32] of floats.
  CNNRNN_METHOD static int64_t bias_at(int stride) {
    return static_cast<int64_t>(sizeof(Element)) * kPanelLabels * stride;
  }
  __device__ static void put_weight(unsigned char* panel, int stride, int at, int d, float weight) {
    const int tile = at / 8, step = d / kStep, k = d % kStep;
    const int lane = at % 8 * kLanesPerRow + k % 8 / 2;
    const int half = tile % 2 * 4 + k / 8 * 2 + k % 2;
    reinterpret_cast<Element*>(
        panel)[((tile / 2 * (stride / kStep) + step) * kWarpLanes + lane) * 8 + half] =
        static_cast<Element>(pack_halves(weight, 0.0f));
  }

  __device__ static void put_row(Element* row, int quad, float4 x) {
    reinterpret_cast<uint2*>(row)[quad] = {pack_halves(x.x, x.y), pack_halves(x.z, x.w)};
  }

  // A lane's part of 16 x 16 elements from column k on: rows group and group + 8.
  static __device__ __forceinline__ void load(const Element* joint, int stride, int k,
                                              uint32_t (&a)[4]) {
    const int group = lane_id() / kLanesPerRow, column = k + lane_id() % kLanesPerRow * 2;
    const Element* low = joint + group * (stride + kPadding) + column;
    const Element* high = low + kGroups * (stride + kPadding);
    a[0] = *reinterpret_cast<const uint32_t*>(low);
    a[1] = *reinterpret_cast<const uint32_t*>(high);
    a[2] = *reinterpret_cast<const uint32_t*>(low + 8);
    a[3] = *reinterpret_cast<const uint32_t*>(high + 8);
  }

  template <int kJoint>
  struct Rows {  // in registers from panel to panel
    uint32_t parts[kJoint / kStep][4];

    __device__ __forceinline__ Rows(const Element* joint, int) {
#pragma unroll
      for (int step = 0; step < kJoint / kStep; ++step) {
        load(joint, kJoint, step * kStep, parts[step]);
      }
    }
  };

  template <int kJoint>
  static __device__ __forceinline__ void multiply(const Rows<kJoint>& rows,
                                                  const unsigned char* panel, int stride,
                                                  Scores& z) {
    const int D = kJoint > 0 ? kJoint : stride, steps = D / kStep;
    const uint4* weights = reinterpret_cast<const uint4*>(panel) + lane_id();
    const float* bias = reinterpret_cast<const float*>(panel + bias_at(D));
#pragma unroll
    for (int pair = 0; pair < kLabels / 4; ++pair) {  // of tiles of 8 labels
      float sums[2][4];
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const float2 of_labels =
            *reinterpret_cast<const float2*>(bias + label(lane_id(), 4 * pair + 2 * tile));
        sums[tile][0] = sums[tile][2] = of_labels.x;
        sums[tile][1] = sums[tile][3] = of_labels.y;
      }
      const auto take_step = [&](const uint32_t (&part)[4], int step) {
        const uint4 b = weights[(pair * steps + step) * kWarpLanes];
        mma_m16n8k16(sums[0], part, {b.x, b.y});
        mma_m16n8k16(sums[1], part, {b.z, b.w});
      };
      if constexpr (kJoint > 0) {
#pragma unroll
        for (int step = 0; step < kJoint / kStep; ++step) take_step(rows.parts[step], step);
      } else {
        for (int step = 0; step < steps; ++step) {
          uint32_t part[4];
          load(rows.joint, stride, step * kStep, part);
          take_step(part, step);
        }
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) z[i][4 * pair + j] = sums[j / 2][2 * i + j % 2];
      }
    }
  }
};

template <>
struct FastScores::Rows<0> {
  const Element* joint;

  __device__ __forceinline__ Rows(const Element* joint, int) : joint(joint) {}
};

template <typename S>
CNNRNN_INLINE int64_t panel_bytes(int stride) {
  return S::bias_at(stride) + kPanelLabels * static_cast<int64_t>(sizeof(float));
}

}  // namespace cnnrnn
