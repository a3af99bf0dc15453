#include "kernels/cuda/head.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/cuda/launch.h"

namespace cnnrnn {
namespace {

constexpr int64_t kNodesPerParent = 2;  // extended prefixes of label sets have three children
constexpr int64_t kLeastNodes = 1024;
constexpr int64_t kSlotsPerNode = 2;
constexpr int64_t kSliceImages = int64_t{1} << 20;

// Bytes of a node, with its share of the slots, and of an extended prefix beyond it.
int64_t node_bytes(int64_t H, int64_t stride) {
  const int64_t values = (2 * H + stride) * static_cast<int64_t>(sizeof(float));
  const int64_t names = 3 * static_cast<int64_t>(sizeof(int32_t)) + sizeof(int64_t);
  return values + names + 2 * kSlotsPerNode * static_cast<int64_t>(sizeof(PrefixSlot));
}

int64_t parent_bytes(int64_t H) {
  return 4 * H * static_cast<int64_t>(sizeof(float)) + static_cast<int64_t>(sizeof(int32_t));
}

template <typename T>
T* allocate(DeviceMemory* memory, int64_t count) {
  return static_cast<T*>(
      memory->allocate(std::max<int64_t>(1, count) * static_cast<int64_t>(sizeof(T))));
}

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &status), "asking whether a stream is captured");
  return status != cudaStreamCaptureStatusNone;
}

int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "asking for a GPU's limits");
  return value;
}

// Of an image, at most.
int64_t live_paths(const SearchPass& pass) {
  return pass.banked ? kMaxCudaPaths : pass.rules.options.beam_size;
}

// Images of one call, by how they are searched. Where nothing is known of any, both lists are empty
// and all are searched alike.
struct Groups {
  std::vector<int32_t> given, others;
  int places;  // of a bank
  bool banked;
  int64_t live;  // paths of an image, at most
};

Groups group_images(const SearchOptions& options, const ImageEmbeddings& images, int64_t L) {
  Groups groups{};
  groups.places = std::max(options.places, options.beam_size);
  int64_t most_present = 0;
  bool is_given = false;
  for (int64_t image = 0; images.evidence != nullptr && image < images.batch; ++image) {
    if (image == 0 || images.evidence_stride != 0) {  // else all share one row
      const int8_t* const known = evidence_of(images, image);
      is_given = std::any_of(known, known + L, [](int8_t value) { return value != 0; });
      most_present = std::max<int64_t>(most_present, std::count(known, known + L, int8_t{1}));
    }
    (is_given ? groups.given : groups.others).push_back(static_cast<int32_t>(image));
  }
  if (groups.given.empty()) groups.others.clear();
  groups.banked = !groups.given.empty() || groups.places > options.beam_size;
  groups.live = groups.banked ? (most_present + 1) * groups.places : options.beam_size;
  if (groups.live > kMaxCudaPaths) {
    throw std::invalid_argument(
        std::to_string(most_present) + " known labels need " + std::to_string(most_present + 1) +
        " banks of " + std::to_string(groups.places) + " live paths an image, and a GPU has room " +
        "for " + std::to_string(kMaxCudaPaths) + "; search on the CPU");
  }
  return groups;
}

}  // namespace

// Memory of one call.
struct CudaHead::Scratch {
  int32_t* parked[2];  // [slice] each: images that wait after this pass and after the last one
  int32_t* again;      // [slice] images that begin anew with an empty table
};

