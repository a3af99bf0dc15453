// Keeps packed heads, found by the weights they were made of.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <iterator>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace cnnrnn {

// A head's parameters, shapes as in kernels/search.h.
struct Parameters {
  at::Tensor label_embedding;                 // [L+2, D]
  std::optional<at::Tensor> input_embedding;  // [L+2, D] none: label_embedding
  std::optional<at::Tensor> score_bias;       // [L+1]
  at::Tensor input_weight;                    // [4H, D]
  at::Tensor hidden_weight;                   // [4H, H]
  std::optional<at::Tensor> input_bias;       // [4H]
  std::optional<at::Tensor> hidden_bias;      // [4H]
  at::Tensor output_projection;               // [D, H]
};

// Whose packed heads are kept: a Python Head's, known by its id, or those of the op's callers.
constexpr int64_t kOpCallers = 0;

// What a packed head is made of, and for whom.
struct HeadSource {
  Parameters parameters;
  std::string_view cell, activation;
  int64_t cache_generation, prefix_bytes;
  at::Device device;  // that searches; the parameters may lie on another
  int64_t owner;
};

// Weights are known by their storages, which are held weakly so that other weights cannot take
// their place unseen, and by torch's counts of in-place edits. A Head keeps what was packed of it
// last for each device, until `forget`; the op takes tensors and has nobody who would forget, so
// that the heads its callers used last stay. `Packed` is CpuHead or its like.
template <typename Packed>
class HeadRegistry {
 public:
  // Returns null where nothing was packed of these weights as they are. Waits for no packing.
  std::shared_ptr<Packed> find(const HeadSource& source) {
    const std::lock_guard lock(mutex_);
    for (auto at = heads_.begin(); at != heads_.end(); ++at) {
      if (!is_of(*at, source)) continue;
      heads_.splice(heads_.begin(), heads_, at);
      return at->packed;
    }
    return nullptr;
  }

  // `make(source)` returns a std::shared_ptr<Packed>.
  template <typename Make>
  std::shared_ptr<Packed> find_or_make(const HeadSource& source, const Make& make) {
    if (auto packed = find(source)) return packed;
    const std::lock_guard packing(packing_);  // others want the same head, or memory for theirs
    if (auto packed = find(source)) return packed;
    drop_if([&](const Kept& kept) {  // before another takes as much memory
      return is_gone(kept) || (source.owner != kOpCallers && kept.owner == source.owner &&
                               kept.device == source.device);
    });
    // The key first: another thread may edit a weight while the head is packed.
    std::optional<Kept> kept = kept_of(source);
    std::shared_ptr<Packed> packed = make(source);
    if (kept) {
      kept->packed = packed;
      keep(std::move(*kept));
    }
    return packed;
  }

  // Returns how many heads are dropped.
  size_t forget(int64_t owner) {
    return drop_if([owner](const Kept& kept) { return kept.owner == owner; });
  }

 private:
  static constexpr ptrdiff_t kMostOfOpCallers = 4;
  static constexpr size_t kTensors = 8;

  struct TensorKey {
    c10::weak_intrusive_ptr<c10::StorageImpl> storage;
    const void* data;
    int64_t version;
    at::ScalarType type;
    bool is_negated;
    std::vector<int64_t> sizes, strides;
  };
  struct Kept {
    std::array<std::optional<TensorKey>, kTensors> weights;
    std::string cell, activation;
    int64_t cache_generation, prefix_bytes;
    at::Device device;
    int64_t owner;
    std::shared_ptr<Packed> packed;
  };

  static std::array<const at::Tensor*, kTensors> tensors_of(const Parameters& p) {
    const auto given = [](const std::optional<at::Tensor>& tensor) {
      return tensor ? &*tensor : nullptr;
    };
    return {&p.label_embedding,   given(p.input_embedding), given(p.score_bias),
            &p.input_weight,      &p.hidden_weight,         given(p.input_bias),
            given(p.hidden_bias), &p.output_projection};
  }

  // None where edits of a tensor are not counted.
  static std::optional<Kept> kept_of(const HeadSource& source) {
    Kept kept{{},
              std::string(source.cell),
              std::string(source.activation),
              source.cache_generation,
              source.prefix_bytes,
              source.device,
              source.owner,
              nullptr};
    const auto tensors = tensors_of(source.parameters);
    for (size_t i = 0; i < kTensors; ++i) {
      if (tensors[i] == nullptr) continue;
      const at::Tensor& tensor = *tensors[i];
      if (tensor.is_inference()) return std::nullopt;
      kept.weights[i] = TensorKey{tensor.storage().getWeakStorageImpl(),
                                  tensor.data_ptr(),
                                  tensor._version(),
                                  tensor.scalar_type(),
                                  tensor.is_neg(),
                                  tensor.sizes().vec(),
                                  tensor.strides().vec()};
    }
    return kept;
  }

  static bool is_of(const Kept& kept, const HeadSource& source) {
    if (kept.owner != source.owner || kept.device != source.device ||
        kept.cache_generation != source.cache_generation ||
        kept.prefix_bytes != source.prefix_bytes || kept.cell != source.cell ||
        kept.activation != source.activation) {
      return false;
    }
    const auto tensors = tensors_of(source.parameters);
    for (size_t i = 0; i < kTensors; ++i) {
      const std::optional<TensorKey>& key = kept.weights[i];
      if (key.has_value() != (tensors[i] != nullptr)) return false;
      if (key && !is_of(*key, *tensors[i])) return false;
    }
    return true;
  }

  static bool is_of(const TensorKey& key, const at::Tensor& tensor) {
    return !tensor.is_inference() &&
           key.storage._unsafe_get_target() == tensor.storage().unsafeGetStorageImpl() &&
           key.data == tensor.data_ptr() && key.version == tensor._version() &&
           key.type == tensor.scalar_type() && key.is_negated == tensor.is_neg() &&
           key.sizes == tensor.sizes() && key.strides == tensor.strides();
  }

  // Whether a tensor that it was made of is no more.
  static bool is_gone(const Kept& kept) {
    return std::any_of(kept.weights.begin(), kept.weights.end(),
                       [](const auto& key) { return key && key->storage.expired(); });
  }

  template <typename Condition>
  size_t drop_if(const Condition& condition) {
    std::list<Kept> dropped;  // freed after the lock
    const std::lock_guard lock(mutex_);
    for (auto at = heads_.begin(); at != heads_.end();) {
      const auto next = std::next(at);
      if (condition(*at)) dropped.splice(dropped.end(), heads_, at);
      at = next;
    }
    return dropped.size();
  }

  void keep(Kept&& kept) {
    std::list<Kept> dropped;  // freed after the lock
    const std::lock_guard lock(mutex_);
    heads_.push_front(std::move(kept));
    const auto is_of_op = [](const Kept& kept) { return kept.owner == kOpCallers; };
    if (std::count_if(heads_.begin(), heads_.end(), is_of_op) <= kMostOfOpCallers) return;
    const auto oldest = std::find_if(heads_.rbegin(), heads_.rend(), is_of_op);
    dropped.splice(dropped.end(), heads_, std::prev(oldest.base()));
  }

  std::mutex packing_, mutex_;  // in this order; mutex_, of heads_, is held for a moment
  std::list<Kept> heads_;       // the one used last comes first
};

}  // namespace cnnrnn
