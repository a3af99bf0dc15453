// Python module cnnrnn._C: checks tensors, hands raw pointers to the kernels. No maths here.

#include <ATen/ATen.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/cpu_kernels.h"
#include "kernels/prefix_table.h"
#include "kernels/search.h"

namespace {

using at::Tensor;
using std::optional;

template <typename Enum>
Enum parse(const char* name, const std::string& value,
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

// See cnnrnn/search/engine.py, the only caller; shapes as in kernels/search.h.
std::tuple<Tensor, Tensor, Tensor, optional<Tensor>, optional<Tensor>, pybind11::dict> beam_search(
    const Tensor& joint,                   // [B, D]
    const optional<Tensor>& label_logits,  // [B, L+1]
    const Tensor& score_weight,            // [D, L+1]
    const optional<Tensor>& score_bias,    // [L+1]
    const Tensor& input_gates,             // [L+1, 4H]
    const Tensor& hidden_weight,           // [H, 4H]
    const Tensor& output_weight,           // [H, D]
    const std::string& cell, const std::string& activation, int64_t beam_size, int64_t max_labels,
    int64_t min_labels, const std::string& order, bool end_takes_slot, const std::string& stop,
    bool marginals, bool trace, cnnrnn::PrefixTable* prefixes, int64_t prefix_bytes,
    const std::string& instruction_set) {
  TORCH_CHECK_VALUE(joint.dim() == 2, "joint must be [B, D], got ", joint.sizes());
  TORCH_CHECK_VALUE(score_weight.dim() == 2 && score_weight.size(1) >= 2,
                    "score_weight must be [D, L+1] with L >= 1, got ", score_weight.sizes());
  TORCH_CHECK_VALUE(output_weight.dim() == 2, "output_weight must be [H, D], got ",
                    output_weight.sizes());
  TORCH_CHECK_VALUE(beam_size >= 1 && beam_size <= cnnrnn::kMaxBeamSize, "beam_size must be in 1..",
                    cnnrnn::kMaxBeamSize, ", got ", beam_size);
  TORCH_CHECK_VALUE(0 <= min_labels && min_labels <= max_labels, "min_labels (", min_labels,
                    ") must be in 0..max_labels (", max_labels, ")");
  const int64_t B = joint.size(0), D = joint.size(1);
  const int64_t L = score_weight.size(1) - 1, H = output_weight.size(0);
  const int64_t N = beam_size, T = max_labels;

  const Tensor joint_ = checked("joint", joint, {B, D});
  const optional<Tensor> label_logits_ = checked("label_logits", label_logits, {B, L + 1});
  const Tensor score_weight_ = checked("score_weight", score_weight, {D, L + 1});
  const optional<Tensor> score_bias_ = checked("score_bias", score_bias, {L + 1});
  const Tensor input_gates_ = checked("input_gates", input_gates, {L + 1, 4 * H});
  const Tensor hidden_weight_ = checked("hidden_weight", hidden_weight, {H, 4 * H});
  const Tensor output_weight_ = checked("output_weight", output_weight, {H, D});

  const cnnrnn::HeadTables head{
      .num_labels = L,
      .joint_dim = D,
      .hidden_dim = H,
      .cell = parse<cnnrnn::Cell>("cell", cell,
                                  {{"lstm", cnnrnn::Cell::kLstm}, {"paper", cnnrnn::Cell::kPaper}}),
      .activation = parse<cnnrnn::Activation>("activation", activation,
                                              {{"relu", cnnrnn::Activation::kRelu},
                                               {"tanh", cnnrnn::Activation::kTanh},
                                               {"identity", cnnrnn::Activation::kIdentity}}),
      .score_weight = score_weight_.const_data_ptr<float>(),
      .score_bias = data_or_null(score_bias_),
      .input_gates = input_gates_.const_data_ptr<float>(),
      .hidden_weight = hidden_weight_.const_data_ptr<float>(),
      .output_weight = output_weight_.const_data_ptr<float>(),
  };
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
  const Tensor labels = at::empty({B, N, T}, at::kLong);
  const Tensor lengths = at::empty({B, N}, at::kLong);
  const Tensor log_probs = at::empty({B, N}, at::kFloat);
  optional<Tensor> marginals_, trace_;
  if (marginals) marginals_ = at::empty({B, L}, at::kFloat);
  if (trace) trace_ = at::empty({B, T + 1, N, 2}, at::kInt);

  const cnnrnn::CpuKernels* kernels = instruction_set == "auto"
                                          ? &cnnrnn::best_cpu_kernels()
                                          : cnnrnn::find_cpu_kernels(instruction_set.c_str());
  TORCH_CHECK_VALUE(kernels != nullptr, "instruction_set must be auto or one of this build's and ",
                    "this processor's (see instruction_sets()), got '", instruction_set, "'");

  cnnrnn::SearchStats stats;
  {
    pybind11::gil_scoped_release release;
    // A table that another thread is using, or none at all, is replaced by one of this call's own.
    std::unique_lock<std::mutex> held;
    if (prefixes != nullptr) held = std::unique_lock(prefixes->in_use, std::try_to_lock);
    std::optional<cnnrnn::PrefixTable> own;
    if (!held.owns_lock()) prefixes = &own.emplace(prefix_bytes);
    stats = cnnrnn::beam_search_cpu(
        *kernels, head, options, {B, joint_.const_data_ptr<float>(), data_or_null(label_logits_)},
        prefixes,
        {labels.data_ptr<int64_t>(), lengths.data_ptr<int64_t>(), log_probs.data_ptr<float>(),
         marginals_ ? marginals_->data_ptr<float>() : nullptr,
         trace_ ? trace_->data_ptr<int32_t>() : nullptr});
  }
  pybind11::dict stats_dict;
  stats_dict["prefix_lookups"] = stats.prefix_lookups;
  stats_dict["prefix_hits"] = stats.prefix_hits;
  stats_dict["prefix_nodes"] = stats.prefix_nodes;
  stats_dict["prefix_bytes"] = stats.prefix_bytes;
  return {labels, lengths, log_probs, marginals_, trace_, stats_dict};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  namespace py = pybind11;
  m.doc() = "The compiled beam search of cnnrnn.";
  m.attr("MAX_BEAM_SIZE") = cnnrnn::kMaxBeamSize;
  py::class_<cnnrnn::PrefixTable>(m, "PrefixTable",
                                  "Label prefixes and their recurrent states, kept across calls.")
      .def(py::init<int64_t>(), py::arg("byte_budget"));
  m.def("beam_search", &beam_search, py::arg("joint"), py::arg("label_logits"),
        py::arg("score_weight"), py::arg("score_bias"), py::arg("input_gates"),
        py::arg("hidden_weight"), py::arg("output_weight"), py::kw_only(), py::arg("cell"),
        py::arg("activation"), py::arg("beam_size"), py::arg("max_labels"), py::arg("min_labels"),
        py::arg("order"), py::arg("end_takes_slot"), py::arg("stop"), py::arg("marginals"),
        py::arg("trace") = false, py::arg("prefixes") = nullptr,
        py::arg("prefix_bytes") = int64_t{256} << 20, py::arg("instruction_set") = "auto");
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
