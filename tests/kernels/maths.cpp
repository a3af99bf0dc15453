// Checks csrc/kernels/math.h against libm in double, TopN and RowBest against a stable sort, what
// beam.h decides against cases worked by hand, and the device's prefix index under threads. Exit
// status 1 and the failing lines on standard error where one does not hold.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "kernels/beam.h"
#include "kernels/cuda/prefix_slots.h"
#include "kernels/cuda/row_best.h"
#include "kernels/math.h"
#include "kernels/topn.h"

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

int failures = 0;

void check(bool holds, const char* what, int line) {
  if (holds) return;
  std::fprintf(stderr, "line %d: %s does not hold\n", line, what);
  ++failures;
}
#define CHECK(condition) check((condition), #condition, __LINE__)

bool close(float actual, double expected) {
  return std::fabs(actual - expected) <= 1e-6 * (1.0 + std::fabs(expected));
}

double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }
double relu(double x) { return std::max(x, 0.0); }

void check_functions_of_one_argument() {
  using cnnrnn::Activation;
  for (float x = -120.0f; x <= 120.0f; x += 0.37f) {
    CHECK(cnnrnn::relu(x) == relu(x));
    CHECK(close(cnnrnn::sigmoid(x), sigmoid(x)));
    CHECK(cnnrnn::activate(Activation::kRelu, x) == relu(x));
    CHECK(close(cnnrnn::activate(Activation::kTanh, x), std::tanh(static_cast<double>(x))));
    CHECK(cnnrnn::activate(Activation::kIdentity, x) == x);
  }
  CHECK(cnnrnn::sigmoid(-kInf) == 0.0f && cnnrnn::sigmoid(kInf) == 1.0f);
  CHECK(std::isnan(cnnrnn::relu(kNan)) && std::isnan(cnnrnn::sigmoid(kNan)));
}

void check_exponential() {
  for (float x = -87.3f; x <= 88.7f; x += 0.00137f) {
    const double expected = std::exp(static_cast<double>(x));
    CHECK(std::fabs(cnnrnn::exponential(x) - expected) <= 2.4e-7 * expected);  // 2 ulp at most
    if (x <= 0.0f) CHECK(cnnrnn::exponential_of_nonpositive(x) == cnnrnn::exponential(x));
  }
  for (float x : {0.0f, -0.0f, -1e-40f, -87.4f, -500.0f, -kInf}) {
    CHECK(cnnrnn::exponential_of_nonpositive(x) == cnnrnn::exponential(x));
  }
  CHECK(std::isnan(cnnrnn::exponential_of_nonpositive(kNan)));
  CHECK(cnnrnn::exponential(0.0f) == 1.0f);
  CHECK(cnnrnn::exponential(-87.4f) == 0.0f && cnnrnn::exponential(-kInf) == 0.0f);
  CHECK(cnnrnn::exponential(88.8f) == kInf && cnnrnn::exponential(kInf) == kInf);
  CHECK(std::isnan(cnnrnn::exponential(kNan)));
  CHECK(cnnrnn::hyperbolic_tangent(kInf) == 1.0f && cnnrnn::hyperbolic_tangent(-kInf) == -1.0f);
}

void check_cells() {
  std::mt19937 random(0);
  std::normal_distribution<float> normal(0.0f, 3.0f);
  for (int i = 0; i < 1000; ++i) {
    const float in = normal(random), gi = normal(random), gf = normal(random);
    const float gg = normal(random), go = normal(random), previous = normal(random);
    float output, cell;
    cnnrnn::lstm_unit(gi, gf, gg, go, previous, &output, &cell);
    const double lstm = sigmoid(gf) * previous + sigmoid(gi) * std::tanh(static_cast<double>(gg));
    CHECK(close(cell, lstm));
    CHECK(close(output, sigmoid(go) * std::tanh(lstm)));
    cnnrnn::paper_unit(in, gi, gf, gg, previous, &output, &cell);
    const double paper = relu(gf) * previous + relu(gi) * relu(in);
    CHECK(close(cell, paper));
    CHECK(close(output, paper * relu(gg)));
  }
}

