// Python module cnnrnn._C and torch op cnnrnn::beam_search: check tensors, hand raw pointers to the
// kernels. No maths here.

#include <ATen/ATen.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/Parallel.h>
#include <c10/core/DeviceGuard.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#if !defined(_WIN32)
#include <pthread.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "head_registry.h"
#include "kernels/cpu/head.h"
#include "kernels/cpu/loops.h"
#include "kernels/search.h"
#if defined(CNNRNN_WITH_CUDA)
#include "kernels/cuda/head.h"
#endif

namespace {

using at::Tensor;
using cnnrnn::CpuHead;
using cnnrnn::HeadSource;
using cnnrnn::Parameters;
using std::optional;

template <typename Enum>
Enum parse(const char* name, std::string_view value,
           std::initializer_list<std::pair<const char*, Enum>> choices) {
  std::string known;
  for (const auto& [text, choice] : choices) {
    if (value == text) return choice;
    known += known.empty() ? text : std::string(", ") + text;
  }
  TORCH_CHECK_VALUE(false, name, " must be one of ", known, ", got '", value, "'");
}

// A dense fp32 tensor of exactly this shape on this device; returns a contiguous view or copy,
// whose values are in memory as they are (no lazy negation) and begin at a multiple of 16 bytes.
Tensor checked(const char* name, const Tensor& tensor, at::IntArrayRef shape, at::Device device) {
  TORCH_CHECK_VALUE(tensor.sizes() == shape, name, " must be ", shape, ", got ", tensor.sizes());
  TORCH_CHECK_VALUE(tensor.scalar_type() == at::kFloat, name, " must be float32, got ",
                    tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.device() == device, name, " must be on ", device, ", got ",
                    tensor.device());
  const Tensor dense = tensor.resolve_neg().contiguous();
  return reinterpret_cast<uintptr_t>(dense.data_ptr()) % 16 == 0 ? dense : dense.clone();
}

optional<Tensor> checked(const char* name, const optional<Tensor>& tensor, at::IntArrayRef shape,
                         at::Device device) {
  return tensor ? optional<Tensor>(checked(name, *tensor, shape, device)) : std::nullopt;
}

const float* data_or_null(const optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<float>() : nullptr;
}

bool forked = false;  // OpenMP's threads do not survive a fork: a child searches on its own thread

using Clock = std::chrono::steady_clock;

unsigned long main_thread = 0;  // Python's signal handlers run there alone

// Threads for one call, whose work ends where a signal's handler raises an error, as Ctrl-C's does.
class CallThreads {
 public:
  cnnrnn::ParallelFor parallel_for() {
    return {[this](int64_t n, const cnnrnn::Work& work) { run(n, work); },
            [this] { return stopped(); }};
  }

 private:
  void run(int64_t n, const cnnrnn::Work& work) {
    if (n == 0) return;
    if (forked || n == 1) {
      work(0, n);
    } else {
      at::parallel_for(0, n, 1, work);
    }
    if (stopped()) throw *error_;
  }

  // Asks in the main thread, now and then.
  bool stopped() {
    if (raised_.load(std::memory_order_relaxed)) return true;
    if (PyThread_get_thread_ident() != main_thread) return false;
    static Clock::time_point asked;
    const Clock::time_point now = Clock::now();
    if (now - asked < std::chrono::milliseconds(50)) return false;
    asked = now;
    const pybind11::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() == 0) return false;
    error_.emplace();
    raised_ = true;
    return true;
  }

  std::optional<pybind11::error_already_set> error_;
  std::atomic<bool> raised_{false};  // seen by the other threads
};

// Parameters that have been checked, dense, and what the kernels are told of them.
struct CheckedWeights {
  Tensor label_embedding, input_weight, hidden_weight, output_projection;
  optional<Tensor> input_embedding, score_bias, input_bias, hidden_bias;
  cnnrnn::HeadWeights pointers;
};

