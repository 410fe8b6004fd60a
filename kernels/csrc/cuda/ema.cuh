// CUDA kernel of the exponential moving average.
#pragma once

#include "cuda/tensor_table.cuh"

namespace mcl::cuda {

// target = momentum * target + (1 - momentum) * online, unless skipped. Lists: target, online. Grid: chunks.
template <typename T>
__global__ void __launch_bounds__(kTableThreads)
    ema_update(TensorTable<T, 2> table, T momentum, T rest, const float* found_inf) {
  if (skipped(found_inf)) return;
  const Chunk chunk = find_chunk(table, blockIdx.x);
  T *target = table.data[0][chunk.tensor], *online = table.data[1][chunk.tensor];
  for_each_element(
      table, chunk,
      [&](int64_t i) {
        auto x = word(target + i);
        const auto y = word(online + i);
        for (int k = 0; k < Word<T>::kLength; ++k) x.value[k] = momentum * x.value[k] + rest * y.value[k];
        word(target + i) = x;
      },
      [&](int64_t i) { target[i] = momentum * target[i] + rest * online[i]; });
}

}  // namespace mcl::cuda
