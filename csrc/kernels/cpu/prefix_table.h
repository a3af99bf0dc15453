// Label prefixes and the recurrent state that belongs to each: the part of a search that images
// share and that is kept between calls.
//
// A node is a prefix with its state, found from its parent and its last label. What its children
// have in common, the recurrent half of their gates, is kept with it once it has a child. Its state
// is made by arithmetic whose order does not depend on what else is in the table, so a kept state
// and a fresh one are the same bits: results do not depend on the table's history or size.
//
// Threads: finding is lock-free, since a node's state is written before its key is published and
// never moves while a search is in the table. Adding takes a lock. What was not used for longest
// goes when the byte budget is reached, while no search is in the table.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels/cpu/aligned_floats.h"
#include "kernels/prefix_key.h"

namespace cnnrnn {

class PrefixTable {
 public:
  static constexpr int32_t kRoot = 0;

  // State widths in floats: output and cell [hidden_width] each, U_o o [joint_width].
  PrefixTable(int64_t hidden_width, int64_t joint_width, int64_t byte_budget);

  // A search's stay in the table, during which no node goes. Room for its new nodes is set aside on
  // entry, so that the table stays within its budget wherever the budget holds one stay at all.
  class Stay {
   public:
    Stay(PrefixTable* table, int64_t most_new_nodes);
    ~Stay();
    Stay(const Stay&) = delete;
    Stay& operator=(const Stay&) = delete;
    uint32_t stamp() const { return stamp_; }

   private:
    PrefixTable* table_;
    int64_t reserved_bytes_;
    uint32_t stamp_;
  };

  // The most bytes that one new node takes: its share of the index included, and the recurrent
  // gates of its parent.
  int64_t node_bytes() const { return own_bytes() + gates_bytes(); }
  int64_t byte_budget() const { return byte_budget_; }

  // The node of `parent` extended by `label`, or -1. Marks it as used by the stay of this stamp.
  int32_t find(int32_t parent, int32_t label, uint32_t stamp) const;

  // Brings what `find` will read into the cache.
  void prefetch(int32_t parent, int32_t label) const {
    const Index& index = *current_.load(std::memory_order_acquire);
    __builtin_prefetch(&index.entries[first_slot(prefix_key(parent, label), index.mask)]);
  }

  // Adds `count` nodes that nothing finds yet and returns the first; the caller makes their states.
  int32_t add(int64_t count);

  // Makes nodes first, first + 1, ... findable under these keys. A key that another thread
  // published meanwhile keeps its node: the states are the same.
  void publish(const uint64_t* keys, int64_t count, int32_t first, uint32_t stamp);

  // The recurrent half of the gates of a node's children [4 * hidden_width], or null until the
  // first of them is made.
  const float* recurrent_gates(int32_t node) const {
    const Place at = place(node);
    const int32_t slot = segments_[at.segment].gates[at.offset].load(std::memory_order_acquire);
    return slot < 0 ? nullptr : unpublished_gates(slot);
  }

  // Like `add` and `publish`, for the gates of nodes that have none. Gates that another thread
  // published meanwhile stay.
  int32_t add_recurrent_gates(int64_t count);
  float* unpublished_gates(int32_t slot) const {
    const Place at = place(slot);
    return gates_[at.segment].data() + at.offset * 4 * hidden_width_;
  }
  void publish_recurrent_gates(const int32_t* nodes, int64_t count, int32_t first);

  float* output(int32_t node) const { return state(node); }
  float* cell(int32_t node) const { return state(node) + hidden_width_; }
  float* projected_output(int32_t node) const {
    const Place at = place(node);
    return segments_[at.segment].projected.data() + at.offset * joint_width_;
  }
  int32_t parent(int32_t node) const { return key_parent(key(node)); }
  int32_t last_label(int32_t node) const { return key_label(key(node)); }

  int64_t size() const { return size_.load(std::memory_order_relaxed); }
  int64_t bytes() const { return bytes_.load(std::memory_order_relaxed); }
  int64_t parents() const { return parents_.load(std::memory_order_relaxed); }

 private:
  struct Slot {
    std::atomic<uint64_t> key{kFreeSlot};
    std::atomic<int32_t> node{-1};
    mutable std::atomic<uint32_t> last_used{0};
  };
  struct Index {
    explicit Index(uint64_t size) : mask(size - 1), entries(new Slot[size]) {}
    uint64_t mask;
    std::unique_ptr<Slot[]> entries;
  };
  // Nodes lie in segments, each twice as long as the one before: none moves when more are added.
  struct Segment {
    AlignedFloats states;     // per node: output, cell
    AlignedFloats projected;  // per node: U_o o
    std::unique_ptr<uint64_t[]> keys;
    std::unique_ptr<std::atomic<int32_t>[]> gates;  // slot of the recurrent gates, or -1
  };
  struct Place {
    int segment;
    int64_t offset;
  };

  static Place place(int32_t node);
  float* state(int32_t node) const {
    const Place at = place(node);
    return segments_[at.segment].states.data() + at.offset * 2 * hidden_width_;
  }
  uint64_t& key(int32_t node) const {
    const Place at = place(node);
    return segments_[at.segment].keys[at.offset];
  }
  static Slot& slot(const Index& index, uint64_t key);
  static bool insert(Index* index, uint64_t key, int32_t node, uint32_t stamp);
  void grow_index();
  void allocate(int segment);
  int64_t own_bytes() const;
  int64_t gates_bytes() const { return 4 * hidden_width_ * static_cast<int64_t>(sizeof(float)); }
  void evict(int64_t most_bytes);
  void count_bytes();

  static constexpr int kSegments = 26;

  const int64_t hidden_width_, joint_width_, byte_budget_;
  Segment segments_[kSegments];
  AlignedFloats gates_[kSegments];  // recurrent gates, in segments as the nodes are

  std::mutex adding_;       // guards what follows, and the entries' keys
  int32_t next_ = 0;        // the first node that was not added yet
  int32_t next_gates_ = 0;  // the first slot of recurrent gates that was not added yet
  std::unique_ptr<Index> index_;
  std::vector<std::unique_ptr<Index>> retired_;  // outgrown, but perhaps being read
  std::atomic<const Index*> current_;
  std::atomic<int64_t> size_{0};  // findable nodes, and the root
  std::atomic<int64_t> bytes_{0};
  std::atomic<int64_t> parents_{0};  // nodes with recurrent gates

  std::mutex gate_;  // guards what follows
  std::condition_variable changed_;
  int stays_ = 0;
  bool evicting_ = false;
  int64_t reserved_bytes_ = 0;
  uint32_t last_stamp_ = 0;
};

}  // namespace cnnrnn
