// Exponential moving average on the CPU. Does not depend on torch.
#pragma once

#include <cstdint>

#include "cpu/vectorize.h"

namespace mcl::cpu {

// target = momentum * target + (1 - momentum) * online.
template <typename T>
MCL_VECTORIZE void ema_update(T* __restrict__ target, const T* __restrict__ online, int64_t n, T momentum, T rest) {
  for (int64_t i = 0; i < n; ++i) target[i] = momentum * target[i] + rest * online[i];
}

}  // namespace mcl::cpu