CheckedWeights check_weights(const Parameters& p, std::string_view cell,
                             std::string_view activation) {
  TORCH_CHECK_VALUE(p.label_embedding.dim() == 2 && p.label_embedding.size(0) >= 3,
                    "label_embedding must be [L+2, D] with L >= 1, got ",
                    p.label_embedding.sizes());
  TORCH_CHECK_VALUE(p.output_projection.dim() == 2, "output_projection must be [D, H], got ",
                    p.output_projection.sizes());
  const int64_t L = p.label_embedding.size(0) - 2, D = p.label_embedding.size(1);
  const int64_t H = p.output_projection.size(1);
  const at::Device device = p.label_embedding.device();
  CheckedWeights w{
      .label_embedding = checked("label_embedding", p.label_embedding, {L + 2, D}, device),
      .input_weight = checked("input_weight", p.input_weight, {4 * H, D}, device),
      .hidden_weight = checked("hidden_weight", p.hidden_weight, {4 * H, H}, device),
      .output_projection = checked("output_projection", p.output_projection, {D, H}, device),
      .input_embedding = checked("input_embedding", p.input_embedding, {L + 2, D}, device),
      .score_bias = checked("score_bias", p.score_bias, {L + 1}, device),
      .input_bias = checked("input_bias", p.input_bias, {4 * H}, device),
      .hidden_bias = checked("hidden_bias", p.hidden_bias, {4 * H}, device),
      .pointers = {},
  };
  w.pointers = {
      .num_labels = L,
      .joint_dim = D,
      .hidden_dim = H,
      .cell = parse<cnnrnn::Cell>("cell", cell,
                                  {{"lstm", cnnrnn::Cell::kLstm}, {"paper", cnnrnn::Cell::kPaper}}),
      .activation = parse<cnnrnn::Activation>("activation", activation,
                                              {{"relu", cnnrnn::Activation::kRelu},
                                               {"tanh", cnnrnn::Activation::kTanh},
                                               {"identity", cnnrnn::Activation::kIdentity}}),
      .label_embedding = w.label_embedding.const_data_ptr<float>(),
      .input_embedding = data_or_null(w.input_embedding),
      .score_bias = data_or_null(w.score_bias),
      .input_weight = w.input_weight.const_data_ptr<float>(),
      .hidden_weight = w.hidden_weight.const_data_ptr<float>(),
      .input_bias = data_or_null(w.input_bias),
      .hidden_bias = data_or_null(w.hidden_bias),
      .output_projection = w.output_projection.const_data_ptr<float>(),
  };
  return w;
}

std::shared_ptr<CpuHead> make_cpu_head(const Parameters& p, std::string_view cell,
                                       std::string_view activation, int64_t prefix_bytes,
                                       const std::string& instruction_set) {
  TORCH_CHECK_VALUE(p.label_embedding.device().is_cpu(), "label_embedding must be on cpu, got ",
                    p.label_embedding.device());
  const CheckedWeights weights = check_weights(p, cell, activation);
  const cnnrnn::CpuKernels* kernels = instruction_set == "auto"
                                          ? &cnnrnn::best_cpu_kernels()
                                          : cnnrnn::find_cpu_kernels(instruction_set.c_str());
  TORCH_CHECK_VALUE(kernels != nullptr, "instruction_set must be auto or one of this build's and ",
                    "this processor's (see instruction_sets()), got '", instruction_set, "'");
  CallThreads threads;
  return std::make_shared<CpuHead>(weights.pointers, *kernels, prefix_bytes,
                                   threads.parallel_for());
}

struct Outputs {
  Tensor labels;     // [B, N, T]
  Tensor lengths;    // [B, N]
  Tensor log_probs;  // [B, N]
  optional<Tensor> marginals, log_evidence, trace;
  cnnrnn::SearchStats stats;
};

// A call of the search whose arguments have been checked.
struct Query {
  cnnrnn::SearchOptions options;
  Tensor joint;                   // [B, D]
  optional<Tensor> label_logits;  // [B, L+1]
  optional<Tensor> evidence;      // [1 or B, L]
  Outputs out;

  cnnrnn::ImageEmbeddings images() const {
    return {joint.size(0), joint.const_data_ptr<float>(), data_or_null(label_logits),
            evidence ? evidence->const_data_ptr<int8_t>() : nullptr,
            evidence && evidence->size(0) == joint.size(0) ? evidence->size(1) : 0};
  }
  cnnrnn::SearchOutput output() const {
    return {out.labels.data_ptr<int64_t>(),
            out.lengths.data_ptr<int64_t>(),
            out.log_probs.data_ptr<float>(),
            out.marginals ? out.marginals->data_ptr<float>() : nullptr,
            out.log_evidence ? out.log_evidence->data_ptr<float>() : nullptr,
            out.trace ? out.trace->data_ptr<int32_t>() : nullptr,
            out.trace ? out.trace->size(2) : 0};
  }
};

