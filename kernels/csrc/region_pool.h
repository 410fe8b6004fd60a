// Checks and bookkeeping of region_pool that do not depend on the device.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>
#include <vector>

#include "access.h"
#include "region_sampling.h"

namespace mcl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The type of computations: float64 for float64, float32 for all other types.
template <typename T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Arguments of forward and backward, in the form that kernels read.
struct Boxes {
  Tensor boxes;  // (R, 5) contiguous, in the dtype of the accumulation
  Tensor index;  // (R,) int64 contiguous
  int64_t number;
};

// These raise an error that names the argument if shapes, dtypes or devices do not fit.
Boxes check_boxes(const Tensor& boxes, const Tensor& index, const Tensor& on, ScalarType dtype);
void check_features(const std::vector<Tensor>& features, const std::vector<double>& strides);
void check_pooling(int64_t output_size, int64_t sampling_ratio);

// Whether the channels of every map are contiguous. If so, results are channels_last, too.
bool channels_last(const std::vector<Tensor>& features);

// An uninitialised tensor (rows, channels, height, width).
Tensor empty_maps(const Tensor& like, int64_t rows, int64_t channels, int64_t height, int64_t width,
                  bool channels_last);

// Uninitialised gradients of all maps. `sizes`: rows, channels, height, width of one map after another.
std::vector<Tensor> empty_gradients(const Tensor& grad, const std::vector<int64_t>& sizes,
                                    const std::vector<double>& strides, bool channels_last);

inline PooledStrides pooled_strides(const Tensor& pooled) {
  return {pooled.stride(0), pooled.stride(1), pooled.stride(2), pooled.stride(3)};
}

// T is a const type for maps that are only read.
template <typename T>
Maps<T> make_maps(const std::vector<Tensor>& features, const std::vector<double>& strides) {
  Maps<T> maps{};
  maps.count = static_cast<int>(features.size());
  int canvases = 0;
  for (int m = 0; m < maps.count; ++m) {
    const Tensor& f = features[m];
    maps.map[m] = {elements<T>(f),
                   f.stride(0),
                   f.stride(1),
                   f.stride(2),
                   f.stride(3),
                   static_cast<int>(f.size(0)),
                   static_cast<int>(f.size(2)),
                   static_cast<int>(f.size(3)),
                   1.0 / strides[m],
                   canvases};
    canvases += maps.map[m].rows;
  }
  return maps;
}

// Calls f with a value of the dtype's C++ type.
template <typename F>
void dispatch(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Half:
      return f(torch::headeronly::Half{});
    case ScalarType::BFloat16:
      return f(torch::headeronly::BFloat16{});
    default:
      STD_TORCH_CHECK(false, "region_pool: features must be float64, float32, float16 or bfloat16");
  }
}

}  // namespace mcl