void check_step_log_prob() {
  CHECK(cnnrnn::step_log_prob(-1.0f, 2.5f) == -3.5f);
  CHECK(cnnrnn::step_log_prob(1.0f, 0.99999994f) == 0.0f);
  CHECK(cnnrnn::step_log_prob(-kInf, 0.0f) == -kInf);
  CHECK(std::isnan(cnnrnn::step_log_prob(kNan, 0.0f)));
}

struct Offer {
  float score;
  int item;
};

template <int kCapacity>
bool equal(const cnnrnn::TopN<int, kCapacity>& top, const std::vector<Offer>& expected) {
  if (top.size != static_cast<int>(expected.size())) return false;
  for (int i = 0; i < top.size; ++i) {
    if (top.scores[i] != expected[i].score || top.items[i] != expected[i].item) return false;
  }
  return true;
}

// Few distinct scores, so that most offers tie; -inf and NaN among them.
template <int kCapacity>
void check_top_n(int limit, unsigned seed) {
  std::mt19937 random(seed);
  std::uniform_int_distribution<int> level(0, 9);
  cnnrnn::TopN<int, kCapacity> top(limit);
  std::vector<Offer> sorted;
  for (int item = 0; item < 40; ++item) {
    const int drawn = level(random);
    const float score = drawn == 0 ? -kInf : drawn == 1 ? kNan : -0.5f * static_cast<float>(drawn);
    const std::vector<Offer> before = sorted;
    if (score > -kInf) sorted.push_back({score, item});
    std::stable_sort(sorted.begin(), sorted.end(),
                     [](const Offer& a, const Offer& b) { return a.score > b.score; });
    if (static_cast<int>(sorted.size()) > limit) sorted.resize(limit);
    const bool enters = std::any_of(sorted.begin(), sorted.end(),
                                    [item](const Offer& offer) { return offer.item == item; });
    CHECK(top.admits(score) == enters);
    top.offer(score, item);
    CHECK(equal(top, sorted));
    CHECK(top.full() == (static_cast<int>(sorted.size()) == limit));
    if (!sorted.empty()) CHECK(top.worst() == sorted.back().score);
  }
}

// Offers labels in ascending order, few distinct scores, and makes them continuations of a path.
// From `path_score` -1e7 on, adding to it makes scores equal that were not.
template <int kCapacity>
void check_row_best(int limit, float path_score, unsigned seed) {
  std::mt19937 random(seed);
  std::uniform_int_distribution<int> level(0, 9);
  const float log_sum_exp = 1.25f;
  alignas(16) unsigned char memory[cnnrnn::RowBest<kCapacity>::kSharedBytes + 1];
  cnnrnn::RowBest<kCapacity> best(memory, limit);
  best.clear();
  std::vector<Offer> sorted;
  for (int label = 0; label < 40; label += 1 + level(random) / 5) {
    const int drawn = level(random);
    const float score = drawn == 0 ? -kInf : drawn == 1 ? kNan : -0.25f * static_cast<float>(drawn);
    best.offer(score, label);
    if (score > -kInf) sorted.push_back({score, label});
    std::stable_sort(sorted.begin(), sorted.end(),
                     [](const Offer& a, const Offer& b) { return a.score > b.score; });
    if (static_cast<int>(sorted.size()) > limit) sorted.resize(limit);
    const bool full = static_cast<int>(sorted.size()) == limit;
    CHECK(best.bound() == (full ? sorted.back().score : -kInf));
  }
  best.extend_path(path_score, log_sum_exp);
  for (Offer& offer : sorted) {
    offer.score = path_score + cnnrnn::step_log_prob(offer.score, log_sum_exp);
  }
  std::sort(sorted.begin(), sorted.end(), [](const Offer& a, const Offer& b) {
    return a.score > b.score || (a.score == b.score && a.item < b.item);
  });
  for (const Offer& offer : sorted) {
    CHECK(best.first_score() == offer.score && best.first_label() == offer.item);
    best.drop_first();
  }
  if (limit == kCapacity) CHECK(best.first_score() == -kInf);
}

using cnnrnn::BeamRules;
using cnnrnn::Extension;
using cnnrnn::FinishedPath;
using Beam = cnnrnn::Beam<2>;
using FinishedPaths = cnnrnn::FinishedPaths<2>;
using cnnrnn::PathStep;
using cnnrnn::Stop;

