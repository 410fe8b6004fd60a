// Weighted sums in 16 bits, the same on CPU and CUDA: values in units of 1/256 level, weights of 1/65536.
#pragma once

#include <cstdint>

#include "dali/arithmetic.h"

namespace mcl::montage {

constexpr int kLevel = 256;  // one of 8 bits
constexpr int kOne = 65536;  // the weight of a sum's only term

// Hands kOne units out in proportion to shares, in turn: all together no more and no less, whatever is rounded.
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

// Cut off below 1/256 level.
MCL_HOST_DEVICE uint16_t weighed(uint16_t x, uint16_t weight) {
  return static_cast<uint16_t>((static_cast<uint32_t>(x) * weight) >> 16);
}

MCL_HOST_DEVICE uint16_t weighed(uint8_t level, uint16_t weight) {
  return weighed(static_cast<uint16_t>(level << 8), weight);
}

// What the terms of a sum lose by the cutting off, in the mean; of many terms less, so that no sum of white overflows.
MCL_HOST_DEVICE uint16_t lost(int terms) {
  return static_cast<uint16_t>(terms < 100 ? terms / 2 : 50);
}

// Rounded to levels.
MCL_HOST_DEVICE uint8_t to_level(uint16_t x) {
  return static_cast<uint8_t>(x >> 8);
}
constexpr uint16_t kRound = kLevel / 2;  // to be added before

}  // namespace mcl::montage