// The options of a call, as they come from Python.
struct Request {
  const Tensor& joint;
  const optional<Tensor>& label_logits;
  int64_t beam_size, max_labels, min_labels;
  std::string_view order;
  bool end_takes_slot;
  std::string_view stop;
  bool marginals, trace;
  std::string_view precision;
  int64_t rounds;  // of a captured search, see CudaHead::search
  const optional<Tensor>& evidence;
  int64_t marginal_places;
};

// What is known of labels, dense on the CPU, [1 or B, L]; and the most present labels of an image.
struct CheckedEvidence {
  optional<Tensor> rows;
  int64_t most_present = 0;
};

CheckedEvidence check_evidence(const optional<Tensor>& evidence, int64_t B, int64_t L, int64_t T) {
  if (!evidence) return {};
  TORCH_CHECK_VALUE(evidence->dim() == 2 && evidence->size(1) == L &&
                        (evidence->size(0) == B || evidence->size(0) == 1),
                    "evidence must be [1 or ", B, ", ", L, "], got ", evidence->sizes());
  TORCH_CHECK_VALUE(evidence->scalar_type() == at::kChar, "evidence must be int8, got ",
                    evidence->scalar_type());
  CheckedEvidence checked{evidence->to(at::kCPU).resolve_neg().contiguous()};
  const int8_t* values = checked.rows->const_data_ptr<int8_t>();
  for (int64_t image = 0; image < checked.rows->size(0); ++image) {
    int64_t present = 0;
    for (int64_t l = 0; l < L; ++l, ++values) {
      TORCH_CHECK_VALUE(-1 <= *values && *values <= 1,
                        "evidence must be 1 (present), -1 (absent) or 0 (unknown), got ",
                        static_cast<int>(*values), " for label ", l, " of image ", image);
      present += *values == 1;
    }
    TORCH_CHECK_VALUE(present <= T, "image ", image, " has ", present,
                      " labels known to be present, more than max_labels (", T, ")");
    checked.most_present = std::max(checked.most_present, present);
  }
  return checked;
}

Query check_request(const Request& r, int64_t L, int64_t D, at::Device device) {
  TORCH_CHECK_VALUE(r.joint.dim() == 2, "joint must be [B, D], got ", r.joint.sizes());
  TORCH_CHECK_VALUE(r.beam_size >= 1 && r.beam_size <= cnnrnn::kMaxBeamSize,
                    "beam_size must be in 1..", cnnrnn::kMaxBeamSize, ", got ", r.beam_size);
  TORCH_CHECK_VALUE(0 <= r.min_labels && r.min_labels <= r.max_labels, "min_labels (", r.min_labels,
                    ") must be in 0..max_labels (", r.max_labels, ")");
  TORCH_CHECK_VALUE(0 <= r.marginal_places && r.marginal_places <= cnnrnn::kMaxPlaces,
                    "marginal_places must be in 0..", cnnrnn::kMaxPlaces, ", got ",
                    r.marginal_places);
  const int64_t B = r.joint.size(0), N = r.beam_size, T = r.max_labels;
  const int64_t places = r.marginals ? std::max(N, r.marginal_places) : N;
  const CheckedEvidence evidence = check_evidence(r.evidence, B, L, T);
  const auto on_device = at::TensorOptions().device(device);
  Query query{
      .options =
          {
              .beam_size = static_cast<int>(N),
              .max_labels = T,
              .min_labels = r.min_labels,
              .order = parse<cnnrnn::Order>("order", r.order,
                                            {{"increasing", cnnrnn::Order::kIncreasing},
                                             {"unique", cnnrnn::Order::kUnique},
                                             {"free", cnnrnn::Order::kFree}}),
              .end_takes_slot = r.end_takes_slot,
              .stop = parse<cnnrnn::Stop>(
                  "stop", r.stop,
                  {{"n_best", cnnrnn::Stop::kNBest}, {"literal", cnnrnn::Stop::kLiteral}}),
              .precision = parse<cnnrnn::Precision>(
                  "precision", r.precision,
                  {{"exact", cnnrnn::Precision::kExact}, {"fast", cnnrnn::Precision::kFast}}),
              .places = static_cast<int>(places),
          },
      .joint = checked("joint", r.joint, {B, D}, device),
      .label_logits = checked("label_logits", r.label_logits, {B, L + 1}, device),
      .evidence = evidence.rows,
      .out = {.labels = at::empty({B, N, T}, on_device.dtype(at::kLong)),
              .lengths = at::empty({B, N}, on_device.dtype(at::kLong)),
              .log_probs = at::empty({B, N}, on_device.dtype(at::kFloat)),
              .marginals = {},
              .log_evidence = {},
              .trace = {},
              .stats = {}},
  };
  if (r.marginals) {
    query.out.marginals = at::empty({B, L}, on_device.dtype(at::kFloat));
    query.out.log_evidence = at::empty({B}, on_device.dtype(at::kFloat));
  }
  if (r.trace) {
    const int64_t width = places * (evidence.most_present + 1);
    query.out.trace = at::empty({B, T + 1, width, 2}, on_device.dtype(at::kInt));
  }
  return query;
}