BeamRules rules_of(Stop stop, bool keep_all = false) {
  return {{2, 3, 0, cnnrnn::Order::kIncreasing, false, stop}, 5, keep_all};
}

// Two live paths without states, scores -1 and `second`, and one finished path, -1.5.
uint32_t needed(const BeamRules& rules, float second, bool patient) {
  Beam beam(2);
  beam.live_count = 2;
  beam.live[0] = {-1.0f, 0, 0};
  beam.live[1] = {second, 0, 1};
  beam.done.offer(-1.5f, FinishedPath{-1, -1, 0});
  PathStep steps[2] = {};
  steps[0].kind = steps[1].kind = PathStep::Kind::kMissing;
  FinishedPaths best_case(2);
  return cnnrnn::states_needed(rules, beam, steps, beam.done, patient, &best_case);
}

void check_states_needed() {
  const BeamRules n_best = rules_of(Stop::kNBest);
  CHECK(needed(n_best, -2.0f, false) == 3);
  CHECK(needed(n_best, -2.0f, true) ==
        1);  // an end of the first at -1 would leave -1.5 second best
  CHECK(needed(n_best, -1.5f, true) == 3);  // at equal score it could go ahead of a later end
  CHECK(needed(n_best, -1.2f, true) == 3);
  CHECK(needed(rules_of(Stop::kLiteral), -2.0f, true) == 3);
  CHECK(needed(rules_of(Stop::kNBest, true), -2.0f, true) == 3);
}

// The beam after a step whose only continuation has this score, with ends of -1 and -3.
Beam after_step(const BeamRules& rules, float score) {
  Beam beam(2);
  PathStep step{};
  step.node = 7;
  FinishedPaths done(2);
  done.offer(-1.0f, FinishedPath{-1, -1, 0});
  done.offer(-3.0f, FinishedPath{-1, -1, 0});
  cnnrnn::Extensions<2> best(2);
  best.offer(score, Extension{0, 4});
  cnnrnn::take_step(rules, best, &step, done, &beam, nullptr);
  return beam;
}

void check_take_step() {
  const Beam lives = after_step(rules_of(Stop::kNBest), -2.5f);
  CHECK(lives.live_count == 1 && lives.step == 1 && lives.done.size == 2);
  CHECK(lives.live[0].parent == 7 && lives.live[0].label == 4 && lives.live[0].score == -2.5f);
  CHECK(after_step(rules_of(Stop::kNBest), -3.0f).live_count == 0);  // at the N-th best
  const Beam literal = after_step(rules_of(Stop::kLiteral), -2.5f);
  CHECK(literal.live_count == 1 && literal.accepting);
  const Beam stopped = after_step(rules_of(Stop::kLiteral), -3.5f);
  CHECK(stopped.live_count == 0 && !stopped.accepting);
  // Marginals go on while 0.001 is unfinished, or a path could still enter.
  CHECK(after_step(rules_of(Stop::kNBest, true), -3.5f).live_count == 1);
  CHECK(after_step(rules_of(Stop::kNBest, true), -7.5f).live_count == 0);
}

void check_nonfinite() {
  const BeamRules rules = rules_of(Stop::kNBest);
  Beam beam(2);
  beam.live[0] = {-2.0f, 0, 0};
  PathStep step{};
  step.kind = PathStep::Kind::kNotFinite;
  FinishedPaths done(2);
  CHECK(cnnrnn::is_nonfinite(rules, beam, &step, done));
  done.offer(-1.0f, FinishedPath{});
  done.offer(-2.0f, FinishedPath{});
  CHECK(cnnrnn::is_nonfinite(rules, beam, &step, done));  // it could have ended at -2 before
  done.offer(-1.5f, FinishedPath{});
  CHECK(!cnnrnn::is_nonfinite(rules, beam, &step, done));
}