CudaHead::CudaHead(const HeadWeights& weights, int64_t prefix_bytes, int device,
                   DeviceMemory* memory, cudaStream_t stream) {
  check_cuda(cudaSetDevice(device), "choosing a GPU");
  if (is_capturing(stream)) {
    throw std::runtime_error(
        "a head is packed by its first search, and that cannot be captured; search once before "
        "capturing the stream");
  }
  device_ = {device, device_attribute(cudaDevAttrMultiProcessorCount, device),
             device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)};
  const int64_t L = weights.num_labels, H = weights.hidden_dim;
  const int64_t stride = (weights.joint_dim + 15) / 16 * 16;
  if (L >= kMostSlotLabels - 1) {
    throw std::invalid_argument("a head of " + std::to_string(L) +
                                " labels, but the GPU's prefix " + "table holds fewer than " +
                                std::to_string(kMostSlotLabels));
  }
  const int64_t share = kNodesPerParent * node_bytes(H, stride) + parent_bytes(H);
  const int64_t nodes =
      std::clamp(prefix_bytes / share * kNodesPerParent, kLeastNodes, kMostSlotNodes);
  const int64_t parents = nodes / kNodesPerParent;
  int64_t slots = 1;
  while (slots < kSlotsPerNode * nodes) slots *= 2;
  const int64_t panels = (L + kPanelLabels) / kPanelLabels;  // END too
  const int width = static_cast<int>(stride);

  auto* const exact = allocate<unsigned char>(memory, panels * exact_panel_bytes(width));
  auto* const fast = allocate<unsigned char>(memory, panels * fast_panel_bytes(width));
  const RecurrentWeights packed{
      .input_gates = allocate<float>(memory, (L + 2) * 4 * H),
      .hidden_weight = allocate<float>(memory, 4 * H * H),
      .output_projection = allocate<float>(memory, stride * H),
  };
  head_ = {
      .num_labels = static_cast<int32_t>(L),
      .joint_dim = static_cast<int32_t>(weights.joint_dim),
      .joint_stride = width,
      .hidden_dim = static_cast<int32_t>(H),
      .panels = static_cast<int32_t>(panels),
      .cell = weights.cell,
      .activation = weights.activation,
      .exact_panels = exact,
      .fast_panels = fast,
      .input_gates = packed.input_gates,
      .hidden_weight = packed.hidden_weight,
      .output_projection = packed.output_projection,
      .counts = allocate<DeviceCounts>(memory, 1),
      .slot_mask = static_cast<uint64_t>(slots - 1),
      .node_capacity = static_cast<int32_t>(nodes),
      .parent_capacity = static_cast<int32_t>(parents),
      .slots = allocate<PrefixSlot>(memory, slots),
      .node_parent = allocate<int32_t>(memory, nodes),
      .node_label = allocate<int32_t>(memory, nodes),
      .node_slot = allocate<int64_t>(memory, nodes),
      .node_gates = allocate<int32_t>(memory, nodes),
      .output = allocate<float>(memory, nodes * H),
      .cell_state = allocate<float>(memory, nodes * H),
      .projected = allocate<float>(memory, nodes * stride),
      .gates_parent = allocate<int32_t>(memory, parents),
      .recurrent_gates = allocate<float>(memory, parents * 4 * H),
  };
  check_cuda(cudaMemsetAsync(head_.counts, 0, sizeof(DeviceCounts), stream), "clearing counts");
  check_cuda(cudaMemsetAsync(head_.slots, 0, slots * sizeof(PrefixSlot), stream),
             "clearing the prefix table");
  pack_panels(weights, head_, exact, fast, device_, stream);
  pack_recurrence(weights, head_, packed, device_.multiprocessors, stream);
  make_prefix_room(head_, head_.node_capacity + 1, 0, false, stream);
  make_states(head_, 1, nullptr, device_.multiprocessors, stream);

  check_cuda(cudaMallocHost(reinterpret_cast<void**>(&counts_), sizeof(DeviceCounts)),
             "allocating pinned memory");
  check_cuda(cudaEventCreateWithFlags(&last_call_, cudaEventDisableTiming), "creating an event");
  check_cuda(cudaEventRecord(last_call_, stream), "recording an event");
}

CudaHead::~CudaHead() {
  // At the end of a process the GPU may be gone already: then there is nothing to free.
  cudaEventDestroy(last_call_);
  cudaFreeHost(counts_);
}

