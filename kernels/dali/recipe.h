// The augmentation of one tile: one row of dali_pipelines.plan.Augmentation.
#pragma once

#include <cstdint>

namespace mcl::montage {

enum Colour { kBrightness, kContrast, kSaturation, kHue };

struct Recipe {
  int x1, y1, x2, y2;  // window in the source image, in pixels
  bool flip;
  int order[4];      // of Colour operations; -1 for none
  float factors[4];  // brightness, contrast, saturation, hue shift in turns
  bool gray;
  float sigma;  // of the blur, in pixels of the tile; 0 for none
  bool solarize;
};

// Fields of a recipe in the operator's input: x1 y1 x2 y2 flip jitter order[4] factors[4] gray sigma solarize.
constexpr int kFields = 17;

// Clamps fields to valid ranges, so that kernels never access memory out of bounds; a window keeps at least one pixel.
// The tiles of an image that has another size than planned are not used: the loader compares sizes
// (dali_pipelines/loader.py).
inline Recipe read_recipe(const float* f, int height, int width) {
  const auto clamp = [](float x, float low, float high) {
    return x > low ? (x < high ? x : high) : low;
  };  // NaN becomes low
  Recipe r{};
  r.x1 = static_cast<int>(clamp(f[0], 0, static_cast<float>(width - 1)));
  r.y1 = static_cast<int>(clamp(f[1], 0, static_cast<float>(height - 1)));
  r.x2 = static_cast<int>(clamp(f[2], static_cast<float>(r.x1 + 1), static_cast<float>(width)));
  r.y2 = static_cast<int>(clamp(f[3], static_cast<float>(r.y1 + 1), static_cast<float>(height)));
  r.flip = f[4] > 0;
  for (int i = 0; i < 4; ++i) {
    const int colour = static_cast<int>(clamp(f[6 + i], -1, 3));
    r.order[i] = f[5] > 0 ? colour : -1;
    r.factors[i] = clamp(f[10 + i], i == kHue ? -1.f : 0.f, 1e4f);
  }
  r.gray = f[14] > 0;
  // A blur of less than a quarter of a pixel is skipped: all neighbours together have a weight below 0.0014, so that no
  // level changes by a half.
  r.sigma = f[15] >= 0.25f ? clamp(f[15], 0, 64) : 0;
  r.solarize = f[16] > 0;
  return r;
}

}  // namespace mcl::montage