// Four threads enter the same 2,900 prefixes of a generation, each in an order of its own, into a
// table of 4,096 slots that holds those of the generation before.
void check_prefix_slots() {
  constexpr uint64_t kMask = 4095;
  constexpr int kPrefixes = 2900;
  constexpr int kStrides[] = {3, 7, 9, 11};  // prime to the number of prefixes
  std::vector<cnnrnn::PrefixSlot> slots(kMask + 1);
  for (uint32_t generation = 1; generation <= 3; ++generation) {
    const auto key = [&](int i) { return cnnrnn::slot_key(generation, i / 29, i % 29); };
    for (int i = 0; i < kPrefixes; ++i) {
      CHECK(cnnrnn::find_node(slots.data(), kMask, key(i)) == cnnrnn::kNoNode);
    }
    std::vector<std::vector<uint64_t>> entered(4, std::vector<uint64_t>(kPrefixes));
    std::vector<std::vector<char>> is_new(4, std::vector<char>(kPrefixes));
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t) {
      threads.emplace_back([&, t] {
        for (int step = 0; step < kPrefixes; ++step) {
          const int i = (step * kStrides[t] + 700 * t) % kPrefixes;
          const cnnrnn::Entry entry =
              cnnrnn::enter_prefix(slots.data(), kMask, key(i), &entered[t][i]);
          if (entry == cnnrnn::Entry::kNew) is_new[t][i] = 1;
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    std::set<uint64_t> places;
    for (int i = 0; i < kPrefixes; ++i) {
      int news = 0;
      for (int t = 0; t < 4; ++t) {
        news += is_new[t][i];
        CHECK(entered[t][i] == entered[0][i]);
      }
      CHECK(news == 1);
      places.insert(entered[0][i]);
      CHECK(cnnrnn::find_node(slots.data(), kMask, key(i)) == cnnrnn::kNoNode);  // pending
      cnnrnn::publish_node(&slots[entered[0][i]], 10 * i);
      CHECK(cnnrnn::find_node(slots.data(), kMask, key(i)) == 10 * i);
    }
    CHECK(places.size() == kPrefixes);
    CHECK(cnnrnn::find_node(slots.data(), kMask, cnnrnn::slot_key(generation, 100, 0)) ==
          cnnrnn::kNoNode);
  }
  std::vector<cnnrnn::PrefixSlot> few(4);
  uint64_t slot;
  for (int i = 0; i < 4; ++i) {
    CHECK(cnnrnn::enter_prefix(few.data(), 3, cnnrnn::slot_key(7, i, 0), &slot) ==
          cnnrnn::Entry::kNew);
  }
  CHECK(cnnrnn::enter_prefix(few.data(), 3, cnnrnn::slot_key(7, 4, 0), &slot) ==
        cnnrnn::Entry::kFull);
  CHECK(cnnrnn::enter_prefix(few.data(), 3, cnnrnn::slot_key(7, 2, 0), &slot) ==
        cnnrnn::Entry::kThere);
  CHECK(cnnrnn::find_node(few.data(), 3, cnnrnn::slot_key(7, 4, 0)) == cnnrnn::kNoNode);
  // The largest of each part.
  const int32_t parent = (1 << cnnrnn::kParentBits) - 1, label = (1 << cnnrnn::kLabelBits) - 1;
  CHECK(cnnrnn::slot_key(cnnrnn::kLastGeneration, parent, label) == ~uint64_t{0});
}

}  // namespace

int main() {
  check_prefix_slots();
  check_states_needed();
  check_take_step();
  check_nonfinite();
  check_functions_of_one_argument();
  check_exponential();
  check_cells();
  check_step_log_prob();
  for (unsigned seed = 0; seed < 200; ++seed) {
    check_top_n<1>(1, seed);
    for (int limit : {1, 2, 15, 16}) check_top_n<16>(limit, seed);
    for (float path_score : {0.0f, -3.7f, -1e7f, -1e8f}) {
      // Where fewer are asked for than there is room for, more are kept, of which rounding may make
      // some equal to the last that is asked for.
      check_row_best<4>(4, path_score, seed);
      if (path_score > -1e7f) {
        for (int limit : {1, 3}) check_row_best<4>(limit, path_score, seed);
      }
      for (int limit : {1, 2, 15, 16}) check_row_best<16>(limit, path_score, seed);
    }
  }
  return failures == 0 ? 0 : 1;
}
