// Checks csrc/kernels/math.h against libm in double, and TopN against a stable sort.
// Exit status 1 and the failing lines on standard error where one does not hold.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

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

}  // namespace

int main() {
  check_functions_of_one_argument();
  check_exponential();
  check_cells();
  check_step_log_prob();
  for (unsigned seed = 0; seed < 200; ++seed) {
    check_top_n<1>(1, seed);
    for (int limit : {1, 2, 15, 16}) check_top_n<16>(limit, seed);
  }
  return failures == 0 ? 0 : 1;
}
