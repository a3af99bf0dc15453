// The tie rule, once: a bounded list, best first, in which the one that came first stays ahead.
//
// Live paths are offered in the order (parent rank, label) and finished paths in the order
// (step, parent rank), so at equal score the lower rank and label wins, and the earlier finish.
#pragma once

#include <cmath>

#include "kernels/math.h"

namespace cnnrnn {

template <typename Item, int kCapacity>
struct TopN {
  float scores[kCapacity];
  Item items[kCapacity];
  int size = 0;
  int limit;  // N, at most kCapacity

  CNNRNN_METHOD explicit TopN(int n) : limit(n) {}
  CNNRNN_METHOD TopN(const TopN& other) { *this = other; }
  CNNRNN_METHOD TopN& operator=(const TopN& other) {  // of what is there, not of the capacity
    size = other.size;
    limit = other.limit;
    for (int i = 0; i < size; ++i) {
      scores[i] = other.scores[i];
      items[i] = other.items[i];
    }
    return *this;
  }

  CNNRNN_METHOD bool full() const { return size == limit; }

  CNNRNN_METHOD float worst() const { return scores[size - 1]; }

  // What a score must exceed to enter. A score of -inf never does.
  CNNRNN_METHOD float bound() const { return full() ? scores[limit - 1] : -INFINITY; }

  CNNRNN_METHOD bool admits(float score) const { return score > bound(); }

  CNNRNN_METHOD void offer(float score, const Item& item) {
    if (!admits(score)) return;
    int at = size < limit ? size++ : limit - 1;
    for (; at > 0 && scores[at - 1] < score; --at) {
      scores[at] = scores[at - 1];
      items[at] = items[at - 1];
    }
    scores[at] = score;
    items[at] = item;
  }
};

// A live path's continuation: the rank of the path among its image's live paths, and the label.
struct Extension {
  int32_t parent_rank;
  int32_t label;
};

}  // namespace cnnrnn
