// How a label prefix is named and where the index looks for it: once, for host and device.
//
// A prefix is (parent prefix, last label). The root has no name; it is node 0 of every table.
#pragma once

#include <cstdint>

#include "kernels/math.h"

namespace cnnrnn {

constexpr uint64_t kFreeSlot = ~uint64_t{0};  // no key: a parent is never negative

CNNRNN_INLINE uint64_t prefix_key(int32_t parent, int32_t label) {
  return (static_cast<uint64_t>(static_cast<uint32_t>(parent)) << 32) |
         static_cast<uint32_t>(label);
}

CNNRNN_INLINE int32_t key_parent(uint64_t key) { return static_cast<int32_t>(key >> 32); }
CNNRNN_INLINE int32_t key_label(uint64_t key) {
  return static_cast<int32_t>(static_cast<uint32_t>(key));
}

// The slot at which a search for `key` begins; it goes on to the next one until it finds the key or
// a free slot. Mixes all bits of the key (the finaliser of splitmix64).
CNNRNN_INLINE uint64_t first_slot(uint64_t key, uint64_t mask) {
  key = (key ^ (key >> 30)) * 0xbf58476d1ce4e5b9ULL;
  key = (key ^ (key >> 27)) * 0x94d049bb133111ebULL;
  return (key ^ (key >> 31)) & mask;
}

}  // namespace cnnrnn