Outputs search(CpuHead* head, const Request& request) {
  Query query = check_request(request, head->num_labels(), head->joint_dim(), at::kCPU);
  CallThreads threads;
  query.out.stats = cnnrnn::beam_search_cpu(head, query.options, query.images(), query.output(),
                                            threads.parallel_for());
  return query.out;
}

// What `CpuHead.best_sets` returns to Python.
struct BestSets {
  Tensor labels, lengths, log_probs, proved, ended, expansions;
  cnnrnn::SearchStats stats;
};

BestSets best_sets(CpuHead* head, const Tensor& joint, const optional<Tensor>& label_logits,
                   int64_t count, int64_t max_labels, int64_t min_labels, double least,
                   int64_t max_expansions, const optional<Tensor>& evidence) {
  TORCH_CHECK_VALUE(joint.dim() == 2, "joint must be [B, D], got ", joint.sizes());
  const int64_t B = joint.size(0), L = head->num_labels();
  TORCH_CHECK_VALUE(count >= 1, "count must be at least 1, got ", count);
  TORCH_CHECK_VALUE(max_expansions >= 1, "max_expansions must be at least 1, got ", max_expansions);
  TORCH_CHECK_VALUE(0 <= min_labels && min_labels <= max_labels && max_labels <= L, "min_labels (",
                    min_labels, ") and max_labels (", max_labels, ") must be in 0..", L,
                    ", in this order");
  const Tensor x = checked("joint", joint, {B, head->joint_dim()}, at::kCPU);
  const optional<Tensor> logits = checked("label_logits", label_logits, {B, L + 1}, at::kCPU);
  const CheckedEvidence known = check_evidence(evidence, B, L, max_labels);
  BestSets out{at::empty({B, count, max_labels}, at::kLong),
               at::empty({B, count}, at::kLong),
               at::empty({B, count}, at::kFloat),
               at::empty({B}, at::kLong),
               at::empty({B}, at::kBool),
               at::empty({B}, at::kLong),
               {}};
  CallThreads threads;
  out.stats = cnnrnn::best_sets_cpu(
      head, {count, max_labels, min_labels, static_cast<float>(least), max_expansions},
      {B, x.const_data_ptr<float>(), data_or_null(logits),
       known.rows ? known.rows->const_data_ptr<int8_t>() : nullptr,
       known.rows && known.rows->size(0) == B ? L : 0},
      {out.labels.data_ptr<int64_t>(), out.lengths.data_ptr<int64_t>(),
       out.log_probs.data_ptr<float>(), out.proved.data_ptr<int64_t>(), out.ended.data_ptr<bool>(),
       out.expansions.data_ptr<int64_t>()},
      threads.parallel_for());
  return out;
}

#if defined(CNNRNN_WITH_CUDA)

// Memory of torch's allocator, which frees it in the order of the stream it was asked for on.
class TorchMemory : public cnnrnn::DeviceMemory {
 public:
  explicit TorchMemory(at::Device device) : device_(device) {}

  void* allocate(int64_t bytes) override {
    blocks_.push_back(at::empty({bytes}, at::TensorOptions().device(device_).dtype(at::kByte)));
    bytes_ += bytes;
    return blocks_.back().data_ptr();
  }

  // Freed memory waits for what has been asked of this stream.
  void used_on(const c10::Stream& stream) {
    for (const Tensor& block : blocks_) block.record_stream(stream);
  }

  int64_t bytes() const { return bytes_; }

 private:
  at::Device device_;
  std::vector<Tensor> blocks_;
  int64_t bytes_ = 0;
};

cudaStream_t handle(const c10::Stream& stream) {
  return static_cast<cudaStream_t>(stream.native_handle());
}

