// Weighted sums of rows, which take most of the time of rescaling and blurring.
#pragma once

#include <algorithm>
#include <cstddef>

#include "dali/fixed_point.h"

namespace mcl::montage::cpu {

// sums[x] = first + sum over k of weight[k] * row(k)[x], in units of 1/256 level. Adds four rows at a time, so that
// sums are loaded and stored less often.
template <typename Row>
[[gnu::always_inline]] inline void add_rows(const Row& row, int width, const uint16_t* weights, int taps,
                                            uint16_t first, uint16_t* __restrict__ sums) {
  std::fill_n(sums, width, first);
  int k = 0;
  for (; k + 4 <= taps; k += 4) {
    const auto *a = row(k), *b = row(k + 1), *c = row(k + 2), *d = row(k + 3);
    const uint16_t u = weights[k], v = weights[k + 1], w = weights[k + 2], z = weights[k + 3];
    for (int x = 0; x < width; ++x)
      sums[x] += weighed(a[x], u) + weighed(b[x], v) + weighed(c[x], w) + weighed(d[x], z);
  }
  for (; k + 2 <= taps; k += 2) {
    const auto *a = row(k), *b = row(k + 1);
    const uint16_t u = weights[k], v = weights[k + 1];
    for (int x = 0; x < width; ++x) sums[x] += weighed(a[x], u) + weighed(b[x], v);
  }
  for (; k < taps; ++k) {
    const auto* a = row(k);
    const uint16_t u = weights[k];
    for (int x = 0; x < width; ++x) sums[x] += weighed(a[x], u);
  }
}

}  // namespace mcl::montage::cpu
