// The index of the device's prefix table: open addressing, entered by many threads without locks.
// Host and device.
//
// A slot is taken for good by whoever changes its key from a free one, and gets its node later,
// when the node's state has been made: until then the prefix is there but pending. Names carry the
// table's generation, so that raising it frees every slot at once.
#pragma once

#include <cstdint>

#include "kernels/math.h"
#include "kernels/prefix_key.h"

namespace cnnrnn {

// The bits of a key: generation 16, parent 28, label 20. Generation 0 is that of fresh memory.
constexpr int kLabelBits = 20, kParentBits = 28;
constexpr uint32_t kLastGeneration = 0xffff;
constexpr int64_t kMostSlotLabels = int64_t{1} << kLabelBits;
constexpr int64_t kMostSlotNodes = int64_t{1} << kParentBits;

struct alignas(16) PrefixSlot {
  uint64_t key;
  uint64_t node;  // and above it, from bit 32, the generation in which it was published
};

CNNRNN_INLINE uint64_t slot_key(uint32_t generation, int32_t parent, int32_t label) {
  return static_cast<uint64_t>(generation) << (kLabelBits + kParentBits) |
         static_cast<uint64_t>(static_cast<uint32_t>(parent)) << kLabelBits |
         static_cast<uint32_t>(label);
}

CNNRNN_INLINE uint32_t key_generation(uint64_t key) {
  return static_cast<uint32_t>(key >> (kLabelBits + kParentBits));
}

// What `at` held; it holds `desired` afterwards if that was `expected`.
CNNRNN_INLINE uint64_t compare_and_swap(uint64_t* at, uint64_t expected, uint64_t desired) {
#if defined(__CUDA_ARCH__)
  static_assert(sizeof(unsigned long long) == sizeof(uint64_t));
  return atomicCAS(reinterpret_cast<unsigned long long*>(at), expected, desired);
#else
  __atomic_compare_exchange_n(at, &expected, desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
#endif
}

constexpr int32_t kNoNode = -1;  // the prefix is not there, or pending

// The node of a prefix, or kNoNode. `mask` is the number of slots less one, a power of two less
// one.
CNNRNN_INLINE int32_t find_node(const PrefixSlot* slots, uint64_t mask, uint64_t key) {
  const uint64_t generation = key_generation(key);
  uint64_t at = first_slot(key, mask);
  for (uint64_t probes = 0; probes <= mask; ++probes, at = (at + 1) & mask) {
    const PrefixSlot slot = slots[at];
    if (slot.key == key) {
      return slot.node >> 32 == generation ? static_cast<int32_t>(slot.node & 0xffffffff) : kNoNode;
    }
    if (key_generation(slot.key) != generation) return kNoNode;
  }
  return kNoNode;
}

enum class Entry { kNew, kThere, kFull };

// Enters a prefix; `slot` is where it stands. Of threads that enter the same one, one gets kNew.
CNNRNN_INLINE Entry enter_prefix(PrefixSlot* slots, uint64_t mask, uint64_t key, uint64_t* slot) {
  const uint32_t generation = key_generation(key);
  uint64_t at = first_slot(key, mask);
  for (uint64_t probes = 0; probes <= mask; ++probes, at = (at + 1) & mask) {
    uint64_t seen = slots[at].key;
    if (seen != key && key_generation(seen) != generation) {
      // Free, as far as this thread has seen: what it has seen may be old.
      const uint64_t found = compare_and_swap(&slots[at].key, seen, key);
      if (found == seen) {
        *slot = at;
        return Entry::kNew;
      }
      seen = found;
    }
    if (seen == key) {
      *slot = at;
      return Entry::kThere;
    }
  }
  return Entry::kFull;
}

CNNRNN_INLINE void publish_node(PrefixSlot* slot, int32_t node) {
  slot->node = static_cast<uint64_t>(key_generation(slot->key)) << 32 | static_cast<uint32_t>(node);
}

}  // namespace cnnrnn
