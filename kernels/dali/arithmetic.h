// Arithmetic of single pixels, shared by CPU and CUDA kernels. Colour operations are torchvision's and truncate their
// results to whole numbers.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace mcl::montage {

// The pixel, of `size` pixels, that stands for pixel `i` with reflection padding.
MCL_HOST_DEVICE int reflect(int i, int size) {
  if (size == 1) return 0;
  while (i < 0 || i >= size) i = i < 0 ? -i : 2 * (size - 1) - i;
  return i;
}

struct Rgb {
  float r, g, b;  // whole numbers from 0 to 255
};

template <typename T>
MCL_HOST_DEVICE T smaller(T a, T b) {
  return b < a ? b : a;
}

template <typename T>
MCL_HOST_DEVICE T larger(T a, T b) {
  return a < b ? b : a;
}

MCL_HOST_DEVICE float whole(float x) {
  return static_cast<float>(static_cast<int>(x));
}

MCL_HOST_DEVICE float clip(float x) {
  return whole(smaller(larger(x, 0.f), 255.f));
}

MCL_HOST_DEVICE float gray(Rgb c) {
  return whole(0.2989f * c.r + 0.587f * c.g + 0.114f * c.b);
}

MCL_HOST_DEVICE Rgb blend(Rgb c, float factor, float constant) {
  return {clip(c.r * factor + constant), clip(c.g * factor + constant), clip(c.b * factor + constant)};
}

MCL_HOST_DEVICE Rgb saturate(Rgb c, float factor) {
  return blend(c, factor, gray(c) * (1 - factor));
}

// One channel of a colour: `high` where the hue is nearest to the channel's own, `high` - `range` opposite to it. `hue`
// is in sixths of the circle, at least -7.
MCL_HOST_DEVICE float channel_of_hue(float offset, float hue, float high, float range) {
  const float around = offset + hue + 12;
  const float k = around - 6 * whole(around * (1 / 6.f));
  const float slope = larger(0.f, smaller(smaller(k, 4 - k), 1.f));
  return clip((high - range * slope) * (255.999f / 255));
}

// Shifts the hue of HSV by a fraction of the circle. All cases are computed and one is selected, since branches would
// prevent vectorization.
MCL_HOST_DEVICE Rgb turn_hue(Rgb c, float turns) {
  const float high = larger(larger(c.r, c.g), c.b), range = high - smaller(smaller(c.r, c.g), c.b);
  const float inverse = 1 / larger(range, 1.f);  // if range is 0, so are all differences
  const float red = (c.g - c.b) * inverse, green = 2 + (c.b - c.r) * inverse, blue = 4 + (c.r - c.g) * inverse;
  const float not_red = high == c.g ? green : blue;
  const float hue = (high == c.r ? red : not_red) + 6 * turns;
  return {channel_of_hue(5, hue, high, range), channel_of_hue(3, hue, high, range),
          channel_of_hue(1, hue, high, range)};
}

}  // namespace mcl::montage
