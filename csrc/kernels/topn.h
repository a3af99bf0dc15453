// The tie rule, once: a bounded list, best first, in which the one that came first stays ahead.
//
// Live paths are offered in the order (parent rank, label) and finished paths in the order
// (step, parent rank), so at equal score the lower rank and label wins, and the earlier finish.
#pragma once

#include <cmath>

#include "math.h"

namespace cnnrnn {

template <typename Item, int kCapacity>
struct TopN {
  float scores[kCapacity];
  Item items[kCapacity];
  int size = 0;
  int limit;  // N, at most kCapacity

  CNNRNN_DEVICE explicit TopN(int n) : limit(n) {}

  CNNRNN_DEVICE bool full() const { return size == limit; }

  CNNRNN_DEVICE float worst() const { return scores[size - 1]; }

  // Would a path of this score enter? A score of -inf never does.
  CNNRNN_DEVICE bool admits(float score) const {
    return score > -INFINITY && (size < limit || score > scores[limit - 1]);
  }

  CNNRNN_DEVICE void offer(float score, const Item& item) {
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

}  // namespace cnnrnn
