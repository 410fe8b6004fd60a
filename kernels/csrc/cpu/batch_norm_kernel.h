// Training-mode BatchNorm on the CPU, with the addition and the ReLU that may follow it. Does not depend on torch.
//
// x is (rows, channels) with contiguous channels: a channels_last tensor (n, c, h, w). T is the type of elements in
// memory, A the type of computations. Loops are vectorized along the channels. Callers pass chunks of rows that fit the
// cache.
#pragma once

#include <cstdint>

#include "cpu/vectorize.h"

namespace mcl::cpu {

// The affine map that normalises the rows of one group; one entry per channel.
template <typename A>
struct Affine {
  const A *mean, *scale, *shift;
};

// Backward repeats this expression of forward to find the elements that ReLU set to zero, bit for bit.
template <typename A>
inline A affine(A x, A mean, A scale, A shift) {
  return (x - mean) * scale + shift;
}

// Per channel: the mean, and the sum of squared distances from it.
template <typename T, typename A>
MCL_VECTORIZE void moments(const T* __restrict__ x, int64_t rows, int64_t channels, A* __restrict__ mean,
                           A* __restrict__ squares) {
  for (int64_t c = 0; c < channels; ++c) mean[c] = squares[c] = A(0);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < channels; ++c) mean[c] += static_cast<A>(x[r * channels + c]);
  for (int64_t c = 0; c < channels; ++c) mean[c] /= static_cast<A>(rows);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < channels; ++c) {
      const A distance = static_cast<A>(x[r * channels + c]) - mean[c];
      squares[c] += distance * distance;
    }
}

// y = relu(affine(x) + residual); addition and ReLU are optional.
template <bool kResidual, bool kRelu, typename T, typename A>
MCL_VECTORIZE void normalize(const T* __restrict__ x, const T* __restrict__ residual, int64_t rows, int64_t channels,
                             const Affine<A>& by, T* __restrict__ y) {
  const A* __restrict__ mean = by.mean, * __restrict__ scale = by.scale, * __restrict__ shift = by.shift;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t i = r * channels + c;
      A value = affine(static_cast<A>(x[i]), mean[c], scale[c], shift[c]);
      if constexpr (kResidual) value += static_cast<A>(residual[i]);
      if constexpr (kRelu) value = value < A(0) ? A(0) : value;  // keeps NaN
      y[i] = static_cast<T>(value);
    }
}

// The gradient of ReLU's input. With a residual, ReLU's output y tells which elements are zero; without, they are
// computed from x again.
template <bool kResidual, bool kRelu, typename T, typename A>
inline A through(A grad, A x, const T* y, A mean, A scale, A shift) {
  if constexpr (!kRelu) return grad;
  if constexpr (kResidual) return static_cast<A>(*y) <= A(0) ? A(0) : grad;
  return affine(x, mean, scale, shift) <= A(0) ? A(0) : grad;
}

// Per channel: the sums of g and of g * (x - mean), g being the gradient of ReLU's input. g is also the gradient of the
// residual.
template <bool kResidual, bool kRelu, typename T, typename A>
MCL_VECTORIZE void gradient_sums(const T* __restrict__ grad, const T* __restrict__ x, const T* __restrict__ y,
                                 int64_t rows, int64_t channels, const Affine<A>& by, A* __restrict__ sum,
                                 A* __restrict__ weighted, T* __restrict__ of_residual) {
  const A* __restrict__ mean = by.mean, * __restrict__ scale = by.scale, * __restrict__ shift = by.shift;
  for (int64_t c = 0; c < channels; ++c) sum[c] = weighted[c] = A(0);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t i = r * channels + c;
      const A value = static_cast<A>(x[i]);
      const A g = through<kResidual, kRelu>(static_cast<A>(grad[i]), value, y + i, mean[c], scale[c], shift[c]);
      if constexpr (kResidual) of_residual[i] = static_cast<T>(g);
      sum[c] += g;
      weighted[c] += g * (value - mean[c]);
    }
}

// of_x = scale * g + slope * (x - mean) + offset, g being the gradient of ReLU's input. With a residual, pass the
// residual's gradient, which gradient_sums wrote, as `grad`, and no ReLU.
template <bool kRelu, typename T, typename A>
MCL_VECTORIZE void gradient(const T* __restrict__ grad, const T* __restrict__ x, int64_t rows, int64_t channels,
                            const Affine<A>& by, const A* __restrict__ slope, const A* __restrict__ offset,
                            T* __restrict__ of_x) {
  const A* __restrict__ mean = by.mean, * __restrict__ scale = by.scale, * __restrict__ shift = by.shift;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t i = r * channels + c;
      const A value = static_cast<A>(x[i]);
      const A g = through<false, kRelu, T>(static_cast<A>(grad[i]), value, nullptr, mean[c], scale[c], shift[c]);
      of_x[i] = static_cast<T>(scale[c] * g + (slope[c] * (value - mean[c]) + offset[c]));
    }
}

}  // namespace mcl::cpu
