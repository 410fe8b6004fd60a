// CUDA kernels of norms and LARS.
#pragma once

#include <cmath>

#include "cuda/tensor_table.cuh"

namespace mcl::cuda {

// Sum over the block, in thread 0. The order of additions is fixed.
template <typename T>
__device__ __forceinline__ T block_sum(T x) {
  __shared__ T sums[kTableThreads / 32];
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_down_sync(0xffffffffu, x, distance);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  T total = T(0);
  if (threadIdx.x == 0)
    for (int w = 0; w < kTableThreads / 32; ++w) total += sums[w];
  return total;
}

// partial[b] = sum of the squares of chunk b. Grid: chunks.
template <typename T>
__global__ void __launch_bounds__(kTableThreads) partial_squares(TensorTable<const T, 1> table, T* partial) {
  const Chunk chunk = find_chunk(table, blockIdx.x);
  const T* x = table.data[0][chunk.tensor];
  T sum = T(0);
  for_each_element(
      table, chunk,
      [&](int64_t i) {
        const auto v = word(x + i);
        for (int k = 0; k < Word<T>::kLength; ++k) sum += v.value[k] * v.value[k];
      },
      [&](int64_t i) { sum += x[i] * x[i]; });
  sum = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// norms[t] = square root of the sum of tensor t's partial sums. Grid: tensors.
template <typename T>
__global__ void __launch_bounds__(kTableThreads)
    finish_norms(TensorTable<const T, 1> table, const T* partial, T* norms) {
  T sum = T(0);
  for (int b = table.first_chunk[blockIdx.x] + threadIdx.x; b < table.first_chunk[blockIdx.x + 1]; b += kTableThreads)
    sum += partial[b];
  sum = block_sum(sum);
  if (threadIdx.x == 0) norms[blockIdx.x] = std::sqrt(sum);
}

// buffer = momentum * buffer + lr * trust * (g + weight_decay * w); w = w - buffer. Lists: w, g, buffer. Grid: chunks.
// `weight_norms` and `grad_norms` have one entry per tensor of the table; if they are null, trust is 1. Nothing changes
// if skipped(found_inf).
template <typename T>
__global__ void __launch_bounds__(kTableThreads)
    lars_update(TensorTable<T, 3> table, const T* weight_norms, const T* grad_norms, T lr, T momentum, T weight_decay,
                T trust_coefficient, const float* found_inf) {
  if (skipped(found_inf)) return;
  const Chunk chunk = find_chunk(table, blockIdx.x);
  T *w = table.data[0][chunk.tensor], *g = table.data[1][chunk.tensor], *buffer = table.data[2][chunk.tensor];
  T rate = lr;
  if (weight_norms != nullptr) {
    const T weight_norm = weight_norms[chunk.tensor];
    const T scale = grad_norms[chunk.tensor] + weight_decay * weight_norm;
    rate *= scale > T(0) ? trust_coefficient * weight_norm / scale : T(0);
  }
  const auto update = [&](T& weight, T grad, T& velocity) {
    velocity = momentum * velocity + rate * (grad + weight_decay * weight);
    weight -= velocity;
  };
  for_each_element(
      table, chunk,
      [&](int64_t i) {
        auto weight = word(w + i), velocity = word(buffer + i);
        const auto grad = word(g + i);
        for (int k = 0; k < Word<T>::kLength; ++k) update(weight.value[k], grad.value[k], velocity.value[k]);
        word(w + i) = weight;
        word(buffer + i) = velocity;
      },
      [&](int64_t i) { update(w[i], g[i], buffer[i]); });
}

}  // namespace mcl::cuda