SearchStats CudaHead::search(const SearchOptions& options, const ImageEmbeddings& images,
                             const SearchOutput& output, DeviceMemory* memory, cudaStream_t stream,
                             int64_t rounds) {
  const int64_t B = images.batch, N = options.beam_size, T = options.max_labels;
  const int64_t L = head_.num_labels;
  if (B == 0) return {};
  const Groups groups = group_images(options, images, L);
  const int64_t image_nodes = 1 + groups.live * std::max<int64_t>(T - 1, 0);
  if (image_nodes > std::min(head_.node_capacity, head_.parent_capacity)) {
    throw std::invalid_argument(
        "one image may need " + std::to_string(image_nodes) + " prefix states (" +
        (groups.banked ? std::to_string(groups.live) + " live paths, max_labels "
                       : "beam_size " + std::to_string(N) + ", max_labels ") +
        std::to_string(T) + "), and the table holds " +
        std::to_string(std::min(head_.node_capacity, head_.parent_capacity)) +
        "; raise head.prefix_bytes");
  }
  const std::lock_guard lock(mutex_);
  check_cuda(cudaSetDevice(device_.index), "choosing a GPU");
  const bool captured = is_capturing(stream);
  if (captured && !groups.given.empty()) {
    throw std::invalid_argument(
        "a search in which labels are known cannot be captured; search outside of the graph, or "
        "without evidence");
  }
  was_captured_ = was_captured_ || captured;
  if (!captured) {
    check_cuda(cudaStreamWaitEvent(stream, last_call_, 0), "waiting for the last search");
  }
  const int64_t slice = std::min(B, kSliceImages);
  const Scratch scratch{{allocate<int32_t>(memory, slice), allocate<int32_t>(memory, slice)},
                        captured ? nullptr : allocate<int32_t>(memory, slice)};
  SearchPass pass{};
  pass.rules = {options, L, output.marginals != nullptr};
  pass.rules.options.places = groups.places;
  pass.images = images;
  pass.images.evidence = nullptr;
  pass.output = output;
  pass.parked_beams = memory->allocate(B * parked_beam_bytes(options.beam_size, groups.banked));
  // From here on all is in the stream's order: an allocation that fails leaves nothing behind.
  check_cuda(cudaMemsetAsync(&head_.counts->call, 0, sizeof(CallCounts), stream),
             "clearing counts");
  if (output.marginals != nullptr) {
    check_cuda(cudaMemsetAsync(output.marginals, 0, B * L * sizeof(float), stream),
               "clearing marginals");
  }
  if (output.trace != nullptr) {  // -1
    const int64_t values = B * (T + 1) * output.trace_width * 2;
    check_cuda(cudaMemsetAsync(output.trace, 0xff, values * sizeof(int32_t), stream),
               "clearing the trace");
  }
  // A captured search that found the table full has left prefixes in it that nobody makes.
  if (was_captured_ && !captured) make_prefix_room(head_, 0, 0, true, stream);
  const auto to_device = [&](const auto* values, int64_t count, const char* what) {
    auto* const copy = allocate<std::decay_t<decltype(*values)>>(memory, count);
    check_cuda(
        cudaMemcpyAsync(copy, values, count * sizeof *values, cudaMemcpyHostToDevice, stream),
        what);
    return copy;
  };
  pass.banked = groups.places > N;
  if (groups.given.empty()) {
    search_group(pass, B, scratch, true, captured, rounds, stream);
  } else {
    if (!groups.others.empty()) {
      const auto count = static_cast<int64_t>(groups.others.size());
      pass.image_list = to_device(groups.others.data(), count, "writing the images to search");
      search_group(pass, count, scratch, true, captured, rounds, stream);
    }
    const auto count = static_cast<int64_t>(groups.given.size());
    pass.image_list = to_device(groups.given.data(), count, "writing the images to search");
    pass.images.evidence =
        to_device(images.evidence, images.evidence_stride == 0 ? L : B * L, "writing evidence");
    pass.banked = true;
    if (output.marginals != nullptr) {
      pass.complete = allocate<CompletePath>(memory, B * (T + 1) * groups.places);
    }
    search_group(pass, count, scratch, groups.others.empty(), captured, rounds, stream);
  }
  if (captured) return {};
  check_cuda(cudaEventRecord(last_call_, stream), "recording an event");
  SearchStats stats;
  stats.prefix_lookups = static_cast<int64_t>(counts_->call.lookups);
  stats.prefix_hits =
      std::max<int64_t>(0, stats.prefix_lookups - static_cast<int64_t>(counts_->call.made));
  stats.prefix_nodes = std::min(counts_->prefix.nodes, head_.node_capacity);
  stats.prefix_parents = std::min(counts_->prefix.parents, head_.parent_capacity);
  stats.prefix_bytes = stats.prefix_nodes * node_bytes(head_.hidden_dim, head_.joint_stride) +
                       stats.prefix_parents * parent_bytes(head_.hidden_dim);
  stats.nonfinite_images = counts_->call.nonfinite_images;
  return stats;
}

