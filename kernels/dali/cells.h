// How an axis of a window is rescaled, shared by CPU and CUDA kernels.
//
// If a window is many times larger than its tile, kernels read a copy of the image that is 2, 4, ... times smaller. A
// pixel of the copy is the mean of a cell of the image's pixels. If the window's border cuts a cell, only the pixels
// inside the window count, so that no pixel outside enters a tile.
#pragma once

#include "dali/fixed_point.h"
#include "dali/recipe.h"

namespace mcl::montage {

// Pixels first .. last - 1 of an axis, in cells of 2^halvings pixels. The outermost cells may be cut.
struct Cells {
  int first, last, halvings;

  MCL_HOST_DEVICE int base() const { return first >> halvings; }  // number of cell 0 among the image's
  MCL_HOST_DEVICE int number() const { return ((last - 1) >> halvings) - base() + 1; }
  MCL_HOST_DEVICE int begin(int c) const { return larger(first, (base() + c) << halvings); }
  MCL_HOST_DEVICE int end(int c) const { return smaller(last, (base() + c + 1) << halvings); }
  MCL_HOST_DEVICE int size(int c) const { return end(c) - begin(c); }
  MCL_HOST_DEVICE bool whole(int c) const { return size(c) == 1 << halvings; }
  MCL_HOST_DEVICE double middle(int c) const { return 0.5 * (begin(c) + end(c)) - first; }
};

// A rescaled pixel is the weighted mean of cells low .. high - 1: Pillow's antialiased bilinear filter.
struct Span {
  int low, high;
  double centre, reach;  // centre and half width of the filter, in pixels of the window

  // The weight of cell c, not yet divided by the sum of all weights.
  MCL_HOST_DEVICE double share(const Cells& cells, int c) const {
    const double distance = (cells.middle(c) - centre) / reach, height = 1 - (distance < 0 ? -distance : distance);
    return height > 0 ? cells.size(c) * height : 0;
  }
};

// The span of pixel i, if the window is rescaled to `out` pixels.
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

// The most cells that a span can have, if `pixels` are rescaled to `out`.
MCL_HOST_DEVICE int most_cells(int pixels, int out, int halvings) {
  const int reach = pixels > out ? (pixels + out - 1) / out : 1;
  return (2 * reach >> halvings) + 3;
}

// How often an image may be halved for a tile of `size` pixels: both sides of the window must stay at least 4 times as
// long as the tile's. On photographs the result is then at most 2 levels from that of the original; with 3 times, 4.
MCL_HOST_DEVICE int halvings(const Recipe& r, int size) {
  const int shorter = smaller(r.x2 - r.x1, r.y2 - r.y1);
  int n = 0;
  while (shorter >> (n + 1) >= 4 * size) ++n;
  return n;
}

// The mean of four pixels, rounded.
MCL_HOST_DEVICE uint8_t mean_of(int a, int b, int c, int d) {
  return static_cast<uint8_t>((a + b + c + d + 2) >> 2);
}

}  // namespace mcl::montage
