// Weights of a Gaussian blur. The host computes them for CPU and GPU, since exp() may differ between them in the last
// bit.
#pragma once

#include <cmath>
#include <vector>

#include "dali/fixed_point.h"

namespace mcl::montage {

// Radius of a blur in pixels: three sigma, rounded up.
inline int blur_radius(float sigma) {
  return static_cast<int>(std::ceil(3 * sigma));
}

// Appends the 2 * blur_radius(sigma) + 1 weights of a blur; sigma must be positive.
inline void append_gauss(float sigma, std::vector<uint16_t>& to) {
  const int radius = blur_radius(sigma);
  const auto bell = [=](int k) { return std::exp(-0.5 * k * k / (static_cast<double>(sigma) * sigma)); };
  double total = 0;
  for (int k = -radius; k <= radius; ++k) total += bell(k);
  Weights weights(total);
  for (int k = -radius; k <= radius; ++k) to.push_back(weights.next(bell(k)));
}

}  // namespace mcl::montage