void CudaHead::clear(cudaStream_t stream) {
  const std::lock_guard lock(mutex_);
  check_cuda(cudaSetDevice(device_.index), "choosing a GPU");
  check_cuda(cudaStreamWaitEvent(stream, last_call_, 0), "waiting for the last search");
  make_prefix_room(head_, head_.node_capacity + 1, 0, true, stream);
  check_cuda(cudaEventRecord(last_call_, stream), "recording an event");
}

// Searches `count` images of a pass: those of its list, or all.
void CudaHead::search_group(SearchPass pass, int64_t count, const Scratch& scratch,
                            bool counts_are_clear, bool captured, int64_t rounds,
                            cudaStream_t stream) {
  const int32_t* const list = pass.image_list;
  for (int64_t first = 0; first < count; first += kSliceImages) {
    pass.first_image = first;
    pass.image_list = list == nullptr ? nullptr : list + first;
    pass.count = static_cast<int32_t>(std::min(kSliceImages, count - first));
    if (captured) {
      enqueue_rounds(pass, scratch, rounds, stream);
    } else {
      search_slice(pass, scratch, counts_are_clear && first == 0, stream);
    }
  }
}

// Searches a slice to its end. Where the table has no room, the images that have not ended begin
// anew with an empty one, and where that was not enough, half of them at a time: one image fits.
void CudaHead::search_slice(const SearchPass& slice, const Scratch& scratch, bool counts_are_clear,
                            cudaStream_t stream) {
  std::vector<std::vector<int32_t>> waiting;  // the last one goes next
  const auto set_aside = [&](int64_t parked, bool halve) {
    std::vector<int32_t> images(parked);
    check_cuda(cudaMemcpyAsync(images.data(), scratch.parked[0], parked * sizeof(int32_t),
                               cudaMemcpyDeviceToHost, stream),
               "reading the parked images");
    check_cuda(cudaStreamSynchronize(stream), "searching");
    const int64_t kept = halve ? (parked + 1) / 2 : parked;
    if (kept < parked) waiting.emplace_back(images.begin() + kept, images.end());
    images.resize(kept);
    waiting.push_back(std::move(images));
    make_prefix_room(head_, head_.node_capacity + 1, 0, true, stream);
  };
  int64_t parked = run_rounds(slice, scratch, counts_are_clear, stream);
  if (parked > 0) set_aside(parked, false);
  bool was_empty = true;  // the table, when the next ones begin
  while (!waiting.empty()) {
    const std::vector<int32_t> images = std::move(waiting.back());
    waiting.pop_back();
    check_cuda(cudaMemcpyAsync(scratch.again, images.data(), images.size() * sizeof(int32_t),
                               cudaMemcpyHostToDevice, stream),
               "writing the images to search");
    SearchPass pass = slice;
    pass.image_list = scratch.again;
    pass.count = static_cast<int32_t>(images.size());
    parked = run_rounds(pass, scratch, false, stream);
    if (parked > 0) set_aside(parked, was_empty && parked > 1);
    was_empty = parked > 0;
  }
}

