// An axis of a window, and how it is rescaled: the same on CPU and CUDA.
//
// Where a window is many times larger than its tile, a copy of the image is read that is 2, 4, ... times smaller. A
// pixel of it is a cell of the image's pixels. What a window's border cuts of a cell counts with the pixels inside
// only, so that nothing beyond the window is ever seen.
#pragma once

#include "dali/fixed_point.h"
#include "dali/recipe.h"

namespace mcl::montage {

// Pixels first .. last - 1 of an axis, as cells of 2^halvings pixels of which the outermost may be cut.
struct Cells {
  int first, last, halvings;

  MCL_HOST_DEVICE int base() const { return first >> halvings; }  // cell 0, counted from the image's first
  MCL_HOST_DEVICE int number() const { return ((last - 1) >> halvings) - base() + 1; }
  MCL_HOST_DEVICE int begin(int c) const { return larger(first, (base() + c) << halvings); }
  MCL_HOST_DEVICE int end(int c) const { return smaller(last, (base() + c + 1) << halvings); }
  MCL_HOST_DEVICE int size(int c) const { return end(c) - begin(c); }
  MCL_HOST_DEVICE bool whole(int c) const { return size(c) == 1 << halvings; }
  MCL_HOST_DEVICE double middle(int c) const { return 0.5 * (begin(c) + end(c)) - first; }
};

// The cells low .. high - 1 of which a rescaled pixel is the weighted mean: Pillow's antialiased bilinear filter.
struct Span {
  int low, high;
  double centre, reach;  // pixels from the window's first

  // Of cell c, not yet divided by the sum of all.
  MCL_HOST_DEVICE double share(const Cells& cells, int c) const {
    const double distance = (cells.middle(c) - centre) / reach, height = 1 - (distance < 0 ? -distance : distance);
    return height > 0 ? cells.size(c) * height : 0;
  }
};

// That of pixel i of `out`.
MCL_HOST_DEVICE Span span_of(const Cells& cells, int i, int out) {
  const double scale = static_cast<double>(cells.last - cells.first) / out, reach = scale > 1 ? scale : 1;
  const double centre = (i + 0.5) * scale, left = centre - reach, right = centre + reach;
  const int number = cells.number();
  int low = ((cells.first + (left > 0 ? static_cast<int>(left) : 0)) >> cells.halvings) - cells.base();
  while (low < number - 1 && cells.middle(low) <= left) ++low;
  int high = low;
  while (high < number && cells.middle(high) < right) ++high;
  return {low, high, centre, reach};
}

// No span of `pixels` that become `out` has more cells.
MCL_HOST_DEVICE int most_cells(int pixels, int out, int halvings) {
  const int reach = pixels > out ? (pixels + out - 1) / out : 1;
  return (2 * reach >> halvings) + 3;
}

// How often an image may be halved for a tile of `size` pixels: its window stays 4 times the tile on both sides. On
// photographs that is at most 2 levels from the whole image's result; 3 times would be 4.
MCL_HOST_DEVICE int halvings(const Recipe& r, int size) {
  const int shorter = smaller(r.x2 - r.x1, r.y2 - r.y1);
  int n = 0;
  while (shorter >> (n + 1) >= 4 * size) ++n;
  return n;
}

// Of four pixels, rounded.
MCL_HOST_DEVICE uint8_t mean_of(int a, int b, int c, int d) {
  return static_cast<uint8_t>((a + b + c + d + 2) >> 2);
}

}  // namespace mcl::montage
