// Positions and weights of region_pool's samples, shared by CPU and CUDA kernels.
//
// Coordinates are in cells of a map. Cell centres are integers, so a box edge at pixel x has the coordinate
// x / stride - 0.5 (RoIAlign with aligned=True, arXiv 1703.06870 and torchvision.ops.roi_align). The weight of a sample
// on a cell is the product of one factor per axis, so most of this file handles a single axis.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace mcl {

constexpr int kMaxMaps = 8;

// One map (rows, channels, height, width) in any memory layout; strides in elements.
template <typename T>
struct Map {
  T* data;
  int64_t row_stride, channel_stride, y_stride, x_stride;
  int rows, height, width;
  double scale;      // cells per canvas pixel
  int first_canvas;  // number of its first canvas; canvases are numbered through all maps
};

template <typename T>
struct Maps {
  Map<T> map[kMaxMaps];
  int count;
};

// The output or its gradient, (boxes, channels, bins, bins); strides in elements.
struct PooledStrides {
  int64_t box, channel, y, x;
};

// The two cells between which a sample lies. A cell with a weight of zero must be skipped, since 0 * Inf is NaN.
template <typename A>
struct Tap {
  int low, high;
  A low_weight, high_weight;
};

// Samples of a box along one axis: `bins` bins of `count` samples each.
template <typename A>
struct Axis {
  A start;     // first edge
  A bin;       // cells per bin
  int count;   // samples per bin; 0 for an invalid box
  int origin;  // the cell of bin 0, if `copy`
  bool copy;   // whether every bin p has a single sample, at the centre of cell origin + p

  MCL_HOST_DEVICE A coordinate(int sample) const {
    const int p = sample / count;
    return start + p * bin + (sample - p * count + A(0.5)) * bin / count;
  }
};

template <typename A>
MCL_HOST_DEVICE bool is_finite(A x) {
  return x - x == A(0);
}

// Samples between pixels `from` and `to` of a map with `size` cells. `ratio` > 0 fixes the samples per bin; 0 takes one
// per cell that a bin covers, at most `size`. Non-finite and reversed edges give no samples.
template <typename A>
MCL_HOST_DEVICE Axis<A> make_axis(A from, A to, A scale, int size, int bins, int ratio) {
  Axis<A> axis{from * scale - A(0.5), A(0), 0, 0, false};
  const A extent = to * scale - A(0.5) - axis.start;
  axis.bin = extent / bins;
  if (!is_finite(axis.start) || !is_finite(extent) || !(extent >= A(0))) return axis;
  // The comparison comes before the conversion, since converting a value that does not fit an int is undefined.
  axis.count = ratio > 0 ? ratio : axis.bin >= A(size) ? size : static_cast<int>(std::ceil(axis.bin));
  const A centre = axis.start + A(0.5);
  if (axis.count == 1 && axis.bin == A(1) && centre >= A(0) && centre <= A(size - bins)) {
    axis.origin = static_cast<int>(centre);
    axis.copy = A(axis.origin) == centre;
  }
  return axis;
}

// Cells and weights of a sample, as in torchvision: the border is repeated for one cell outside the map. Returns false
// for samples beyond that, which contribute nothing.
template <typename A>
MCL_HOST_DEVICE bool make_tap(A coordinate, int size, Tap<A>* tap) {
  if (!(coordinate >= A(-1) && coordinate <= A(size))) return false;
  if (coordinate < A(0)) coordinate = A(0);
  tap->low = static_cast<int>(coordinate);
  if (tap->low >= size - 1) {
    tap->low = tap->high = size - 1;
    tap->high_weight = A(0);
  } else {
    tap->high = tap->low + 1;
    tap->high_weight = coordinate - tap->low;
  }
  tap->low_weight = A(1) - tap->high_weight;
  return true;
}

// A box on its map.
template <typename A>
struct Region {
  Axis<A> x, y;
  int box;  // row of the boxes and of the output
  int row;  // row of the map

  MCL_HOST_DEVICE bool empty() const { return x.count == 0 || y.count == 0; }
  MCL_HOST_DEVICE bool copy() const { return x.copy && y.copy; }
  // The weight of one sample.
  MCL_HOST_DEVICE A norm() const { return A(1) / (A(x.count) * A(y.count)); }
};

// Number of the map that a box is pooled from, or -1 if the map or its row does not exist.
template <typename T, typename A>
MCL_HOST_DEVICE int map_of(const Maps<T>& maps, const A* box, int64_t index) {
  if (index < 0 || index >= maps.count) return -1;
  return box[0] >= A(0) && box[0] < A(maps.map[index].rows) ? static_cast<int>(index) : -1;
}

// `box`: row of the map, x1, y1, x2, y2 in canvas pixels.
template <typename T, typename A>
MCL_HOST_DEVICE Region<A> make_region(const Map<T>& map, const A* box, int number, int bins, int ratio) {
  return {make_axis(box[1], box[3], static_cast<A>(map.scale), map.width, bins, ratio),
          make_axis(box[2], box[4], static_cast<A>(map.scale), map.height, bins, ratio), number,
          static_cast<int>(box[0])};
}

}  // namespace mcl
