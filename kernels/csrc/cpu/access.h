// Pointers to the elements of a tensor.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace mcl::cpu {

template <typename T>
const T* read(const torch::stable::Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <typename T>
T* write(const torch::stable::Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

}  // namespace mcl::cpu