// A head on one GPU and the memory it lives in.
class TorchCudaHead : public std::enable_shared_from_this<TorchCudaHead> {
 public:
  TorchCudaHead(const Parameters& parameters, std::string_view cell, std::string_view activation,
                int64_t prefix_bytes)
      : device_(parameters.label_embedding.device()), memory_(device_) {
    TORCH_CHECK_VALUE(device_.is_cuda(), "label_embedding must be on a GPU, got ", device_);
    const c10::DeviceGuard guard(device_);
    const CheckedWeights weights = check_weights(parameters, cell, activation);
    const c10::Stream stream = at::accelerator::getCurrentStream(device_.index());
    try {
      head_.emplace(weights.pointers, prefix_bytes, device_.index(), &memory_, handle(stream));
    } catch (const c10::OutOfMemoryError& error) {
      TORCH_CHECK_WITH(OutOfMemoryError, false, "no memory on ", device_, " for a head of ",
                       weights.pointers.num_labels, " labels and ", prefix_bytes,
                       " bytes of prefix states (head.prefix_bytes) after ", memory_.bytes(),
                       " bytes: ", error.what_without_backtrace());
    }
  }

  Outputs search(const Request& request) {
    const c10::DeviceGuard guard(device_);
    const c10::Stream stream = at::accelerator::getCurrentStream(device_.index());
    TorchMemory scratch(device_);
    try {
      Query query = check_request(request, head_->num_labels(), head_->joint_dim(), device_);
      query.out.stats = head_->search(query.options, query.images(), query.output(), &scratch,
                                      handle(stream), request.rounds);
      if (head_->was_captured()) {
        outlive_graphs();
      } else {
        memory_.used_on(stream);
      }
      return query.out;
    } catch (const c10::OutOfMemoryError& error) {
      TORCH_CHECK_WITH(OutOfMemoryError, false, "no memory on ", device_, " to search ",
                       request.joint.size(0), " images at once (beam_size ", request.beam_size,
                       ", max_labels ", request.max_labels, ") after ", scratch.bytes(),
                       " bytes beside the result: ", error.what_without_backtrace());
    }
  }

 private:
  // A graph knows the memory that it reads, not the head: that stays until the process ends.
  void outlive_graphs() {
    static auto* const kept = new std::set<std::shared_ptr<TorchCudaHead>>;
    static auto* const mutex = new std::mutex;
    const std::lock_guard lock(*mutex);
    kept->insert(shared_from_this());
  }

  const at::Device device_;
  TorchMemory memory_;
  optional<cnnrnn::CudaHead> head_;
};

#endif  // CNNRNN_WITH_CUDA

// Not destroyed: a thread may be searching while the process ends.
auto* cpu_heads = new cnnrnn::HeadRegistry<CpuHead>;
#if defined(CNNRNN_WITH_CUDA)
auto* cuda_heads = new cnnrnn::HeadRegistry<TorchCudaHead>;
#endif

void after_fork_in_child() {
  forked = true;
  main_thread = PyThread_get_thread_ident();
  // A thread may have held the old one's lock; freeing what lies on a GPU would need CUDA, which a
  // forked child cannot use.
  cpu_heads = new cnnrnn::HeadRegistry<CpuHead>;
#if defined(CNNRNN_WITH_CUDA)
  cuda_heads = new cnnrnn::HeadRegistry<TorchCudaHead>;
#endif
}

std::shared_ptr<CpuHead> pack_for_cpu(const HeadSource& source) {
  return make_cpu_head(source.parameters, source.cell, source.activation, source.prefix_bytes,
                       "auto");
}

#if defined(CNNRNN_WITH_CUDA)
std::shared_ptr<TorchCudaHead> pack_for_cuda(const HeadSource& source) {
  return std::make_shared<TorchCudaHead>(source.parameters, source.cell, source.activation,
                                         source.prefix_bytes);
}
#endif

// labels, lengths, log_probs, marginals, log_evidence
using OpResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

OpResult op_result(const Outputs& out) {
  const auto floats = out.log_probs.options();
  return {out.labels, out.lengths, out.log_probs,
          out.marginals ? *out.marginals : at::empty({out.labels.size(0), 0}, floats),
          out.log_evidence ? *out.log_evidence : at::empty({0}, floats)};
}

