// LARS and norms on the CPU. Does not depend on torch.
#pragma once

#include <cstdint>

#include "cpu/vectorize.h"

namespace mcl::cpu {

// Sum of squares in double: eight interleaved sums, which vectorize in a fixed order of additions.
template <typename T>
MCL_VECTORIZE double sum_of_squares(const T* x, int64_t n) {
  constexpr int kLanes = 8;
  double lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lane[l] += static_cast<double>(x[i + l]) * static_cast<double>(x[i + l]);
  double sum = 0;
  for (; i < n; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  for (int l = 0; l < kLanes; ++l) sum += lane[l];
  return sum;
}

// trust_coefficient * |w| / (|g| + weight_decay * |w|); 0 if the denominator is 0.
template <typename T>
T trust_ratio(T weight_norm, T grad_norm, T weight_decay, T trust_coefficient) {
  const T scale = grad_norm + weight_decay * weight_norm;
  return scale > T(0) ? trust_coefficient * weight_norm / scale : T(0);
}

// buffer = momentum * buffer + rate * (g + weight_decay * w); w = w - buffer.
template <typename T>
MCL_VECTORIZE void lars_update(T* __restrict__ w, const T* __restrict__ g, T* __restrict__ buffer, int64_t n, T rate,
                               T momentum, T weight_decay) {
  for (int64_t i = 0; i < n; ++i) {
    buffer[i] = momentum * buffer[i] + rate * (g[i] + weight_decay * w[i]);
    w[i] -= buffer[i];
  }
}

}  // namespace mcl::cpu
