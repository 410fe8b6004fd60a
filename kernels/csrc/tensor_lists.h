// Lists of tensors that are updated element by element, as they lie in memory.
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

// Raises unless the lists are equally long, all tensors share one device and one dtype (float32 or float64), none has
// gaps, and the t-th of each list has the same sizes and the same order of elements in memory.
void check_lists(const char* name, std::initializer_list<const TensorList*> lists);

// The address of `found_inf`, a float of which anything but 0 leaves the tensors as they are; null where none is given.
// Raises unless it is one float32 on the tensors' device.
const float* flag_of(const char* name, const std::optional<Tensor>& found_inf, const TensorList& tensors);

// Calls f with a value of the dtype's C++ type.
template <typename F>
void dispatch_float(const TensorList& list, F&& f) {
  if (list[0].scalar_type() == ScalarType::Double) return f(double{});
  f(float{});
}

}  // namespace mcl
