// Gaussian blur of an 8-bit plane with reflection padding, as in torchvision.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/vectorize.h"
#include "dali/arithmetic.h"
#include "dali/cpu/rows.h"
#include "dali/gauss.h"

namespace mcl::montage::cpu {

class Blur {
 public:
  void set_sigma(float sigma) {
    radius_ = blur_radius(sigma);
    kernel_.clear();
    append_gauss(sigma, kernel_);
  }

  void run(const uint8_t* from, int size, uint8_t* to) {
    const int taps = 2 * radius_ + 1;
    rows_.resize(taps);
    padded_.resize(size + 2 * radius_);
    sums_.resize(size);
    uint16_t* middle = padded_.data() + radius_;
    for (int y = 0; y < size; ++y) {
      for (int k = 0; k < taps; ++k) rows_[k] = from + static_cast<size_t>(reflect(y + k - radius_, size)) * size;
      down(rows_.data(), size, kernel_.data(), taps, middle);
      for (int k = 1; k <= radius_; ++k) {
        middle[-k] = middle[reflect(-k, size)];
        middle[size - 1 + k] = middle[reflect(size - 1 + k, size)];
      }
      along(padded_.data(), size, kernel_.data(), taps, sums_.data(), to + static_cast<size_t>(y) * size);
    }
  }

 private:
  int radius_ = 0;
  std::vector<uint16_t> kernel_, padded_, sums_;
  std::vector<const uint8_t*> rows_;

  MCL_VECTORIZE static void down(const uint8_t* const* rows, int width, const uint16_t* kernel, int taps,
                                 uint16_t* __restrict__ sums) {
    add_rows([&](int k) { return rows[k]; }, width, kernel, taps, lost(taps), sums);
  }

  MCL_VECTORIZE static void along(const uint16_t* row, int width, const uint16_t* kernel, int taps,
                                  uint16_t* __restrict__ sums, uint8_t* __restrict__ to) {
    add_rows([&](int k) { return row + k; }, width, kernel, taps, kRound + lost(taps), sums);
    for (int x = 0; x < width; ++x) to[x] = to_level(sums[x]);
  }
};

}  // namespace mcl::montage::cpu
