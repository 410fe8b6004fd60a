// Lists of tensors that are updated element by element, in the order of memory.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <vector>

namespace mcl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using TensorList = std::vector<Tensor>;

// Raises an error unless the lists are equally long, all tensors share one device and one dtype (float32 or float64),
// no tensor has gaps in memory, and the t-th tensors of all lists agree in sizes and in the order of their elements in
// memory.
void check_lists(const char* name, std::initializer_list<const TensorList*> lists);

// The address of `found_inf`, or null without it. Operators leave their tensors unchanged if its value is not 0. Raises
// an error unless it is one float32 on the tensors' device.
const float* flag_of(const char* name, const std::optional<Tensor>& found_inf, const TensorList& tensors);

// Calls f with a value of the dtype's C++ type.
template <typename F>
void dispatch_float(const TensorList& list, F&& f) {
  if (list[0].scalar_type() == ScalarType::Double) return f(double{});
  f(float{});
}

}  // namespace mcl
