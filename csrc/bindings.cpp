// Python module cnnrnn._C and torch op cnnrnn::beam_search: check tensors, hand raw pointers to the
// kernels. No maths here.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <algorithm>
#if !defined(_WIN32)
#include <pthread.h>
#endif

#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/cpu_head.h"
#include "kernels/cpu_kernels.h"
#include "kernels/search.h"

namespace {

using at::Tensor;
using cnnrnn::CpuHead;
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

// A dense fp32 CPU tensor of exactly this shape; returns a contiguous view or copy.
Tensor checked(const char* name, const Tensor& tensor, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(tensor.sizes() == shape, name, " must be ", shape, ", got ", tensor.sizes());
  TORCH_CHECK_VALUE(tensor.scalar_type() == at::kFloat, name, " must be float32, got ",
                    tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.device().is_cpu(), name, " must be on the CPU, got ", tensor.device());
  return tensor.contiguous();
}

optional<Tensor> checked(const char* name, const optional<Tensor>& tensor, at::IntArrayRef shape) {
  return tensor ? optional<Tensor>(checked(name, *tensor, shape)) : std::nullopt;
}

const float* data_or_null(const optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<float>() : nullptr;
}

bool forked = false;  // OpenMP's threads do not survive a fork: a child searches on its own thread

void parallel_for(int64_t n, const cnnrnn::Work& work) {
  if (n == 0) return;
  if (forked || n == 1) return work(0, n);
  at::parallel_for(0, n, 1, work);
}

// A head's parameters, shapes as in kernels/search.h.
struct Parameters {
  const Tensor& label_embedding;        // [L+2, D]
  const optional<Tensor>& score_bias;   // [L+1]
  const Tensor& input_weight;           // [4H, D]
  const Tensor& hidden_weight;          // [4H, H]
  const optional<Tensor>& input_bias;   // [4H]
  const optional<Tensor>& hidden_bias;  // [4H]
  const Tensor& output_projection;      // [D, H]
};

std::shared_ptr<CpuHead> make_head(const Parameters& p, std::string_view cell,
                                   std::string_view activation, int64_t prefix_bytes,
                                   const std::string& instruction_set) {
  TORCH_CHECK_VALUE(p.label_embedding.dim() == 2 && p.label_embedding.size(0) >= 3,
                    "label_embedding must be [L+2, D] with L >= 1, got ",
                    p.label_embedding.sizes());
  TORCH_CHECK_VALUE(p.output_projection.dim() == 2, "output_projection must be [D, H], got ",
                    p.output_projection.sizes());
  const int64_t L = p.label_embedding.size(0) - 2, D = p.label_embedding.size(1);
  const int64_t H = p.output_projection.size(1);
  const Tensor label_embedding = checked("label_embedding", p.label_embedding, {L + 2, D});
  const optional<Tensor> score_bias = checked("score_bias", p.score_bias, {L + 1});
  const Tensor input_weight = checked("input_weight", p.input_weight, {4 * H, D});
  const Tensor hidden_weight = checked("hidden_weight", p.hidden_weight, {4 * H, H});
  const optional<Tensor> input_bias = checked("input_bias", p.input_bias, {4 * H});
  const optional<Tensor> hidden_bias = checked("hidden_bias", p.hidden_bias, {4 * H});
  const Tensor output_projection = checked("output_projection", p.output_projection, {D, H});
  const cnnrnn::CpuKernels* kernels = instruction_set == "auto"
                                          ? &cnnrnn::best_cpu_kernels()
                                          : cnnrnn::find_cpu_kernels(instruction_set.c_str());
  TORCH_CHECK_VALUE(kernels != nullptr, "instruction_set must be auto or one of this build's and ",
                    "this processor's (see instruction_sets()), got '", instruction_set, "'");
  const cnnrnn::HeadWeights weights{
      .num_labels = L,
      .joint_dim = D,
      .hidden_dim = H,
      .cell = parse<cnnrnn::Cell>("cell", cell,
                                  {{"lstm", cnnrnn::Cell::kLstm}, {"paper", cnnrnn::Cell::kPaper}}),
      .activation = parse<cnnrnn::Activation>("activation", activation,
                                              {{"relu", cnnrnn::Activation::kRelu},
                                               {"tanh", cnnrnn::Activation::kTanh},
                                               {"identity", cnnrnn::Activation::kIdentity}}),
      .label_embedding = label_embedding.const_data_ptr<float>(),
      .score_bias = data_or_null(score_bias),
      .input_weight = input_weight.const_data_ptr<float>(),
      .hidden_weight = hidden_weight.const_data_ptr<float>(),
      .input_bias = data_or_null(input_bias),
      .hidden_bias = data_or_null(hidden_bias),
      .output_projection = output_projection.const_data_ptr<float>(),
  };
  return std::make_shared<CpuHead>(weights, *kernels, prefix_bytes);
}

struct Outputs {
  Tensor labels;     // [B, N, T]
  Tensor lengths;    // [B, N]
  Tensor log_probs;  // [B, N]
  optional<Tensor> marginals, trace;
  cnnrnn::SearchStats stats;
};

Outputs search(CpuHead* head, const Tensor& joint, const optional<Tensor>& label_logits,
               int64_t beam_size, int64_t max_labels, int64_t min_labels, std::string_view order,
               bool end_takes_slot, std::string_view stop, bool marginals, bool trace) {
  TORCH_CHECK_VALUE(joint.dim() == 2, "joint must be [B, D], got ", joint.sizes());
  TORCH_CHECK_VALUE(beam_size >= 1 && beam_size <= cnnrnn::kMaxBeamSize, "beam_size must be in 1..",
                    cnnrnn::kMaxBeamSize, ", got ", beam_size);
  TORCH_CHECK_VALUE(0 <= min_labels && min_labels <= max_labels, "min_labels (", min_labels,
                    ") must be in 0..max_labels (", max_labels, ")");
  const int64_t B = joint.size(0), L = head->num_labels(), N = beam_size, T = max_labels;
  const Tensor joint_ = checked("joint", joint, {B, head->joint_dim()});
  const optional<Tensor> label_logits_ = checked("label_logits", label_logits, {B, L + 1});
  const cnnrnn::SearchOptions options{
      .beam_size = static_cast<int>(beam_size),
      .max_labels = max_labels,
      .min_labels = min_labels,
      .order = parse<cnnrnn::Order>("order", order,
                                    {{"increasing", cnnrnn::Order::kIncreasing},
                                     {"unique", cnnrnn::Order::kUnique},
                                     {"free", cnnrnn::Order::kFree}}),
      .end_takes_slot = end_takes_slot,
      .stop = parse<cnnrnn::Stop>(
          "stop", stop, {{"n_best", cnnrnn::Stop::kNBest}, {"literal", cnnrnn::Stop::kLiteral}}),
  };
  Outputs out{at::empty({B, N, T}, at::kLong),
              at::empty({B, N}, at::kLong),
              at::empty({B, N}, at::kFloat),
              {},
              {},
              {}};
  if (marginals) out.marginals = at::empty({B, L}, at::kFloat);
  if (trace) out.trace = at::empty({B, T + 1, N, 2}, at::kInt);
  out.stats = cnnrnn::beam_search_cpu(
      head, options, {B, joint_.const_data_ptr<float>(), data_or_null(label_logits_)},
      {out.labels.data_ptr<int64_t>(), out.lengths.data_ptr<int64_t>(),
       out.log_probs.data_ptr<float>(), out.marginals ? out.marginals->data_ptr<float>() : nullptr,
       out.trace ? out.trace->data_ptr<int32_t>() : nullptr},
      parallel_for);
  return out;
}

// The heads of the op's callers. An op takes tensors and keeps nothing, so its packed weights and
// prefix states are found by what the tensors are: their storages, which are held weakly so that
// another tensor cannot take their place unseen, and torch's counts of in-place edits.
class HeadRegistry {
 public:
  std::shared_ptr<CpuHead> find_or_make(const Parameters& parameters, std::string_view cell,
                                        std::string_view activation, int64_t cache_generation,
                                        int64_t prefix_bytes) {
    const optional<Key> key = key_of(parameters, cell, activation, cache_generation, prefix_bytes);
    const std::lock_guard lock(mutex_);
    if (key) {
      for (auto at = heads_.begin(); at != heads_.end(); ++at) {
        if (!same(at->key, *key)) continue;
        heads_.splice(heads_.begin(), heads_, at);
        return at->head;
      }
    }
    heads_.remove_if([](const Entry& entry) { return is_gone(entry.key); });
    auto head = make_head(parameters, cell, activation, prefix_bytes, "auto");
    if (key) {
      heads_.push_front({*key, head});
      if (heads_.size() > kMostHeads) heads_.pop_back();
    }
    return head;
  }

