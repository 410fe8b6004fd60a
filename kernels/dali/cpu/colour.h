// Colour operations on three 8-bit planes, as in torchvision.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cpu/vectorize.h"
#include "dali/arithmetic.h"
#include "dali/recipe.h"

namespace mcl::montage::cpu {

struct Planes {
  uint8_t *red, *green, *blue;
  size_t size;  // pixels

  Rgb at(size_t i) const {
    return {static_cast<float>(red[i]), static_cast<float>(green[i]), static_cast<float>(blue[i])};
  }
};

// Local variables tell the compiler that planes do not overlap and that their size is constant.
template <typename Operation>
[[gnu::always_inline]] inline void for_each_pixel(const Planes& planes, const Operation& operation) {
  uint8_t* __restrict__ r = planes.red, * __restrict__ g = planes.green, * __restrict__ b = planes.blue;
  const size_t size = planes.size;
  for (size_t i = 0; i < size; ++i) {
    const Rgb c = operation(Rgb{static_cast<float>(r[i]), static_cast<float>(g[i]), static_cast<float>(b[i])});
    r[i] = static_cast<uint8_t>(static_cast<int>(c.r));
    g[i] = static_cast<uint8_t>(static_cast<int>(c.g));
    b[i] = static_cast<uint8_t>(static_cast<int>(c.b));
  }
}

MCL_VECTORIZE inline void blend(const Planes& planes, float factor, float constant) {
  for_each_pixel(planes, [=](Rgb c) { return montage::blend(c, factor, constant); });
}

MCL_VECTORIZE inline void saturate(const Planes& planes, float factor) {
  for_each_pixel(planes, [=](Rgb c) { return montage::saturate(c, factor); });
}

MCL_VECTORIZE inline void turn_hue(const Planes& planes, float turns) {
  for_each_pixel(planes, [=](Rgb c) { return montage::turn_hue(c, turns); });
}

MCL_VECTORIZE inline int64_t sum_of_grays(const Planes& planes) {
  int64_t sum = 0;
  for (size_t first = 0; first < planes.size; first += 4096) {  // the sum of 4096 fits 32 bits
    int32_t part = 0;
    for (size_t i = first; i < std::min(planes.size, first + 4096); ++i) part += static_cast<int>(gray(planes.at(i)));
    sum += part;
  }
  return sum;
}

MCL_VECTORIZE inline void invert_bright(uint8_t* x, size_t n) {
  for (size_t i = 0; i < n; ++i) x[i] = x[i] >= 128 ? 255 - x[i] : x[i];
}

// Applies the colour jitter in the recipe's order, then grayscale.
inline void colour(const Planes& planes, const Recipe& r) {
  for (const int operation : r.order) {
    const float factor = operation < 0 ? 0 : r.factors[operation];
    if (operation == kBrightness) {
      blend(planes, factor, 0);
    } else if (operation == kContrast) {
      const double mean = static_cast<double>(sum_of_grays(planes)) / static_cast<double>(planes.size);
      blend(planes, factor, static_cast<float>(mean) * (1 - factor));
    } else if (operation == kSaturation) {
      saturate(planes, factor);
    } else if (operation == kHue) {
      turn_hue(planes, factor);
    }
  }
  if (r.gray) saturate(planes, 0);
}

}  // namespace mcl::montage::cpu