OpResult beam_search_op(const Tensor& joint, const optional<Tensor>& label_logits,
                        const Tensor& label_embedding, const optional<Tensor>& input_embedding,
                        const optional<Tensor>& score_bias, const Tensor& input_weight,
                        const Tensor& hidden_weight, const optional<Tensor>& input_bias,
                        const optional<Tensor>& hidden_bias, const Tensor& output_projection,
                        c10::string_view cell, c10::string_view activation, int64_t beam_size,
                        int64_t max_labels, int64_t min_labels, c10::string_view order,
                        bool end_takes_slot, c10::string_view stop, bool marginals,
                        int64_t cache_generation, int64_t prefix_bytes, c10::string_view precision,
                        const optional<Tensor>& evidence, int64_t marginal_places) {
  // A search in the main thread may need the GIL while it holds what this one waits for.
  std::optional<pybind11::gil_scoped_release> release;
  if (PyGILState_Check() != 0) release.emplace();
  const HeadSource source{{label_embedding, input_embedding, score_bias, input_weight,
                           hidden_weight, input_bias, hidden_bias, output_projection},
                          cell,
                          activation,
                          cache_generation,
                          prefix_bytes,
                          label_embedding.device(),
                          cnnrnn::kOpCallers};
  const Request request{joint,     label_logits,       beam_size, max_labels,     min_labels,
                        order,     end_takes_slot,     stop,      marginals,      /*trace=*/false,
                        precision, cnnrnn::kAllRounds, evidence,  marginal_places};
#if defined(CNNRNN_WITH_CUDA)
  if (label_embedding.is_cuda()) {
    return op_result(cuda_heads->find_or_make(source, pack_for_cuda)->search(request));
  }
#endif
  return op_result(search(cpu_heads->find_or_make(source, pack_for_cpu).get(), request));
}

// Shapes alone, for fake tensors: torch.compile, torch.export.
OpResult beam_search_meta(const Tensor& joint, const optional<Tensor>&,
                          const Tensor& label_embedding, const optional<Tensor>&,
                          const optional<Tensor>&, const Tensor&, const Tensor&,
                          const optional<Tensor>&, const optional<Tensor>&, const Tensor&,
                          c10::string_view, c10::string_view, int64_t beam_size, int64_t max_labels,
                          int64_t, c10::string_view, bool, c10::string_view, bool marginals,
                          int64_t, int64_t, c10::string_view, const optional<Tensor>&, int64_t) {
  const c10::SymInt B = joint.sym_size(0);
  const c10::SymInt L = label_embedding.sym_size(0) - 2;
  return {at::empty_symint({B, beam_size, max_labels}, joint.options().dtype(at::kLong)),
          at::empty_symint({B, beam_size}, joint.options().dtype(at::kLong)),
          at::empty_symint({B, beam_size}, joint.options()),
          at::empty_symint({B, marginals ? L : c10::SymInt(0)}, joint.options()),
          at::empty_symint({marginals ? B : c10::SymInt(0)}, joint.options())};
}

}  // namespace

TORCH_LIBRARY(cnnrnn, m) {
  m.def(
      "beam_search(Tensor joint, Tensor? label_logits, Tensor label_embedding, "
      "Tensor? input_embedding, Tensor? score_bias, Tensor input_weight, Tensor hidden_weight, "
      "Tensor? input_bias, "
      "Tensor? hidden_bias, Tensor output_projection, str cell, str activation, int beam_size, "
      "int max_labels, int min_labels, str order, bool end_takes_slot, str stop, bool marginals, "
      "int cache_generation=0, int prefix_bytes=536870912, "
      "str precision='exact', Tensor? evidence=None, int marginal_places=0) "
      "-> (Tensor labels, Tensor lengths, Tensor log_probs, Tensor marginals, Tensor log_evidence)",
      {at::Tag::pt2_compliant_tag, at::Tag::cudagraph_unsafe});
}
TORCH_LIBRARY_IMPL(cnnrnn, CPU, m) { m.impl("beam_search", &beam_search_op); }
#if defined(CNNRNN_WITH_CUDA)
TORCH_LIBRARY_IMPL(cnnrnn, CUDA, m) { m.impl("beam_search", &beam_search_op); }
#endif
TORCH_LIBRARY_IMPL(cnnrnn, Meta, m) { m.impl("beam_search", &beam_search_meta); }

