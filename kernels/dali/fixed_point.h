// Weighted sums in 16 bits, the same on CPU and CUDA: values in units of 1/256 level, weights of 1/65536.
#pragma once

#include <cmath>
#include <cstdint>

#include "dali/arithmetic.h"

namespace mcl::montage {

constexpr int kLevel = 256;  // one of 8 bits
constexpr int kOne = 65536;  // the weight of a sum's only term

MCL_HOST_DEVICE uint16_t to_weight(double x) {
  const double units = x * kOne + 0.5;
  return static_cast<uint16_t>(units < kOne - 1 ? units : kOne - 1);
}

// Cut off below 1/256 level.
MCL_HOST_DEVICE uint16_t weighed(uint16_t x, uint16_t weight) {
  return static_cast<uint16_t>((static_cast<uint32_t>(x) * weight) >> 16);
}

MCL_HOST_DEVICE uint16_t weighed(uint8_t level, uint16_t weight) {
  return weighed(static_cast<uint16_t>(level << 8), weight);
}

// A Gaussian, not yet divided by the sum of all.
MCL_HOST_DEVICE double bell(int k, float sigma) {
  return std::exp(-0.5 * k * k / (static_cast<double>(sigma) * sigma));
}

// What the terms of a sum lose by the cutting off, in the mean.
MCL_HOST_DEVICE uint16_t lost(int terms) {
  return static_cast<uint16_t>(terms < 254 ? terms / 2 : 127);
}

// Rounded to levels.
MCL_HOST_DEVICE uint8_t to_level(uint16_t x) {
  return static_cast<uint8_t>(x >> 8);
}
constexpr uint16_t kRound = kLevel / 2;  // to be added before

}  // namespace mcl::montage
