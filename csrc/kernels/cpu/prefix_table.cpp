#include "kernels/cpu/prefix_table.h"

#include <algorithm>
#include <bit>
#include <utility>

namespace cnnrnn {
namespace {

constexpr int64_t kFirstSegment = 64;      // nodes
constexpr uint64_t kSmallestIndex = 1024;  // entries

}  // namespace

PrefixTable::PrefixTable(int64_t hidden_width, int64_t joint_width, int64_t byte_budget)
    : hidden_width_(hidden_width),
      joint_width_(joint_width),
      byte_budget_(byte_budget),
      index_(std::make_unique<Index>(kSmallestIndex)),
      current_(index_.get()) {
  add(1);
  key(kRoot) = kFreeSlot;
  size_ = 1;
}

PrefixTable::Place PrefixTable::place(int32_t node) {
  const uint64_t at = static_cast<uint64_t>(node) / kFirstSegment + 1;
  const int segment = std::bit_width(at) - 1;
  return {segment, node - kFirstSegment * ((int64_t{1} << segment) - 1)};
}

int64_t PrefixTable::own_bytes() const {
  return (2 * hidden_width_ + joint_width_) * static_cast<int64_t>(sizeof(float)) +
         static_cast<int64_t>(sizeof(uint64_t) + sizeof(int32_t) + 4 * sizeof(Slot));
}

void PrefixTable::count_bytes() {
  const int64_t node = own_bytes() - static_cast<int64_t>(4 * sizeof(Slot));
  uint64_t entries = index_->mask + 1;
  for (const auto& index : retired_) entries += index->mask + 1;
  parents_ = next_gates_;
  bytes_ =
      next_ * node + next_gates_ * gates_bytes() + static_cast<int64_t>(entries * sizeof(Slot));
}

PrefixTable::Slot& PrefixTable::slot(const Index& index, uint64_t key) {
  for (uint64_t at = first_slot(key, index.mask);; at = (at + 1) & index.mask) {
    Slot& entry = index.entries[at];
    const uint64_t found = entry.key.load(std::memory_order_acquire);
    if (found == key || found == kFreeSlot) return entry;
  }
}

int32_t PrefixTable::find(int32_t parent, int32_t label, uint32_t stamp) const {
  const uint64_t key = prefix_key(parent, label);
  const Slot& entry = slot(*current_.load(std::memory_order_acquire), key);
  if (entry.key.load(std::memory_order_acquire) != key) return -1;
  if (entry.last_used.load(std::memory_order_relaxed) != stamp) {
    entry.last_used.store(stamp, std::memory_order_relaxed);
  }
  return entry.node.load(std::memory_order_relaxed);
}

int32_t PrefixTable::add(int64_t count) {
  const std::lock_guard lock(adding_);
  const int32_t first = next_;
  const int32_t last = static_cast<int32_t>(first + count - 1);
  for (int segment = place(first).segment; segment <= place(last).segment; ++segment) {
    allocate(segment);
  }
  for (int32_t node = first; node <= last; ++node) {
    const Place at = place(node);
    segments_[at.segment].gates[at.offset].store(-1, std::memory_order_relaxed);
  }
  next_ = last + 1;
  count_bytes();
  return first;
}

int32_t PrefixTable::add_recurrent_gates(int64_t count) {
  const std::lock_guard lock(adding_);
  const int32_t first = next_gates_;
  const int32_t last = static_cast<int32_t>(first + count - 1);
  for (int segment = place(first).segment; segment <= place(last).segment; ++segment) {
    if (gates_[segment].data() != nullptr) continue;
    gates_[segment] = AlignedFloats::unfilled((kFirstSegment << segment) * 4 * hidden_width_);
  }
  next_gates_ = last + 1;
  count_bytes();
  return first;
}

void PrefixTable::publish_recurrent_gates(const int32_t* nodes, int64_t count, int32_t first) {
  for (int64_t i = 0; i < count; ++i) {
    const Place at = place(nodes[i]);
    int32_t none = -1;
    segments_[at.segment].gates[at.offset].compare_exchange_strong(
        none, static_cast<int32_t>(first + i), std::memory_order_release);
  }
}

void PrefixTable::allocate(int segment) {
  Segment& s = segments_[segment];
  const int64_t nodes = kFirstSegment << segment;
  if (s.states.data() == nullptr) s.states = AlignedFloats::unfilled(nodes * 2 * hidden_width_);
  if (s.projected.data() == nullptr) s.projected = AlignedFloats::unfilled(nodes * joint_width_);
  if (s.keys == nullptr) s.keys.reset(new uint64_t[nodes]);
  if (s.gates == nullptr) s.gates.reset(new std::atomic<int32_t>[nodes]);
}

bool PrefixTable::insert(Index* index, uint64_t key, int32_t node, uint32_t stamp) {
  Slot& entry = slot(*index, key);
  if (entry.key.load(std::memory_order_relaxed) == key) return false;
  entry.node.store(node, std::memory_order_relaxed);
  entry.last_used.store(stamp, std::memory_order_relaxed);
  entry.key.store(key, std::memory_order_release);  // last: it makes the node findable
  return true;
}

void PrefixTable::publish(const uint64_t* keys, int64_t count, int32_t first, uint32_t stamp) {
  const std::lock_guard lock(adding_);
  for (int64_t i = 0; i < count; ++i) {
    // At most half full, so that probes stay short.
    if (2 * static_cast<uint64_t>(size_.load()) > index_->mask) grow_index();
    const int32_t node = static_cast<int32_t>(first + i);
    key(node) = keys[i];
    if (insert(index_.get(), keys[i], node, stamp)) ++size_;
  }
  count_bytes();
}

void PrefixTable::grow_index() {
  auto larger = std::make_unique<Index>(2 * (index_->mask + 1));
  for (uint64_t i = 0; i <= index_->mask; ++i) {
    const Slot& entry = index_->entries[i];
    const uint64_t key = entry.key.load(std::memory_order_relaxed);
    if (key != kFreeSlot) insert(larger.get(), key, entry.node, entry.last_used);
  }
  retired_.push_back(std::move(index_));
  index_ = std::move(larger);
  current_.store(index_.get(), std::memory_order_release);
}

// Keeps what was used last, as much as fits into `most_bytes`; a prefix stays only with its parent.
// No search is in the table.
void PrefixTable::evict(int64_t most_bytes) {
  const std::lock_guard lock(adding_);
  struct Use {
    uint32_t stamp;
    int32_t node;
  };
  std::vector<uint32_t> last_used(next_, 0);
  std::vector<Use> uses;
  for (uint64_t i = 0; i <= index_->mask; ++i) {
    const Slot& entry = index_->entries[i];
    if (entry.key.load(std::memory_order_relaxed) == kFreeSlot) continue;
    last_used[entry.node] = entry.last_used;
    uses.push_back({entry.last_used, entry.node});
  }
  std::sort(uses.begin(), uses.end(), [](const Use& a, const Use& b) { return a.stamp > b.stamp; });
  uint32_t threshold = 0;  // nodes last used before or at this stamp go
  uint64_t survivors = 1;
  int64_t bytes = node_bytes();  // the root's
  for (const Use& use : uses) {
    bytes += own_bytes() + (recurrent_gates(use.node) == nullptr ? 0 : gates_bytes());
    if (bytes > most_bytes) {
      threshold = use.stamp;
      break;
    }
    ++survivors;
  }
  // All memory first: running out of it must leave the table as it was.
  auto index = std::make_unique<Index>(std::max(kSmallestIndex, std::bit_ceil(2 * survivors)));
  std::vector<int32_t> moved(next_, -1);
  std::vector<std::pair<int32_t, int32_t>> kept_gates;  // slot, the node's new number
  kept_gates.reserve(next_gates_);
  // Parents come before their children, so one pass keeps a prefix only with its parent.
  int32_t kept = 0;
  for (int32_t node = kRoot; node < next_; ++node) {
    const bool stays = node == kRoot || (last_used[node] > threshold && moved[parent(node)] >= 0);
    if (!stays) continue;
    const int32_t to = moved[node] = kept++;
    const Place from_place = place(node), to_place = place(to);
    const int32_t slot = segments_[from_place.segment].gates[from_place.offset];
    if (slot >= 0) kept_gates.emplace_back(slot, to);
    segments_[to_place.segment].gates[to_place.offset] = -1;
    if (node == kRoot) continue;
    const uint64_t renamed = prefix_key(moved[parent(node)], last_label(node));
    if (to != node) {
      std::copy_n(state(node), 2 * hidden_width_, state(to));
      std::copy_n(projected_output(node), joint_width_, projected_output(to));
    }
    key(to) = renamed;
    insert(index.get(), renamed, to, last_used[node]);
  }
  next_ = kept;
  // In the order of slots, so that none is overwritten before it has moved.
  std::sort(kept_gates.begin(), kept_gates.end());
  next_gates_ = 0;
  for (const auto& [slot, node] : kept_gates) {
    const int32_t to = next_gates_++;
    if (to != slot) std::copy_n(unpublished_gates(slot), 4 * hidden_width_, unpublished_gates(to));
    const Place at = place(node);
    segments_[at.segment].gates[at.offset] = to;
  }
  for (int segment = place(next_ - 1).segment + 1; segment < kSegments; ++segment) {
    segments_[segment] = Segment{};
  }
  for (int segment = place(next_gates_).segment + 1; segment < kSegments; ++segment) {
    gates_[segment] = AlignedFloats();
  }
  retired_.clear();
  index_ = std::move(index);
  current_.store(index_.get(), std::memory_order_release);
  size_ = kept;
  count_bytes();
}

PrefixTable::Stay::Stay(PrefixTable* table, int64_t most_new_nodes)
    : table_(table), reserved_bytes_(most_new_nodes * table->node_bytes()) {
  std::unique_lock lock(table->gate_);
  table->changed_.wait(lock, [table] { return !table->evicting_; });
  const int64_t room = table->byte_budget_ - table->reserved_bytes_ - reserved_bytes_;
  if (table->bytes() > room && table->size() > 1) {
    table->evicting_ = true;
    table->changed_.wait(lock, [table] { return table->stays_ == 0; });
    try {
      table->evict(room / 4 * 3);  // not just to `room`, so that the next time is not soon
    } catch (...) {
      table->evicting_ = false;
      table->changed_.notify_all();
      throw;
    }
    table->evicting_ = false;
    table->changed_.notify_all();
  }
  ++table->stays_;
  table->reserved_bytes_ += reserved_bytes_;
  stamp_ = ++table->last_stamp_;
}

PrefixTable::Stay::~Stay() {
  const std::lock_guard lock(table_->gate_);
  --table_->stays_;
  table_->reserved_bytes_ -= reserved_bytes_;
  table_->changed_.notify_all();
}

}  // namespace cnnrnn