 private:
  static constexpr size_t kMostHeads = 4;

  struct TensorKey {
    c10::weak_intrusive_ptr<c10::StorageImpl> storage;
    const void* data;
    uint32_t version;
    std::vector<int64_t> sizes, strides;
  };
  struct Key {
    std::vector<optional<TensorKey>> tensors;
    std::string cell, activation;
    int64_t cache_generation, prefix_bytes;
  };
  struct Entry {
    Key key;
    std::shared_ptr<CpuHead> head;
  };

  static optional<Key> key_of(const Parameters& p, std::string_view cell,
                              std::string_view activation, int64_t cache_generation,
                              int64_t prefix_bytes) {
    Key key{{}, std::string(cell), std::string(activation), cache_generation, prefix_bytes};
    for (const optional<Tensor>& tensor :
         {optional<Tensor>(p.label_embedding), p.score_bias, optional<Tensor>(p.input_weight),
          optional<Tensor>(p.hidden_weight), p.input_bias, p.hidden_bias,
          optional<Tensor>(p.output_projection)}) {
      if (!tensor) {
        key.tensors.emplace_back();
        continue;
      }
      if (tensor->is_inference()) return std::nullopt;  // its edits are not counted
      key.tensors.push_back(TensorKey{tensor->storage().getWeakStorageImpl(), tensor->data_ptr(),
                                      static_cast<uint32_t>(tensor->_version()),
                                      tensor->sizes().vec(), tensor->strides().vec()});
    }
    return key;
  }

