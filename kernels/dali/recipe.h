// What happens to one tile: one row of dali_pipelines.plan.Augmentation, as the operator receives it.
#pragma once

#include <cstdint>

namespace mcl::montage {

enum Colour { kBrightness, kContrast, kSaturation, kHue };

struct Recipe {
  int x1, y1, x2, y2;  // window in the source image, pixels
  bool flip;
  int order[4];      // which Colour comes first, second, ...; -1: none
  float factors[4];  // brightness, contrast, saturation, hue shift in turns
  bool gray;
  float sigma;  // of the blur, pixels of the tile; 0: none
  bool solarize;
};

// Numbers of a recipe as they are fed: x1 y1 x2 y2 flip jitter order[4] factors[4] gray sigma solarize.
constexpr int kFields = 17;

// Clamps what no plan contains, so that no number can make a kernel leave its memory: a window always keeps a pixel.
// What an image of another size than planned makes is never used: the loader compares sizes (dali_pipelines/loader.py).
inline Recipe read_recipe(const float* f, int height, int width) {
  const auto clamp = [](float x, float low, float high) { return x > low ? (x < high ? x : high) : low; };  // NaN: low
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
  // Less than a quarter of a pixel: the neighbours' weights, 0.0014 of all, move no 8-bit level by as much as a half.
  r.sigma = f[15] >= 0.25f ? clamp(f[15], 0, 64) : 0;
  r.solarize = f[16] > 0;
  return r;
}

}  // namespace mcl::montage
