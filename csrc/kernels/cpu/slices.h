// Taking many images through a search: in slices that the prefix table has room for, in rounds
// between which missing states are made, in blocks that stay in the cache.
#pragma once

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

#include "kernels/cpu/head.h"
#include "kernels/cpu/prefix_table.h"
#include "kernels/search.h"

namespace cnnrnn {

// A block's scores stay in the second-level cache, and its rows fill register tiles.
constexpr int64_t kBlockBytes = 128 << 10;
constexpr int64_t kBlockRows = 64;
constexpr int64_t kSliceImages = 4096;

inline int64_t images_per_block(const CpuHead& head, int64_t most_live) {
  const int64_t row_bytes =
      head.score_vectors() * head.kernels().lanes * static_cast<int64_t>(sizeof(float));
  const int64_t rows = std::min(kBlockRows, kBlockBytes / row_bytes);
  return std::max<int64_t>(1, rows / most_live);
}

// Searches a slice, whose prefixes fit into the table together: its images with at most `most_live`
// live paths each. make(block, pending) returns the Search of one thread for blocks of so many
// images where so many are searched at once.
template <typename Search, typename Make>
void search_slice(CpuHead* head, std::vector<typename Search::Image>* images, int64_t most_live,
                  const ParallelFor& parallel_for, uint32_t stamp, SearchStats* stats,
                  const Make& make) {
  using Image = typename Search::Image;
  std::vector<Image*> pending;
  pending.reserve(images->size());
  for (Image& image : *images) pending.push_back(&image);
  while (!pending.empty()) {
    const int64_t count = static_cast<int64_t>(pending.size());
    const int64_t block = std::min(images_per_block(*head, most_live), count);
    std::mutex merging;
    std::vector<Image*> waiting;
    std::vector<uint64_t> missing;
    parallel_for((count + block - 1) / block, [&](int64_t first, int64_t last) {
      Search search = make(block, count);
      for (int64_t at = first * block; at < std::min(last * block, count); at += block) {
        if (parallel_for.stopped()) return;
        search.run(pending.data() + at, std::min(block, count - at));
      }
      const std::lock_guard lock(merging);
      waiting.insert(waiting.end(), search.waiting.begin(), search.waiting.end());
      missing.insert(missing.end(), search.missing.begin(), search.missing.end());
      stats->prefix_lookups += search.lookups;
      stats->nonfinite_images += search.nonfinite_images;
    });
    std::sort(missing.begin(), missing.end());
    missing.erase(std::unique(missing.begin(), missing.end()), missing.end());
    head->make_states(missing, stamp, parallel_for);
    stats->prefix_hits -= static_cast<int64_t>(missing.size());
    pending = std::move(waiting);
  }
}

// Calls search(first, last, stamp) on slices of `count` images whose prefixes, of each at most
// `nodes_per_image` new ones, fit into the table together.
template <typename SearchSlice>
void for_slices(PrefixTable* prefixes, int64_t count, int64_t nodes_per_image,
                const SearchSlice& search) {
  const int64_t image_bytes = std::max<int64_t>(1, nodes_per_image * prefixes->node_bytes());
  const int64_t slice =
      std::clamp<int64_t>(prefixes->byte_budget() / 4 / image_bytes, 1, kSliceImages);
  for (int64_t first = 0; first < count; first += slice) {
    const int64_t last = std::min(first + slice, count);
    const PrefixTable::Stay stay(prefixes, (last - first) * nodes_per_image);
    search(first, last, stay.stamp());
  }
}

// The figures of a search whose slices have counted look-ups, and states that were missing.
inline SearchStats finished(SearchStats stats, const PrefixTable& prefixes) {
  stats.prefix_hits += stats.prefix_lookups;
  stats.prefix_nodes = prefixes.size();
  stats.prefix_parents = prefixes.parents();
  stats.prefix_bytes = prefixes.bytes();
  return stats;
}

}  // namespace cnnrnn
