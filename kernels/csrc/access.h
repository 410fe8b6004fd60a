// Pointers to the elements of a tensor; null if it is optional and there is none.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <type_traits>

namespace mcl {

template <typename T>
const T* read(const torch::stable::Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <typename T>
const T* read(const std::optional<torch::stable::Tensor>& t) {
  return t ? read<T>(*t) : nullptr;
}

template <typename T>
T* write(const torch::stable::Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}
template <typename T>
T* write(const std::optional<torch::stable::Tensor>& t) {
  return t ? write<T>(*t) : nullptr;
}

// T is a const type for elements that are only read.
template <typename T>
T* elements(const torch::stable::Tensor& t) {
  if constexpr (std::is_const_v<T>)
    return read<T>(t);
  else
    return write<T>(t);
}

}  // namespace mcl