  // Whether a tensor that it was made of is no more.
  static bool is_gone(const Key& key) {
    return std::any_of(key.tensors.begin(), key.tensors.end(),
                       [](const auto& tensor) { return tensor && tensor->storage.expired(); });
  }

  static bool same(const Key& a, const Key& b) {
    for (size_t i = 0; i < a.tensors.size(); ++i) {
      const auto &s = a.tensors[i], &t = b.tensors[i];
      if (s.has_value() != t.has_value()) return false;
      if (s && !(s->storage == t->storage && s->data == t->data && s->version == t->version &&
                 s->sizes == t->sizes && s->strides == t->strides)) {
        return false;
      }
    }
    return a.cell == b.cell && a.activation == b.activation &&
           a.cache_generation == b.cache_generation && a.prefix_bytes == b.prefix_bytes;
  }

  std::mutex mutex_;
  std::list<Entry> heads_;  // the one used last comes first
};

// Not destroyed: a thread may be searching while the process ends.
HeadRegistry* registry = new HeadRegistry;

void after_fork_in_child() {
  forked = true;
  registry = new HeadRegistry;  // another thread may have held the old one's lock
}

std::tuple<Tensor, Tensor, Tensor, Tensor> beam_search_op(
    const Tensor& joint, const optional<Tensor>& label_logits, const Tensor& label_embedding,
    const optional<Tensor>& score_bias, const Tensor& input_weight, const Tensor& hidden_weight,
    const optional<Tensor>& input_bias, const optional<Tensor>& hidden_bias,
    const Tensor& output_projection, c10::string_view cell, c10::string_view activation,
    int64_t beam_size, int64_t max_labels, int64_t min_labels, c10::string_view order,
    bool end_takes_slot, c10::string_view stop, bool marginals, int64_t cache_generation,
    int64_t prefix_bytes) {
  const std::shared_ptr<CpuHead> head =
      registry->find_or_make({label_embedding, score_bias, input_weight, hidden_weight, input_bias,
                              hidden_bias, output_projection},
                             cell, activation, cache_generation, prefix_bytes);
  Outputs out = search(head.get(), joint, label_logits, beam_size, max_labels, min_labels, order,
                       end_takes_slot, stop, marginals, false);
  return {out.labels, out.lengths, out.log_probs,
          out.marginals ? *out.marginals : at::empty({joint.size(0), 0}, at::kFloat)};
}

// Shapes alone, for fake tensors: torch.compile, torch.export.
std::tuple<Tensor, Tensor, Tensor, Tensor> beam_search_meta(
    const Tensor& joint, const optional<Tensor>&, const Tensor& label_embedding,
    const optional<Tensor>&, const Tensor&, const Tensor&, const optional<Tensor>&,
    const optional<Tensor>&, const Tensor&, c10::string_view, c10::string_view, int64_t beam_size,
    int64_t max_labels, int64_t, c10::string_view, bool, c10::string_view, bool marginals, int64_t,
    int64_t) {
  const c10::SymInt B = joint.sym_size(0);
  const c10::SymInt L = label_embedding.sym_size(0) - 2;
  return {at::empty_symint({B, beam_size, max_labels}, joint.options().dtype(at::kLong)),
          at::empty_symint({B, beam_size}, joint.options().dtype(at::kLong)),
          at::empty_symint({B, beam_size}, joint.options()),
          at::empty_symint({B, marginals ? L : c10::SymInt(0)}, joint.options())};
}

}  // namespace

