// Makes one tile on the CPU: window, rescale, flip, jitter, gray, blur, solarise. Does not depend on DALI.
//
// Every operation returns 8 bits, rounded or truncated as in Pillow (rescaling) and torchvision (all others). A result
// differs from theirs by one level at most, where a sum lies on the other side of a whole number.
#pragma once

#include "dali/cpu/blur.h"
#include "dali/cpu/colour.h"
#include "dali/cpu/resize.h"

namespace mcl::montage::cpu {

// A tile, as three planes of `size` x `size`, and the scratch memory of one thread.
class Tile {
 public:
  int size = 0;
  std::vector<uint8_t> planes;

  void make(Copies& copies, const Recipe& recipe, int side) {
    size = side;
    planes.resize(3 * area());
    resizer_.run(copies, recipe, side, planes.data());
    colour({plane(0), plane(1), plane(2), area()}, recipe);
    if (recipe.sigma > 0) {
      blurred_.resize(planes.size());
      blur_.set_sigma(recipe.sigma);
      for (int c = 0; c < 3; ++c) blur_.run(plane(c), side, blurred_.data() + c * area());
      planes.swap(blurred_);
    }
    if (recipe.solarize) invert_bright(planes.data(), planes.size());
  }

  uint8_t* plane(int c) { return planes.data() + c * area(); }
  size_t area() const { return static_cast<size_t>(size) * size; }

 private:
  Resizer resizer_;
  Blur blur_;
  std::vector<uint8_t> blurred_;
};

}  // namespace mcl::montage::cpu
