// Checks and bookkeeping of batch_norm that do not depend on the device.
//
// Statistics are a tensor (groups, 2 C + 1): C means, C second values, and the number of rows. The second value of a
// channel is the sum of squared distances from the mean in the result of batch_norm_stats (1, groups, 2 C + 1), which
// can be combined over processes, and 1 / standard deviation in the result of batch_norm_combine.
// batch_norm_stats_alone does both steps for a single process.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <optional>
#include <tuple>
#include <vector>

#include "access.h"
#include "batch_norm_math.h"

namespace mcl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Counts = std::vector<int64_t>;

// A channels_last tensor as rows (n, C) with contiguous channels, divided into groups.
struct Rows {
  int64_t channels;
  std::vector<int64_t> first;  // first row of each group, then the number of rows

  // counts: size of each group along the first dimension of x.
  Rows(const Tensor& x, const Counts& counts);
  int64_t groups() const { return static_cast<int64_t>(first.size()) - 1; }
  int64_t statistics() const { return 2 * channels + 1; }  // values per group
};

// Raises an error that names the tensor unless it has the shape, dtype, device and layout of x.
void check_like(const Tensor& t, const Tensor& x, const char* name);

// Raises an error that names the tensor unless it is contiguous, has `size` elements, lies on the device of x and has
// the dtype that x is computed in.
void check_small(const std::optional<Tensor>& t, const Tensor& x, int64_t size, const char* name);

// Checks the arguments of forward and backward other than maps.
void check_apply(const Rows& all, const Tensor& x, const std::optional<Tensor>& weight,
                 const std::optional<Tensor>& bias, const Tensor& statistics);

// Checks the arguments of batch_norm_combine; `parts` must be (processes, groups, 2 C + 1).
void check_combine(const Tensor& parts, const std::optional<double>& momentum,
                   const std::optional<Tensor>& running_mean, const std::optional<Tensor>& running_var,
                   const std::optional<Tensor>& batches);

// The tensors must have passed check_combine.
template <typename A>
Running<A> make_running(const std::optional<Tensor>& mean, const std::optional<Tensor>& var,
                        const std::optional<Tensor>& batches, std::optional<double> momentum) {
  return {write<A>(mean), write<A>(var), write<int64_t>(batches), momentum.value_or(-1)};
}

// An uninitialised tensor on the device of x, of the dtype that x is computed in.
Tensor empty_small(const Tensor& x, std::vector<int64_t> size);

// Calls f(stored, computed) with values of the type of x's elements and of the type that they are computed in.
template <typename F>
void dispatch_types(const Tensor& x, F&& f) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return f(double{}, double{});
    case ScalarType::Float:
      return f(float{}, float{});
    case ScalarType::Half:
      return f(torch::headeronly::Half{}, float{});
    case ScalarType::BFloat16:
      return f(torch::headeronly::BFloat16{}, float{});
    default:
      STD_TORCH_CHECK(false, "batch_norm: x must be float64, float32, float16 or bfloat16");
  }
}

// Calls f(residual, relu) with both conditions as compile-time constants.
template <typename F>
void dispatch_conditions(bool residual, bool relu, F&& f) {
  using True = std::true_type;
  using False = std::false_type;
  if (residual) return relu ? f(True{}, True{}) : f(True{}, False{});
  return relu ? f(False{}, True{}) : f(False{}, False{});
}

}  // namespace mcl
