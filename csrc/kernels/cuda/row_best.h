// The best labels of one path, as the device's search keeps them: offered as panels of labels go
// by, then turned into the path's best continuations and taken one by one. Host and device.
//
// Best first; at equal score the label that was offered first stays ahead, and labels come in
// ascending order.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/math.h"
#include "kernels/search.h"
#include "kernels/topn.h"

namespace cnnrnn {

// What kernels are made for: beams of up to so many, or the banks of an image (banks.h).
constexpr int kSmallBeam = 4;  // keeps less per path
constexpr int kBankedPaths = kMaxCudaPaths;

// For N up to kCapacity, in registers: every index is known when compiling.
template <int kCapacity>
class RowBest {
 public:
  static constexpr int64_t kSharedBytes = 0;

  CNNRNN_METHOD RowBest(unsigned char*, int beam_size) : beam_size_(beam_size) {}

  CNNRNN_METHOD void clear() {
    CNNRNN_UNROLL
    for (float& score : scores_) score = -INFINITY;
  }

  CNNRNN_METHOD void offer(float score, int32_t label) {
    bool before = false;  // from where it enters on, all move by one
    CNNRNN_UNROLL
    for (int at = 0; at < kCapacity; ++at) {
      before = before || score > scores_[at];
      const float next_score = before ? scores_[at] : score;
      const int32_t next_label = before ? labels_[at] : label;
      scores_[at] = before ? score : scores_[at];
      labels_[at] = before ? label : labels_[at];
      score = next_score;
      label = next_label;
    }
  }

  // What a score must exceed to be among the N best.
  CNNRNN_METHOD float bound() const {
    float bound = scores_[0];
    CNNRNN_UNROLL
    for (int at = 1; at < kCapacity; ++at) bound = at < beam_size_ ? scores_[at] : bound;
    return bound;
  }

  // From scores of labels to those of the paths that they continue. Rounding may make some equal.
  CNNRNN_METHOD void extend_path(float path_score, float log_sum_exp) {
    bool tied = false;
    CNNRNN_UNROLL
    for (int at = 0; at < kCapacity; ++at) {
      scores_[at] = path_score + step_log_prob(scores_[at], log_sum_exp);
      if (at > 0) tied = tied || scores_[at] == scores_[at - 1];
    }
    if (!tied) return;
    CNNRNN_UNROLL
    for (int pass = 1; pass < kCapacity; ++pass) {
      CNNRNN_UNROLL
      for (int at = kCapacity - 1; at >= pass; --at) {
        const int32_t one = labels_[at - 1], two = labels_[at];
        const bool swap = scores_[at - 1] == scores_[at] && two < one;
        labels_[at - 1] = swap ? two : one;
        labels_[at] = swap ? one : two;
      }
    }
  }

  CNNRNN_METHOD float first_score() const { return scores_[0]; }  // -inf where none is left
  CNNRNN_METHOD int32_t first_label() const { return labels_[0]; }

  CNNRNN_METHOD void drop_first() {
    CNNRNN_UNROLL
    for (int at = 0; at + 1 < kCapacity; ++at) {
      scores_[at] = scores_[at + 1];
      labels_[at] = labels_[at + 1];
    }
    scores_[kCapacity - 1] = -INFINITY;
  }

 private:
  int beam_size_;
  float scores_[kCapacity];  // -inf where there is none
  int32_t labels_[kCapacity];
};

// The same in memory, where there are too many for registers.
template <int kCapacity>
class RowBestInMemory {
  using List = TopN<int32_t, kCapacity>;

 public:
  static constexpr int64_t kSharedBytes = sizeof(List);

  CNNRNN_METHOD RowBestInMemory(unsigned char* shared, int beam_size)
      : list_(reinterpret_cast<List*>(shared)), beam_size_(beam_size), first_(0) {}

  CNNRNN_METHOD void clear() {
    list_->size = first_ = 0;
    list_->limit = beam_size_;
  }

  CNNRNN_METHOD void offer(float score, int32_t label) { list_->offer(score, label); }
  CNNRNN_METHOD float bound() const { return list_->bound(); }

  CNNRNN_METHOD void extend_path(float path_score, float log_sum_exp) {
    for (int i = 0; i < list_->size; ++i) {
      const float score = path_score + step_log_prob(list_->scores[i], log_sum_exp);
      const int32_t label = list_->items[i];
      list_->scores[i] = score;
      int at = i;
      for (; at > 0 && list_->scores[at - 1] == score && list_->items[at - 1] > label; --at) {
        list_->items[at] = list_->items[at - 1];
      }
      list_->items[at] = label;
    }
  }

  CNNRNN_METHOD float first_score() const {
    return first_ < list_->size ? list_->scores[first_] : -INFINITY;
  }
  CNNRNN_METHOD int32_t first_label() const { return list_->items[first_]; }
  CNNRNN_METHOD void drop_first() { ++first_; }

 private:
  List* list_;
  int beam_size_, first_;
};

template <>
class RowBest<kMaxBeamSize> : public RowBestInMemory<kMaxBeamSize> {
 public:
  using RowBestInMemory::RowBestInMemory;
};

template <>
class RowBest<kBankedPaths> : public RowBestInMemory<kBankedPaths> {
 public:
  using RowBestInMemory::RowBestInMemory;
};

}  // namespace cnnrnn
