// One tile on the CPU, free of DALI: window, rescale, flip, jitter, gray, blur, solarise.
//
// Every operation ends in 8 bits, rounded or cut off as Pillow (rescaling) and torchvision (all else) do it; so results
// differ from theirs by a level at most where a sum falls on the other side of a whole number.
#pragma once

#include "dali/cpu/blur.h"
#include "dali/cpu/colour.h"
#include "dali/cpu/resize.h"

namespace mcl::montage::cpu {

// Scratch of one thread, and a tile as it is made: three planes of `size` x `size`.
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
