// In torch's place for tests/native: as much of its stable Tensor as csrc/ops uses, on guarded memory.
#pragma once
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#include "guarded.h"

namespace torch::headeronly {
enum class ScalarType { Int, Float, Double };
}

namespace torch::stable {

using headeronly::ScalarType;

template <class T>
constexpr ScalarType type_of() {
  return std::is_same_v<T, float>    ? ScalarType::Float
         : std::is_same_v<T, double> ? ScalarType::Double
                                     : ScalarType::Int;
}

class Tensor {
 public:
  template <class T>
  static Tensor make(std::vector<int64_t> sizes, T* /* its element type */) {
    Tensor t;
    t.sizes_ = std::move(sizes);
    auto memory = std::make_shared<checks::Guarded<T>>(t.numel());
    t.data_ = memory->data();
    t.check_ = [memory](const char* name) { memory->check(name); };
    t.type_ = type_of<T>();
    return t;
  }
  int64_t dim() const { return static_cast<int64_t>(sizes_.size()); }
  int64_t size(int64_t i) const { return sizes_[i]; }
  int64_t stride(int64_t i) const {
    int64_t n = 1;
    while (++i < dim()) n *= sizes_[i];
    return n;
  }
  int64_t numel() const {
    int64_t n = 1;
    for (const int64_t size : sizes_) n *= size;
    return n;
  }
  bool is_contiguous() const { return true; }
  ScalarType scalar_type() const { return type_; }
  const void* const_data_ptr() const { return data_; }
  void* mutable_data_ptr() { return data_; }
  // Fails if something was written before the first element.
  void check(const char* name) const { check_(name); }

 private:
  std::vector<int64_t> sizes_;
  ScalarType type_;
  void* data_;
  std::function<void(const char*)> check_;
};

}  // namespace torch::stable
