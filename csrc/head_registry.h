// Finds the packed head of an op's tensors.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
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
  const at::Tensor& label_embedding;                 // [L+2, D]
  const std::optional<at::Tensor>& input_embedding;  // [L+2, D] none: label_embedding
  const std::optional<at::Tensor>& score_bias;       // [L+1]
  const at::Tensor& input_weight;                    // [4H, D]
  const at::Tensor& hidden_weight;                   // [4H, H]
  const std::optional<at::Tensor>& input_bias;       // [4H]
  const std::optional<at::Tensor>& hidden_bias;      // [4H]
  const at::Tensor& output_projection;               // [D, H]
};

// The heads of the op's callers. An op takes tensors and keeps nothing, so its packed weights and
// prefix states are found by what the tensors are: their storages, which are held weakly so that
// another tensor cannot take their place unseen, and torch's counts of in-place edits.
// `Head` is CpuHead or its like.
template <typename Head>
class HeadRegistry {
 public:
  // `make` returns a std::shared_ptr<Head> of the parameters.
  template <typename Make>
  std::shared_ptr<Head> find_or_make(const Parameters& parameters, std::string_view cell,
                                     std::string_view activation, int64_t cache_generation,
                                     int64_t prefix_bytes, const Make& make) {
    const std::optional<Key> key =
        key_of(parameters, cell, activation, cache_generation, prefix_bytes);
    const std::lock_guard lock(mutex_);
    if (key) {
      for (auto at = heads_.begin(); at != heads_.end(); ++at) {
        if (!same(at->key, *key)) continue;
        heads_.splice(heads_.begin(), heads_, at);
        return at->head;
      }
    }
    heads_.remove_if([](const Entry& entry) { return is_gone(entry.key); });
    std::shared_ptr<Head> head = make();
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
    std::vector<std::optional<TensorKey>> tensors;
    std::string cell, activation;
    int64_t cache_generation, prefix_bytes;
  };
  struct Entry {
    Key key;
    std::shared_ptr<Head> head;
  };

  static std::optional<Key> key_of(const Parameters& p, std::string_view cell,
                                   std::string_view activation, int64_t cache_generation,
                                   int64_t prefix_bytes) {
    Key key{{}, std::string(cell), std::string(activation), cache_generation, prefix_bytes};
    for (const std::optional<at::Tensor>& tensor :
         {std::optional<at::Tensor>(p.label_embedding), p.input_embedding, p.score_bias,
          std::optional<at::Tensor>(p.input_weight), std::optional<at::Tensor>(p.hidden_weight),
          p.input_bias, p.hidden_bias, std::optional<at::Tensor>(p.output_projection)}) {
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

}  // namespace cnnrnn
