// One number, one pixel: the arithmetic of a tile that CPU and CUDA kernels share. Filter weights are Pillow's, colours
// torchvision's; a colour operation ends in whole numbers, cut off after the point.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MCL_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MCL_HOST_DEVICE inline
#endif

namespace mcl::montage {

// Fixed point of filter weights, like Pillow's, since sums that end in exactly one half are frequent.
constexpr int kFilterBits = 22;

// The inputs first .. last - 1 of which output pixel i is the weighted mean: Pillow's antialiased bilinear filter.
struct Taps {
  int first, last;
  double centre, reach;  // input pixels

  // Not yet divided by the sum of all.
  MCL_HOST_DEVICE double weight(int x) const {
    const double distance = (x - centre + 0.5) / reach, height = 1 - (distance < 0 ? -distance : distance);
    return height > 0 ? height : 0;
  }
};

// Those of output i where `in` pixels become `out`.
MCL_HOST_DEVICE Taps taps_of(int i, int in, int out) {
  const double scale = static_cast<double>(in) / out, reach = scale > 1 ? scale : 1, centre = (i + 0.5) * scale;
  const int first = static_cast<int>(centre - reach + 0.5), last = static_cast<int>(centre + reach + 0.5);
  return {first > 0 ? first : 0, last < in ? last : in, centre, reach};
}

MCL_HOST_DEVICE int32_t fixed_point(double weight) {
  return static_cast<int32_t>(weight * (1 << kFilterBits) + 0.5);
}

// Where `i` lies within `size` pixels that are mirrored about their outermost ones.
MCL_HOST_DEVICE int reflect(int i, int size) {
  if (size == 1) return 0;
  while (i < 0 || i >= size) i = i < 0 ? -i : 2 * (size - 1) - i;
  return i;
}

struct Rgb {
  float r, g, b;  // whole numbers from 0 to 255
};

MCL_HOST_DEVICE float smaller(float a, float b) {
  return b < a ? b : a;
}

MCL_HOST_DEVICE float larger(float a, float b) {
  return a < b ? b : a;
}

MCL_HOST_DEVICE float whole(float x) {
  return static_cast<float>(static_cast<int>(x));
}

MCL_HOST_DEVICE float clip(float x) {
  return whole(smaller(larger(x, 0), 255));
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

// One channel of a colour: `high` at its best hue, `high` - `range` opposite. `hue`: sixths of the circle, at least -7.
MCL_HOST_DEVICE float channel_of_hue(float offset, float hue, float high, float range) {
  const float around = offset + hue + 12;
  const float k = around - 6 * whole(around * (1 / 6.f));
  const float slope = larger(0, smaller(smaller(k, 4 - k), 1));
  return clip((high - range * slope) * (255.999f / 255));
}

// Turns the hue of HSV by a fraction of the circle. No branches, which vectors lack: all is computed, then chosen.
MCL_HOST_DEVICE Rgb turn_hue(Rgb c, float turns) {
  const float high = larger(larger(c.r, c.g), c.b), range = high - smaller(smaller(c.r, c.g), c.b);
  const float inverse = 1 / larger(range, 1);  // no range: all differences are zero, too
  const float red = (c.g - c.b) * inverse, green = 2 + (c.b - c.r) * inverse, blue = 4 + (c.r - c.g) * inverse;
  const float not_red = high == c.g ? green : blue;
  const float hue = (high == c.r ? red : not_red) + 6 * turns;
  return {channel_of_hue(5, hue, high, range), channel_of_hue(3, hue, high, range),
          channel_of_hue(1, hue, high, range)};
}

}  // namespace mcl::montage