TORCH_LIBRARY(cnnrnn, m) {
  m.def(
      "beam_search(Tensor joint, Tensor? label_logits, Tensor label_embedding, "
      "Tensor? score_bias, Tensor input_weight, Tensor hidden_weight, Tensor? input_bias, "
      "Tensor? hidden_bias, Tensor output_projection, str cell, str activation, int beam_size, "
      "int max_labels, int min_labels, str order, bool end_takes_slot, str stop, bool marginals, "
      "int cache_generation=0, int prefix_bytes=536870912) "
      "-> (Tensor labels, Tensor lengths, Tensor log_probs, Tensor marginals)",
      {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(cnnrnn, CPU, m) { m.impl("beam_search", &beam_search_op); }
TORCH_LIBRARY_IMPL(cnnrnn, Meta, m) { m.impl("beam_search", &beam_search_meta); }

PYBIND11_MODULE(_C, m) {
  namespace py = pybind11;
  m.doc() = "The compiled beam search of cnnrnn.";
  m.attr("MAX_BEAM_SIZE") = cnnrnn::kMaxBeamSize;
#if !defined(_WIN32)
  pthread_atfork(nullptr, nullptr, after_fork_in_child);
#endif
  py::class_<CpuHead, std::shared_ptr<CpuHead>>(
      m, "CpuHead", "A head's weights packed for the CPU search, and its kept prefix states.")
      .def(py::init([](const Tensor& label_embedding, const optional<Tensor>& score_bias,
                       const Tensor& input_weight, const Tensor& hidden_weight,
                       const optional<Tensor>& input_bias, const optional<Tensor>& hidden_bias,
                       const Tensor& output_projection, const std::string& cell,
                       const std::string& activation, int64_t prefix_bytes,
                       const std::string& instruction_set) {
             return make_head({label_embedding, score_bias, input_weight, hidden_weight, input_bias,
                               hidden_bias, output_projection},
                              cell, activation, prefix_bytes, instruction_set);
           }),
           py::arg("label_embedding"), py::arg("score_bias"), py::arg("input_weight"),
           py::arg("hidden_weight"), py::arg("input_bias"), py::arg("hidden_bias"),
           py::arg("output_projection"), py::kw_only(), py::arg("cell"), py::arg("activation"),
           py::arg("prefix_bytes") = int64_t{512} << 20, py::arg("instruction_set") = "auto",
           py::call_guard<py::gil_scoped_release>())
      .def(
          "beam_search",
          [](CpuHead& head, const Tensor& joint, const optional<Tensor>& label_logits,
             int64_t beam_size, int64_t max_labels, int64_t min_labels, const std::string& order,
             bool end_takes_slot, const std::string& stop, bool marginals, bool trace) {
            Outputs out;
            {
              const py::gil_scoped_release release;
              out = search(&head, joint, label_logits, beam_size, max_labels, min_labels, order,
                           end_takes_slot, stop, marginals, trace);
            }
            const cnnrnn::SearchStats& s = out.stats;
            return py::make_tuple(out.labels, out.lengths, out.log_probs, out.marginals, out.trace,
                                  py::make_tuple(s.prefix_lookups, s.prefix_hits, s.prefix_nodes,
                                                 s.prefix_parents, s.prefix_bytes),
                                  s.nonfinite_images);
          },
          py::arg("joint"), py::arg("label_logits"), py::arg("beam_size"), py::arg("max_labels"),
          py::arg("min_labels"), py::arg("order"), py::arg("end_takes_slot"), py::arg("stop"),
          py::arg("marginals"), py::arg("trace") = false,
          "Search B images; returns labels, lengths, log_probs, marginals or None, every step's "
          "decisions or None, the figures of SearchStats, and how many images were marked.");
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
