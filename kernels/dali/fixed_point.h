// Weighted sums in 16 bits, shared by CPU and CUDA kernels. Values are in units of 1/256 level, weights in units of
// 1/65536. A level is one of the 256 values of a pixel.
#pragma once

#include <cstdint>

#include "dali/arithmetic.h"

namespace mcl::montage {

constexpr int kLevel = 256;  // one level
constexpr int kOne = 65536;  // the sum of all weights

// Rounds the weights of a sum, in turn, such that they add up to kOne. A single weight is kOne - 1.
class Weights {
 public:
  MCL_HOST_DEVICE explicit Weights(double total) : total_(total) {}

  MCL_HOST_DEVICE uint16_t next(double share) {
    done_ += share;
    const int given = static_cast<int>(done_ / total_ * kOne + 0.5), weight = given - given_;
    given_ = given;
    return static_cast<uint16_t>(weight < kOne ? weight : kOne - 1);
  }

 private:
  double total_, done_ = 0;
  int given_ = 0;
};

// x * weight, truncated to units of 1/256 level.
MCL_HOST_DEVICE uint16_t weighed(uint16_t x, uint16_t weight) {
  return static_cast<uint16_t>((static_cast<uint32_t>(x) * weight) >> 16);
}

MCL_HOST_DEVICE uint16_t weighed(uint8_t level, uint16_t weight) {
  return weighed(static_cast<uint16_t>(level << 8), weight);
}

// The mean of what truncation takes from a sum, to be added to it. For many terms less is added, so that the sum of
// white pixels does not overflow.
MCL_HOST_DEVICE uint16_t lost(int terms) {
  return static_cast<uint16_t>(terms < 100 ? terms / 2 : 50);
}

// The level of a sum to which kRound was added.
MCL_HOST_DEVICE uint8_t to_level(uint16_t x) {
  return static_cast<uint8_t>(x >> 8);
}
constexpr uint16_t kRound = kLevel / 2;

}  // namespace mcl::montage
