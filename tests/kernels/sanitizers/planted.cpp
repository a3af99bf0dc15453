// Commits one mistake per run through the kernels, to show that the sanitizers see into them.
//
//   planted BUG INSTRUCTION_SET    BUG as in `kBugs`; "none" uses the same functions rightly
//   planted                        lists the instruction sets that this processor runs
//
// The kernels are right; what is wrong is what this program gives them.

#include <atomic>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <thread>
#include <vector>

#include "cases.h"

namespace {

using cnnrnn::CpuHead;
using cnnrnn::CpuKernels;
using cnnrnn::on_this_thread;
using cnnrnn::PrefixTable;
using cnnrnn::cases::Floats;
using cnnrnn::cases::RandomWeights;
using cnnrnn::cases::Result;
using cnnrnn::cases::Search;

constexpr int64_t kLabels = 40, kJoint = 16, kHidden = 24;
constexpr int64_t kAmpleBytes = int64_t{1} << 28;

const RandomWeights& weights() {
  static const RandomWeights made(kLabels, kJoint, kHidden, cnnrnn::Cell::kLstm, 0);
  return made;
}

Search make_search() {
  const cnnrnn::SearchOptions options{.beam_size = 4,
                                      .max_labels = 5,
                                      .min_labels = 0,
                                      .order = cnnrnn::Order::kUnique,
                                      .end_takes_slot = false,
                                      .stop = cnnrnn::Stop::kNBest};
  return Search(options, weights().view(), 30, false, false, 1);
}

void search_with(CpuHead* head, const Search& search) {
  Result result(search, kLabels);
  search_into(head, search, on_this_thread, &result);
}

void none(const CpuKernels& kernels) {
  CpuHead head(weights().view(), kernels, 0);
  search_with(&head, make_search());
}

// --- AddressSanitizer

void short_image(const CpuKernels& kernels) {
  const Floats projected(kJoint), image(kJoint - 1);
  Floats total(kJoint);
  kernels.activate_sum(cnnrnn::Activation::kRelu, projected.data(), image.data(), total.data(),
                       kJoint);
}

void short_panels(const CpuKernels& kernels) {
  const Floats x(kJoint), panels(kJoint * kernels.lanes - 1);
  Floats y(kernels.lanes);
  const float* row = x.data();
  float* sums = y.data();
  kernels.product({1, kJoint, 1, &row, panels.data(), nullptr, &sums, nullptr});
}

void short_sums(const CpuKernels& kernels) {
  const Floats x(kJoint), panels(kJoint * kernels.lanes);
  Floats y(kernels.lanes - 1);
  const float* row = x.data();
  float* sums = y.data();
  kernels.product({1, kJoint, 1, &row, panels.data(), nullptr, &sums, nullptr});
}

void freed_head(const CpuKernels& kernels) {
  auto head = std::make_unique<CpuHead>(weights().view(), kernels, kAmpleBytes);
  CpuHead* const dangling = head.get();
  head.reset();
  search_with(dangling, make_search());
}

// A state that is used after the stay that kept it: the next stay asks for all the room there is.
void evicted_state(const CpuKernels& kernels) {
  CpuHead head(weights().view(), kernels, kAmpleBytes);
  search_with(&head, make_search());
  const int32_t last = static_cast<int32_t>(head.prefixes().size() - 1);
  const float* const state = head.prefixes().projected_output(last);
  const PrefixTable::Stay evicts(&head.prefixes(), kAmpleBytes / head.prefixes().node_bytes() + 1);
  const Floats image(kJoint);
  Floats total(kJoint);
  kernels.activate_sum(cnnrnn::Activation::kRelu, state, image.data(), total.data(), kJoint);
}

// --- UndefinedBehaviorSanitizer

void wide_beam(const CpuKernels& kernels) {
  CpuHead head(weights().view(), kernels, kAmpleBytes);
  Search search = make_search();
  search.options.beam_size = cnnrnn::kMaxBeamSize + 1;
  search_with(&head, search);
}

void invalid_bool(const CpuKernels& kernels) {
  CpuHead head(weights().view(), kernels, kAmpleBytes);
  Search search = make_search();
  std::memset(&search.options.end_takes_slot, 2, sizeof(bool));
  search_with(&head, search);
}

void misaligned_weights(const CpuKernels& kernels) {
  std::vector<char> bytes((kLabels + 2) * kJoint * sizeof(float) + 1);
  cnnrnn::HeadWeights wrong = weights().view();
  wrong.label_embedding = reinterpret_cast<const float*>(bytes.data() + 1);
  const CpuHead head(wrong, kernels, kAmpleBytes);
}

void huge_width(const CpuKernels& kernels) {
  kernels.product(
      {0, std::numeric_limits<int64_t>::max(), 0, nullptr, nullptr, nullptr, nullptr, nullptr});
}

// --- ThreadSanitizer

void on_two_threads(const std::function<void()>& first, const std::function<void()>& second) {
  std::thread other(first);
  second();
  other.join();
}

void shared_output(const CpuKernels& kernels) {
  CpuHead head(weights().view(), kernels, kAmpleBytes);
  const Search search = make_search();
  Result result(search, kLabels);
  cnnrnn::SearchOutput output{result.labels.data(),
                              result.lengths.data(),
                              result.log_probs.data(),
                              nullptr,
                              nullptr,
                              nullptr,
                              0};
  const auto work = [&] {
    beam_search_cpu(&head, search.options, {search.batch, search.joint.data(), nullptr}, output,
                    on_this_thread);
  };
  on_two_threads(work, work);
}

// The kernels' loops write a state while a search reads it.
void written_state(const CpuKernels& kernels) {
  CpuHead head(weights().view(), kernels, kAmpleBytes);
  float* const state = head.prefixes().projected_output(PrefixTable::kRoot);
  const Floats x(1), panels(kJoint);
  const float* const row = x.data();
  on_two_threads([&] { search_with(&head, make_search()); },
                 [&] {
                   kernels.product({1, 1, kJoint / kernels.lanes, &row, panels.data(), nullptr,
                                    &state, nullptr});
                 });
}

// Looks into the table without a stay while another thread's stays evict.
void find_without_stay(const CpuKernels& kernels) {
  CpuHead head(weights().view(), kernels, 0);
  const Search search = make_search();
  std::atomic<bool> looked{false}, searched{false};
  on_two_threads(
      [&] {
        while (!searched.load(std::memory_order_relaxed)) {
          head.prefixes().find(PrefixTable::kRoot, 0, 1);
          looked.store(true, std::memory_order_relaxed);
        }
      },
      [&] {
        while (!looked.load(std::memory_order_relaxed)) std::this_thread::yield();
        search_with(&head, search);
        searched.store(true, std::memory_order_relaxed);
      });
}

struct Bug {
  const char* name;
  void (*commit)(const CpuKernels& kernels);
};

constexpr Bug kBugs[] = {
    {"none", none},
    {"short-image", short_image},
    {"short-panels", short_panels},
    {"short-sums", short_sums},
    {"freed-head", freed_head},
    {"evicted-state", evicted_state},
    {"wide-beam", wide_beam},
    {"invalid-bool", invalid_bool},
    {"misaligned-weights", misaligned_weights},
    {"huge-width", huge_width},
    {"shared-output", shared_output},
    {"written-state", written_state},
    {"find-without-stay", find_without_stay},
};

}  // namespace

int main(int argc, char** argv) {
  if (argc == 1) {
    for (const CpuKernels* kernels : cnnrnn::cases::instruction_sets()) std::puts(kernels->name);
    return 0;
  }
  const CpuKernels* kernels = argc == 3 ? cnnrnn::find_cpu_kernels(argv[2]) : nullptr;
  for (const Bug& bug : kBugs) {
    if (kernels == nullptr || std::strcmp(argv[1], bug.name) != 0) continue;
    bug.commit(*kernels);
    return 0;
  }
  std::fprintf(stderr, "usage: planted BUG INSTRUCTION_SET, as listed in planted.cpp\n");
  return 2;
}
