// Training-mode BatchNorm on the CPU, with what follows it in a residual network; free of torch.
//
// x is (rows, channels), channels next to each other: what channels_last makes of (n, c, h, w). T is what memory holds,
// A what is computed in. Arithmetic runs along the channels; a chunk of rows is taken while it lies in the cache.
#pragma once

#include <cstdint>

#include "cpu/vectorize.h"

namespace mcl::cpu {

// What normalises the rows of one group; per channel.
template <typename A>
struct Affine {
  const A *mean, *scale, *shift;
};

// The one expression of forward's output, which backward repeats to know what ReLU let through.
template <typename A>
inline A affine(A x, A mean, A scale, A shift) {
  return (x - mean) * scale + shift;
}

// Mean and sum of squared distances from it, per channel.
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

// y = relu(affine(x) + residual), either part if wanted.
template <bool kResidual, bool kRelu, typename T, typename A>
MCL_VECTORIZE void normalize(const T* __restrict__ x, const T* __restrict__ residual, int64_t rows, int64_t channels,
                             const Affine<A>& by, T* __restrict__ y) {
  const A* __restrict__ mean = by.mean, * __restrict__ scale = by.scale, * __restrict__ shift = by.shift;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t i = r * channels + c;
      A value = affine(static_cast<A>(x[i]), mean[c], scale[c], shift[c]);
      if constexpr (kResidual) value += static_cast<A>(residual[i]);
      if constexpr (kRelu) value = value < A(0) ? A(0) : value;  // NaN stays
      y[i] = static_cast<T>(value);
    }
}

// What ReLU lets through of the gradient of y: judged by y where something was added, by x otherwise.
template <bool kResidual, bool kRelu, typename T, typename A>
inline A through(A grad, A x, const T* y, A mean, A scale, A shift) {
  if constexpr (!kRelu) return grad;
  if constexpr (kResidual) return static_cast<A>(*y) <= A(0) ? A(0) : grad;
  return affine(x, mean, scale, shift) <= A(0) ? A(0) : grad;
}

// Sums per channel of the gradient that ReLU lets through, and of it times (x - mean); it is the residual's own.
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

// scale * grad + slope * (x - mean) + offset, of the gradient that ReLU lets through. After gradient_sums with a
// residual, of whose gradient it goes on.
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
