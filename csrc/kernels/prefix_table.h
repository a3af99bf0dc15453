// Label prefixes and the recurrent state that belongs to each: the part of a search that images
// share.
//
// A node is a prefix, found from its parent and its last label. Its state is made when a path that
// ends there is first scored, by arithmetic whose order does not depend on what else is in the
// table, so a kept state and a fresh one are the same bits: results do not depend on the table's
// history or size. A table belongs to one head's weights and one instruction set.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#include "cpu_kernels.h"
#include "search.h"

namespace cnnrnn {

class PrefixTable {
 public:
  static constexpr int32_t kRoot = 0;

  // Nodes are forgotten, all at once and between two images, when they fill `byte_budget`.
  explicit PrefixTable(int64_t byte_budget);

  // Forgets everything, keeping the memory of the index.
  void clear();

  // The node of `parent` extended by `label`, made when it is new.
  int32_t child(int32_t parent, int32_t label);

  int32_t parent(int32_t node) const { return nodes_[node].parent; }
  int32_t last_label(int32_t node) const { return nodes_[node].label; }
  int32_t length(int32_t node) const { return nodes_[node].length; }

  // U_o o of the prefix, [D], making its state when it has none. The parent's state is there, since
  // a path is scored before it is extended. Valid until the next call.
  const float* projected_output(int32_t node, const HeadTables& head, const CpuKernels& kernels,
                                SearchStats* stats);

  bool over_budget() const { return bytes() > byte_budget_; }
  int64_t size() const { return static_cast<int64_t>(nodes_.size()); }
  int64_t bytes() const;

  // Held by the one search that uses the table; a search that finds it held uses another.
  std::mutex in_use;

 private:
  struct Node {
    int32_t parent;
    int32_t label;
    int32_t length;
    int32_t state;  // index of its state, or -1
  };

  void grow_index();
  size_t slot_of(int32_t parent, int32_t label) const;
  void make_state(int32_t node, const HeadTables& head, const CpuKernels& kernels);

  const int64_t byte_budget_;
  std::vector<Node> nodes_;
  std::vector<int32_t> index_;  // open addressing over nodes, a power of two long; -1 is free
  std::vector<float> states_;   // per state: output [H], cell [H], U_o o [D]
  std::vector<float> gates_;    // [4H]
  int32_t state_count_ = 0;
};

}  // namespace cnnrnn
