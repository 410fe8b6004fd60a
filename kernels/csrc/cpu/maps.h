// Maps (n, c, h, w), or rows (n, c), whose channels lie next to each other: what they are stored and computed in.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <vector>

#include "cpu/bfloat16.h"

namespace mcl::cpu {

inline torch::headeronly::ScalarType accumulation(const torch::stable::Tensor& x) {
  using torch::headeronly::ScalarType;
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_channels_last(const char* op, const char* name, const torch::stable::Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu() && (t.dim() == 2 || t.dim() == 4), op, ": ", name,
                  " must be (n, c) or (n, c, h, w) on a CPU");
  // Channels next to each other, then columns, rows, maps; strides of sizes of 1 do not matter.
  int64_t expected = 1;
  for (const int64_t d : t.dim() == 4 ? std::vector<int64_t>{1, 3, 2, 0} : std::vector<int64_t>{1, 0}) {
    STD_TORCH_CHECK(t.size(d) == 1 || t.stride(d) == expected, op, ": ", name, " must be channels_last");
    expected *= t.size(d);
  }
}

// Calls f(of the type of the elements, of the type of arithmetic).
template <typename F>
void dispatch_types(const char* op, const torch::stable::Tensor& x, const F& f) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return f(double{}, double{});
    case ScalarType::Float:
      return f(float{}, float{});
    case ScalarType::BFloat16:
      return f(BFloat16{}, float{});
    default:
      STD_TORCH_CHECK(false, op, ": x must be float32, float64 or bfloat16");
  }
}

}  // namespace mcl::cpu
