// Threads that search with one head at the same time, each with two threads of its own, against
// the same searches one after the other on one thread: every bit must be equal.
//
// Under ThreadSanitizer this shows that finding, adding, growing the index and evicting do not
// race; under AddressSanitizer, that no thread reads a state or an index that another one has let
// go. Exit status 1 and the failing lines on standard error where a result or an expectation
// differs.

#include <atomic>
#include <cstdio>
#include <thread>
#include <vector>

#include "cases.h"

namespace {

using cnnrnn::CpuHead;
using cnnrnn::Order;
using cnnrnn::Stop;
using cnnrnn::cases::RandomWeights;
using cnnrnn::cases::Result;
using cnnrnn::cases::Search;

constexpr int kThreads = 4;
constexpr int64_t kAmpleBytes = int64_t{1} << 28;
// A call's images share one stay under the first of these and need several under the second; under
// the last one no state outlives its stay.
constexpr int64_t kBudgets[] = {kAmpleBytes, 100'000, 0};

std::atomic<int> failures{0};

void check(bool holds, const char* what, const cnnrnn::CpuKernels& kernels, int64_t budget) {
  if (holds) return;
  std::fprintf(stderr, "%s, %lld bytes: %s does not hold\n", kernels.name,
               static_cast<long long>(budget), what);
  ++failures;
}

// Parts of unlike length, so that threads do not run in step.
void on_two_threads(int64_t n, const cnnrnn::Work& work) {
  const int64_t middle = n / 3;
  if (middle == 0) return cnnrnn::on_this_thread(n, work);
  std::thread other(work, middle, n);
  work(0, middle);
  other.join();
}

// Every order, both ways to end, both stops, with and without logits and marginals.
std::vector<Search> make_searches(const cnnrnn::HeadWeights& head) {
  std::vector<Search> searches;
  for (const Order order : {Order::kIncreasing, Order::kUnique, Order::kFree}) {
    for (const Stop stop : {Stop::kNBest, Stop::kLiteral}) {
      for (const bool marginals : {false, true}) {
        const unsigned seed = static_cast<unsigned>(searches.size());
        searches.emplace_back(cnnrnn::SearchOptions{.beam_size = marginals ? 3 : 8,
                                                    .max_labels = 4,
                                                    .min_labels = seed % 3,
                                                    .order = order,
                                                    .end_takes_slot = seed % 4 == 1,
                                                    .stop = stop},
                              head, 20, seed % 2 == 0, marginals, seed);
      }
    }
  }
  searches.front().joint[5] = NAN;  // one image is marked, the others are searched
  return searches;
}

void check_instruction_set(const cnnrnn::CpuKernels& kernels, cnnrnn::Cell cell) {
  // Odd sizes: a last vector of labels, joint units and recurrent units that is not full.
  const RandomWeights weights(53, 13, 19, cell, 1);
  const std::vector<Search> searches = make_searches(weights.view());
  std::vector<Result> expected;
  for (const Search& search : searches) {
    CpuHead alone(weights.view(), kernels, kAmpleBytes);
    expected.emplace_back(search, alone.num_labels());
    search_into(&alone, search, cnnrnn::on_this_thread, &expected.back());
  }

  int64_t all_states = 0;
  for (const int64_t budget : kBudgets) {
    CpuHead head(weights.view(), kernels, budget);
    std::vector<std::thread> threads;
    for (int thread = 0; thread < kThreads; ++thread) {
      threads.emplace_back([&, thread] {
        for (size_t i = 0; i < searches.size(); ++i) {
          // Pairs of threads begin at the same search and so ask for the same states at once.
          const size_t which = (i + thread / 2 * searches.size() / 2) % searches.size();
          Result result(searches[which], head.num_labels());
          search_into(&head, searches[which], on_two_threads, &result);
          check(same_bits(result, expected[which]), "equal results", kernels, budget);
        }
      });
    }
    for (std::thread& thread : threads) thread.join();

    const int64_t kept = head.prefixes().size();
    if (budget == kAmpleBytes) {
      all_states = kept;
      check(kept > 1024, "the index grew", kernels, budget);  // it begins with 1,024 slots
    } else {
      check(kept < all_states / 2, "states were evicted", kernels, budget);
    }
    std::printf("%s, %s cell, %lld bytes: %lld states at the end\n", kernels.name,
                cell == cnnrnn::Cell::kLstm ? "LSTM" : "paper", static_cast<long long>(budget),
                static_cast<long long>(kept));
  }
}

}  // namespace

int main() {
  for (const cnnrnn::CpuKernels* kernels : cnnrnn::cases::instruction_sets()) {
    check_instruction_set(*kernels, cnnrnn::Cell::kLstm);
  }
  check_instruction_set(cnnrnn::best_cpu_kernels(), cnnrnn::Cell::kPaper);
  return failures == 0 ? 0 : 1;
}