namespace {

namespace py = pybind11;

// The method beam_search, the same for every kind of head.
template <typename Class, typename Search>
void define_search(Class* head_class, const Search& search) {
  head_class->def(
      "beam_search",
      [search](typename Class::type& head, const Tensor& joint,
               const optional<Tensor>& label_logits, int64_t beam_size, int64_t max_labels,
               int64_t min_labels, const std::string& order, bool end_takes_slot,
               const std::string& stop, bool marginals, bool trace, const std::string& precision,
               int64_t rounds, const optional<Tensor>& evidence, int64_t marginal_places) {
        Outputs out;
        {
          const py::gil_scoped_release release;
          out = search(
              &head, {joint, label_logits, beam_size, max_labels, min_labels, order, end_takes_slot,
                      stop, marginals, trace, precision, rounds, evidence, marginal_places});
        }
        const cnnrnn::SearchStats& s = out.stats;
        return py::make_tuple(out.labels, out.lengths, out.log_probs, out.marginals, out.trace,
                              py::make_tuple(s.prefix_lookups, s.prefix_hits, s.prefix_nodes,
                                             s.prefix_parents, s.prefix_bytes),
                              s.nonfinite_images, out.log_evidence);
      },
      py::arg("joint"), py::arg("label_logits"), py::arg("beam_size"), py::arg("max_labels"),
      py::arg("min_labels"), py::arg("order"), py::arg("end_takes_slot"), py::arg("stop"),
      py::arg("marginals"), py::arg("trace") = false, py::arg("precision") = "exact",
      py::arg("rounds") = cnnrnn::kAllRounds, py::arg("evidence") = py::none(),
      py::arg("marginal_places") = 0,
      "Search B images; returns labels, lengths, log_probs, marginals or None, every step's "
      "decisions or None, the figures of SearchStats, how many images were marked, and "
      "log_evidence or None.");
}

constexpr int64_t kPrefixBytes = int64_t{512} << 20;

// The source with its parameters as the kernels take them, wherever and in whichever type they are.
HeadSource converted(const HeadSource& source) {
  const auto convert = [&](const Tensor& tensor) {
    return tensor.detach().to(source.device, at::kFloat);
  };
  const auto convert_given = [&](const optional<Tensor>& tensor) {
    return tensor ? optional<Tensor>(convert(*tensor)) : std::nullopt;
  };
  const Parameters& p = source.parameters;
  HeadSource out = source;
  out.parameters = {convert(p.label_embedding),   convert_given(p.input_embedding),
                    convert_given(p.score_bias),  convert(p.input_weight),
                    convert(p.hidden_weight),     convert_given(p.input_bias),
                    convert_given(p.hidden_bias), convert(p.output_projection)};
  return out;
}

template <typename Packed, typename Pack>
py::object found_or_packed(cnnrnn::HeadRegistry<Packed>* heads, const HeadSource& source,
                           const Pack& pack) {
  std::shared_ptr<Packed> packed = heads->find(source);
  if (packed == nullptr) {
    const py::gil_scoped_release release;
    packed = heads->find_or_make(source,
                                 [&](const HeadSource& given) { return pack(converted(given)); });
  }
  return py::cast(std::move(packed));
}

py::object packed_head(const HeadSource& source) {
#if defined(CNNRNN_WITH_CUDA)
  if (source.device.is_cuda()) return found_or_packed(cuda_heads, source, pack_for_cuda);
#endif
  return found_or_packed(cpu_heads, source, pack_for_cpu);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled beam search of cnnrnn.";
  m.attr("MAX_BEAM_SIZE") = cnnrnn::kMaxBeamSize;
  m.attr("MAX_CUDA_PATHS") = cnnrnn::kMaxCudaPaths;
  main_thread =
      py::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
#if !defined(_WIN32)
  pthread_atfork(nullptr, nullptr, after_fork_in_child);
#endif
  py::class_<CpuHead, std::shared_ptr<CpuHead>> cpu_head(
      m, "CpuHead", "A head's weights packed for the CPU search, and its kept prefix states.");
  cpu_head.def(py::init([](const Tensor& label_embedding, const optional<Tensor>& input_embedding,
                           const optional<Tensor>& score_bias, const Tensor& input_weight,
                           const Tensor& hidden_weight, const optional<Tensor>& input_bias,
                           const optional<Tensor>& hidden_bias, const Tensor& output_projection,
                           const std::string& cell, const std::string& activation,
                           int64_t prefix_bytes, const std::string& instruction_set) {
                 return make_cpu_head({label_embedding, input_embedding, score_bias, input_weight,
                                       hidden_weight, input_bias, hidden_bias, output_projection},
                                      cell, activation, prefix_bytes, instruction_set);
               }),
               py::arg("label_embedding"), py::arg("input_embedding"), py::arg("score_bias"),
               py::arg("input_weight"), py::arg("hidden_weight"), py::arg("input_bias"),
               py::arg("hidden_bias"), py::arg("output_projection"), py::kw_only(), py::arg("cell"),
               py::arg("activation"), py::arg("prefix_bytes") = kPrefixBytes,
               py::arg("instruction_set") = "auto", py::call_guard<py::gil_scoped_release>());
  define_search(&cpu_head,
                [](CpuHead* head, const Request& request) { return search(head, request); });
  cpu_head.def(
      "best_sets",
      [](CpuHead& head, const Tensor& joint, const optional<Tensor>& label_logits, int64_t count,
         int64_t max_labels, int64_t min_labels, double least, int64_t max_expansions,
         const optional<Tensor>& evidence) {
        BestSets out;
        {
          const py::gil_scoped_release release;
          out = best_sets(&head, joint, label_logits, count, max_labels, min_labels, least,
                          max_expansions, evidence);
        }
        const cnnrnn::SearchStats& s = out.stats;
        return py::make_tuple(out.labels, out.lengths, out.log_probs, out.proved, out.ended,
                              out.expansions,
                              py::make_tuple(s.prefix_lookups, s.prefix_hits, s.prefix_nodes,
                                             s.prefix_parents, s.prefix_bytes),
                              s.nonfinite_images);
      },
      py::arg("joint"), py::arg("label_logits"), py::arg("count"), py::arg("max_labels"),
      py::arg("min_labels"), py::arg("least"), py::arg("max_expansions"),
      py::arg("evidence") = py::none(),
      "Find the most probable label sets along increasing paths; returns labels, lengths, "
      "log_probs, how many are proved, whether no other is left, expansions, the figures of "
      "SearchStats, and how many images were marked.");
#if defined(CNNRNN_WITH_CUDA)
  m.attr("WITH_CUDA") = true;
  py::class_<TorchCudaHead, std::shared_ptr<TorchCudaHead>> cuda_head(
      m, "CudaHead", "A head's weights packed on its GPU, and its kept prefix states.");
  cuda_head.def(
      py::init([](const Tensor& label_embedding, const optional<Tensor>& input_embedding,
                  const optional<Tensor>& score_bias, const Tensor& input_weight,
                  const Tensor& hidden_weight, const optional<Tensor>& input_bias,
                  const optional<Tensor>& hidden_bias, const Tensor& output_projection,
                  const std::string& cell, const std::string& activation, int64_t prefix_bytes) {
        const Parameters parameters{label_embedding, input_embedding,  score_bias,
                                    input_weight,    hidden_weight,    input_bias,
                                    hidden_bias,     output_projection};
        return std::make_shared<TorchCudaHead>(parameters, cell, activation, prefix_bytes);
      }),
      py::arg("label_embedding"), py::arg("input_embedding"), py::arg("score_bias"),
      py::arg("input_weight"), py::arg("hidden_weight"), py::arg("input_bias"),
      py::arg("hidden_bias"), py::arg("output_projection"), py::kw_only(), py::arg("cell"),
      py::arg("activation"), py::arg("prefix_bytes") = kPrefixBytes,
      py::call_guard<py::gil_scoped_release>());
  define_search(&cuda_head,
                [](TorchCudaHead* head, const Request& request) { return head->search(request); });
#else
  m.attr("WITH_CUDA") = false;
#endif
  m.def(
      "packed_head",
      [](int64_t owner, const at::Device& device, std::string_view cell,
         std::string_view activation, int64_t cache_generation, int64_t prefix_bytes,
         const Tensor& label_embedding, const optional<Tensor>& input_embedding,
         const optional<Tensor>& score_bias, const Tensor& input_weight,
         const Tensor& hidden_weight, const optional<Tensor>& input_bias,
         const optional<Tensor>& hidden_bias, const Tensor& output_projection) {
        return packed_head({{label_embedding, input_embedding, score_bias, input_weight,
                             hidden_weight, input_bias, hidden_bias, output_projection},
                            cell,
                            activation,
                            cache_generation,
                            prefix_bytes,
                            device,
                            owner});
      },
      "Return an owner's head as a device's kernels read it, packed again where anything differs "
      "from what was packed last.");
  m.def(
      "forget_head",
      [](int64_t owner) {
        size_t dropped = cpu_heads->forget(owner);
#if defined(CNNRNN_WITH_CUDA)
        dropped += cuda_heads->forget(owner);
#endif
        return dropped;
      },
      "Drop what was packed of an owner's head; returns of how many devices something was.");
  m.def(
      "instruction_sets",
      [] {
        std::vector<std::string> names;
        for (const char* name : {"avx512", "avx2", "portable"}) {
          if (cnnrnn::find_cpu_kernels(name) != nullptr) names.emplace_back(name);
        }
        return names;
      },
      "Names of the instruction sets that this build has and this processor runs, fastest first.");
}