// Runs passes until no image waits, or the table is full: returns how many wait then, listed in
// scratch.parked[0].
int64_t CudaHead::run_rounds(SearchPass pass, const Scratch& scratch, bool counts_are_clear,
                             cudaStream_t stream) {
  CallCounts* const call = &head_.counts->call;
  if (!counts_are_clear) {
    check_cuda(cudaMemsetAsync(&call->full, 0, sizeof call->full, stream), "clearing counts");
    check_cuda(cudaMemsetAsync(call->parked, 0, sizeof call->parked, stream), "clearing counts");
  }
  unsigned long long made = counts_are_clear ? 0 : counts_->call.made;
  for (int64_t round = 0;; ++round) {
    const int now = static_cast<int>(round % 2);
    pass.parked = scratch.parked[now];
    pass.parked_count = &call->parked[now];
    search_images(head_, pass, device_, stream);
    read_counts(stream);
    const int64_t parked = counts_->call.parked[now];
    if (parked == 0) return 0;
    if (counts_->call.full != 0) {
      if (now != 0) {
        check_cuda(cudaMemcpyAsync(scratch.parked[0], scratch.parked[now], parked * sizeof(int32_t),
                                   cudaMemcpyDeviceToDevice, stream),
                   "moving the parked images");
      }
      return parked;
    }
    if (counts_->call.made == made) {
      throw std::logic_error("images wait for prefix states that nobody makes");
    }
    made = counts_->call.made;
    make_states(head_, parked * live_paths(pass), &call->parked[1 - now], device_.multiprocessors,
                stream);
    pass.resumes = true;
    pass.image_list = pass.parked;
    pass.image_count = nullptr;
    pass.count = static_cast<int32_t>(parked);
  }
}

// The same without looking. A path's first step needs the root alone, its last one nothing.
void CudaHead::enqueue_rounds(SearchPass pass, const Scratch& scratch, int64_t rounds,
                              cudaStream_t stream) {
  const int64_t T = pass.rules.options.max_labels;
  const int64_t most_rounds = std::max<int64_t>(T - 1, 0);
  if (rounds == kAllRounds || rounds > most_rounds) rounds = most_rounds;
  CallCounts* const call = &head_.counts->call;
  if (rounds > 0) {
    const int64_t nodes = pass.count * live_paths(pass) * most_rounds;
    make_prefix_room(head_, std::min<int64_t>(nodes, head_.node_capacity / 2),
                     std::min<int64_t>(nodes, head_.parent_capacity / 2), true, stream);
  }
  if (pass.first_image > 0) {
    check_cuda(cudaMemsetAsync(call->parked, 0, sizeof call->parked, stream), "clearing counts");
  }
  for (int64_t round = 0;; ++round) {
    const int now = static_cast<int>(round % 2);
    pass.parked = scratch.parked[now];
    pass.parked_count = &call->parked[now];
    pass.marks_parked = round == rounds;
    search_images(head_, pass, device_, stream);
    if (round == rounds) return;
    make_states(head_, pass.count * live_paths(pass), &call->parked[1 - now],
                device_.multiprocessors, stream);
    pass.resumes = true;
    pass.image_list = pass.parked;
    pass.image_count = pass.parked_count;
  }
}

void CudaHead::read_counts(cudaStream_t stream) {
  check_cuda(
      cudaMemcpyAsync(counts_, head_.counts, sizeof(DeviceCounts), cudaMemcpyDeviceToHost, stream),
      "reading counts");
  check_cuda(cudaStreamSynchronize(stream), "searching");
}

}  // namespace cnnrnn
