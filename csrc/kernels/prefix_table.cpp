#include "prefix_table.h"

namespace cnnrnn {
namespace {

constexpr size_t kSmallestIndex = 1024;

// Mixes both numbers into all bits (the finaliser of splitmix64).
uint64_t hash(int32_t parent, int32_t label) {
  uint64_t x =
      (static_cast<uint64_t>(static_cast<uint32_t>(parent)) << 32) | static_cast<uint32_t>(label);
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

}  // namespace

PrefixTable::PrefixTable(int64_t byte_budget)
    : byte_budget_(byte_budget), index_(kSmallestIndex, -1) {
  clear();
}

void PrefixTable::clear() {
  nodes_.assign(1, Node{-1, -1, 0, -1});
  index_.assign(index_.size(), -1);
  states_.clear();
  state_count_ = 0;
}

int64_t PrefixTable::bytes() const {
  return static_cast<int64_t>(nodes_.size() * sizeof(Node) + index_.size() * sizeof(int32_t) +
                              states_.size() * sizeof(float));
}

size_t PrefixTable::slot_of(int32_t parent, int32_t label) const {
  const size_t mask = index_.size() - 1;
  size_t slot = hash(parent, label) & mask;
  while (index_[slot] >= 0) {
    const Node& node = nodes_[index_[slot]];
    if (node.parent == parent && node.label == label) break;
    slot = (slot + 1) & mask;
  }
  return slot;
}

int32_t PrefixTable::child(int32_t parent, int32_t label) {
  size_t slot = slot_of(parent, label);
  if (index_[slot] >= 0) return index_[slot];
  if (2 * nodes_.size() >= index_.size()) {  // at most half full, so that probes stay short
    grow_index();
    slot = slot_of(parent, label);
  }
  const int32_t node = static_cast<int32_t>(nodes_.size());
  nodes_.push_back(Node{parent, label, nodes_[parent].length + 1, -1});
  index_[slot] = node;  // last: running out of memory must not leave it pointing nowhere
  return node;
}

void PrefixTable::grow_index() {
  index_ = std::vector<int32_t>(2 * index_.size(), -1);
  for (size_t node = 1; node < nodes_.size(); ++node) {
    index_[slot_of(nodes_[node].parent, nodes_[node].label)] = static_cast<int32_t>(node);
  }
}

const float* PrefixTable::projected_output(int32_t node, const HeadTables& head,
                                           const CpuKernels& kernels, SearchStats* stats) {
  ++stats->prefix_lookups;
  if (nodes_[node].state >= 0) {
    ++stats->prefix_hits;
  } else {
    make_state(node, head, kernels);
  }
  const int64_t width = 2 * head.hidden_dim + head.joint_dim;
  return states_.data() + nodes_[node].state * width + 2 * head.hidden_dim;
}

// Equations 1 and 3, one step from the parent's state.
void PrefixTable::make_state(int32_t node, const HeadTables& head, const CpuKernels& kernels) {
  const int64_t H = head.hidden_dim;
  const int64_t D = head.joint_dim;
  const int64_t width = 2 * H + D;
  const int64_t index = state_count_++;
  states_.resize(state_count_ * width);
  gates_.resize(4 * H);

  const bool is_root = node == kRoot;
  const int64_t input_row = is_root ? head.num_labels : nodes_[node].label;
  const float* gates = head.input_gates + input_row * 4 * H;
  float* output = states_.data() + index * width;
  float* cell = output + H;
  const float* previous_cell = nullptr;
  if (!is_root) {
    // An LSTM feeds its output back, equation 1 its cell.
    const float* parent = states_.data() + nodes_[nodes_[node].parent].state * width;
    const float* fed_back = parent + (head.cell == Cell::kLstm ? 0 : H);
    kernels.affine(fed_back, H, head.hidden_weight, 4 * H, gates, gates_.data(), 4 * H);
    gates = gates_.data();
    previous_cell = parent + H;
  }
  kernels.cell_step(head.cell, gates, previous_cell, output, cell, H);
  kernels.affine(output, H, head.output_weight, D, nullptr, cell + H, D);
  nodes_[node].state = static_cast<int32_t>(index);
}

}  // namespace cnnrnn
