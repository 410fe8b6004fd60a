// region_pool on the CPU. Does not depend on torch, so that tests can compare it with the emulated CUDA kernels.
//
// The weights of every cell are summed per bin beforehand (Taps), so that each cell of a bin is read once, however many
// samples use it. Backward is deterministic: a thread computes a range of channels and adds boxes in order.
#pragma once

#include <algorithm>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <vector>

#include "cpu/vectorize.h"
#include "region_sampling.h"

namespace mcl::cpu {

// Cells and weights of every bin along one axis: bin p has entries begin[p] .. begin[p + 1] - 1. No weight is zero.
template <typename A>
struct Taps {
  std::vector<int> begin, cell;
  std::vector<A> weight;
  std::vector<A> sums;  // scratch, all zero between calls
  int first, last;      // range of all cells; first > last if there are none

  void build(const Axis<A>& axis, int size, int bins) {
    begin.assign(1, 0);
    cell.clear();
    weight.clear();
    if (sums.size() < static_cast<size_t>(size)) sums.resize(size, A(0));
    first = size, last = -1;
    for (int p = 0; p < bins; ++p) {
      int low = size, high = -1;
      for (int sample = p * axis.count; sample < (p + 1) * axis.count; ++sample) {
        Tap<A> tap;
        if (!make_tap(axis.coordinate(sample), size, &tap)) continue;
        sums[tap.low] += tap.low_weight;
        sums[tap.high] += tap.high_weight;
        low = std::min(low, tap.low), high = std::max(high, tap.high);
      }
      for (int i = low; i <= high; ++i) {
        if (sums[i] == A(0)) continue;
        cell.push_back(i);
        weight.push_back(sums[i] / axis.count);
        sums[i] = A(0);
        first = std::min(first, i), last = std::max(last, i);
      }
      begin.push_back(static_cast<int>(cell.size()));
    }
  }
};

template <typename T, typename A>
MCL_VECTORIZE void add_scaled(A* __restrict__ sum, const T* __restrict__ x, A weight, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] += weight * static_cast<A>(x[i]);
}

template <typename T, typename A>
MCL_VECTORIZE void convert(T* __restrict__ to, const A* __restrict__ from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(from[i]);
}

// For contiguous channels: loops are vectorized along them.
template <typename T, typename A>
void pool_dense(const Map<const T>& map, const Region<A>& region, const Taps<A>& y, const Taps<A>& x, int channels,
                int bins, T* out, const PooledStrides& to, std::vector<A>& scratch) {
  scratch.resize(channels);
  for (int py = 0; py < bins; ++py) {
    for (int px = 0; px < bins; ++px) {
      T* bin = out + py * to.y + px * to.x;
      A* sum = scratch.data();
      if constexpr (std::is_same_v<T, A>) sum = bin;
      std::fill_n(sum, channels, A(0));
      for (int i = y.begin[py]; i < y.begin[py + 1]; ++i) {
        const T* row = map.data + region.row * map.row_stride + y.cell[i] * map.y_stride;
        for (int j = x.begin[px]; j < x.begin[px + 1]; ++j)
          add_scaled(sum, row + x.cell[j] * map.x_stride, y.weight[i] * x.weight[j], channels);
      }
      if constexpr (!std::is_same_v<T, A>) convert(bin, sum, channels);
    }
  }
}

// For any other layout, one channel at a time: adds rows, whose columns are usually contiguous, and then columns.
template <typename T, typename A>
MCL_VECTORIZE void pool_plane(const T* __restrict__ plane, int64_t y_stride, int64_t x_stride, const Taps<A>& y,
                              const Taps<A>& x, int bins, T* __restrict__ out, const PooledStrides& to,
                              A* __restrict__ columns) {
  const int width = x.last - x.first + 1;
  plane += x.first * x_stride;
  for (int py = 0; py < bins; ++py) {
    std::fill_n(columns, width, A(0));
    for (int i = y.begin[py]; i < y.begin[py + 1]; ++i) {
      const T* row = plane + y.cell[i] * y_stride;
      const A weight = y.weight[i];
      if (x_stride == 1) {
        for (int k = 0; k < width; ++k) columns[k] += weight * static_cast<A>(row[k]);
      } else {
        for (int k = 0; k < width; ++k) columns[k] += weight * static_cast<A>(row[k * x_stride]);
      }
    }
    for (int px = 0; px < bins; ++px) {
      A sum = A(0);
      for (int j = x.begin[px]; j < x.begin[px + 1]; ++j) sum += x.weight[j] * columns[x.cell[j] - x.first];
      out[py * to.y + px * to.x] = static_cast<T>(sum);
    }
  }
}

template <typename T>
void copy_dense(const Map<const T>& map, int row, int y, int x, int channels, int bins, T* out,
                const PooledStrides& to) {
  const bool whole_rows = map.x_stride == channels && to.x == channels;
  for (int py = 0; py < bins; ++py) {
    const T* from = map.data + row * map.row_stride + (y + py) * map.y_stride + x * map.x_stride;
    T* bin = out + py * to.y;
    const size_t n = static_cast<size_t>(channels) * (whole_rows ? bins : 1);
    for (int px = 0; px < (whole_rows ? 1 : bins); ++px)
      std::memcpy(bin + px * to.x, from + px * map.x_stride, n * sizeof(T));
  }
}

template <typename T>
void copy_planes(const Map<const T>& map, int row, int y, int x, int channels, int bins, T* out,
                 const PooledStrides& to) {
  const T* corner = map.data + row * map.row_stride + y * map.y_stride + x * map.x_stride;
  for (int c = 0; c < channels; ++c) {
    for (int py = 0; py < bins; ++py) {
      const T* from = corner + c * map.channel_stride + py * map.y_stride;
      T* bin = out + c * to.channel + py * to.y;
      for (int px = 0; px < bins; ++px) bin[px * to.x] = from[px * map.x_stride];
    }
  }
}

template <typename T>
void clear(T* out, const PooledStrides& to, int channels, int bins) {
  for (int py = 0; py < bins; ++py)
    for (int px = 0; px < bins; ++px)
      for (int c = 0; c < channels; ++c) out[c * to.channel + py * to.y + px * to.x] = T(0);
}

// Computes boxes first .. last - 1 of the output (boxes, channels, bins, bins).
template <typename T, typename A>
void region_pool_forward(const Maps<const T>& maps, const A* boxes, const int64_t* index, int channels, int bins,
                         int ratio, T* out, const PooledStrides& to, int64_t first, int64_t last) {
  Taps<A> y, x;
  std::vector<A> scratch;
  for (int64_t r = first; r < last; ++r) {
    T* pooled = out + r * to.box;
    const int m = map_of(maps, boxes + 5 * r, index[r]);
    const auto region = m < 0 ? Region<A>{} : make_region(maps.map[m], boxes + 5 * r, static_cast<int>(r), bins, ratio);
    if (m < 0 || region.empty()) {
      clear(pooled, to, channels, bins);
      continue;
    }
    const Map<const T>& map = maps.map[m];
    const bool dense = map.channel_stride == 1 && to.channel == 1;
    if (region.copy()) {
      (dense ? copy_dense<T> : copy_planes<T>)(map, region.row, region.y.origin, region.x.origin, channels, bins,
                                               pooled, to);
      continue;
    }
    y.build(region.y, map.height, bins);
    x.build(region.x, map.width, bins);
    if (y.last < 0 || x.last < 0) {
      clear(pooled, to, channels, bins);
    } else if (dense) {
      pool_dense(map, region, y, x, channels, bins, pooled, to, scratch);
    } else {
      scratch.resize(map.width);
      const T* corner = map.data + region.row * map.row_stride;
      for (int c = 0; c < channels; ++c)
        pool_plane(corner + c * map.channel_stride, map.y_stride, map.x_stride, y, x, bins, pooled + c * to.channel, to,
                   scratch.data());
    }
  }
}

// The boxes of each canvas, in ascending order: canvas k has boxes order[begin[k]] .. order[begin[k + 1] - 1]. Canvases
// are numbered through all maps.
struct BoxesByCanvas {
  std::vector<int64_t> begin, order;

  template <typename T, typename A>
  BoxesByCanvas(const Maps<T>& maps, const A* boxes, const int64_t* index, int64_t number) {
    int canvases = 0;
    for (int m = 0; m < maps.count; ++m) canvases += maps.map[m].rows;
    begin.assign(canvases + 1, 0);
    std::vector<int> canvas(number);
    for (int64_t r = 0; r < number; ++r) {
      const int m = map_of(maps, boxes + 5 * r, index[r]);
      canvas[r] = m < 0 ? -1 : maps.map[m].first_canvas + static_cast<int>(boxes[5 * r]);
      if (canvas[r] >= 0) ++begin[canvas[r] + 1];
    }
    std::partial_sum(begin.begin(), begin.end(), begin.begin());
    order.resize(begin.back());
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for (int64_t r = 0; r < number; ++r)
      if (canvas[r] >= 0) order[next[canvas[r]]++] = r;
  }
};

// The memory in which the gradient of one canvas is summed.
template <typename A>
struct Sum {
  A* data;
  int64_t channel_stride, y_stride, x_stride;
};

template <typename T, typename A>
void unpool_dense(const Sum<A>& sum, const Taps<A>& y, const Taps<A>& x, const T* grad, const PooledStrides& from,
                  int bins, int channels) {
  for (int py = 0; py < bins; ++py) {
    for (int px = 0; px < bins; ++px) {
      const T* g = grad + py * from.y + px * from.x;
      for (int i = y.begin[py]; i < y.begin[py + 1]; ++i)
        for (int j = x.begin[px]; j < x.begin[px + 1]; ++j)
          add_scaled(sum.data + y.cell[i] * sum.y_stride + x.cell[j] * sum.x_stride, g, y.weight[i] * x.weight[j],
                     channels);
    }
  }
}

template <typename T, typename A>
MCL_VECTORIZE void unpool_plane(A* __restrict__ plane, int64_t y_stride, int64_t x_stride, const Taps<A>& y,
                                const Taps<A>& x, int bins, const T* __restrict__ grad, const PooledStrides& from,
                                A* __restrict__ columns) {
  const int width = x.last - x.first + 1;
  plane += x.first * x_stride;
  for (int py = 0; py < bins; ++py) {
    std::fill_n(columns, width, A(0));
    for (int px = 0; px < bins; ++px) {
      const A g = static_cast<A>(grad[py * from.y + px * from.x]);
      for (int j = x.begin[px]; j < x.begin[px + 1]; ++j) columns[x.cell[j] - x.first] += x.weight[j] * g;
    }
    for (int i = y.begin[py]; i < y.begin[py + 1]; ++i) {
      A* row = plane + y.cell[i] * y_stride;
      const A weight = y.weight[i];
      if (x_stride == 1) {
        for (int k = 0; k < width; ++k) row[k] += weight * columns[k];
      } else {
        for (int k = 0; k < width; ++k) row[k * x_stride] += weight * columns[k];
      }
    }
  }
}

// Computes the gradients of channels first .. last - 1 of all maps from the gradient of the output. Writes every cell.
template <typename T, typename A>
void region_pool_backward(const T* grad, const PooledStrides& from, const Maps<T>& maps, const A* boxes,
                          const BoxesByCanvas& boxes_by, int bins, int ratio, int64_t first, int64_t last) {
  const int channels = static_cast<int>(last - first);
  Taps<A> y, x;
  std::vector<A> columns, scratch;
  for (int m = 0; m < maps.count; ++m) {
    const Map<T>& map = maps.map[m];
    const int64_t cells = static_cast<int64_t>(map.height) * map.width;
    const bool dense = map.channel_stride == 1;
    columns.resize(map.width);
    for (int row = 0; row < map.rows; ++row) {
      T* canvas = map.data + row * map.row_stride + first * map.channel_stride;
      Sum<A> sum;
      if constexpr (std::is_same_v<T, A>) {
        sum = {canvas, map.channel_stride, map.y_stride, map.x_stride};
      } else {
        scratch.resize(cells * channels);
        sum = dense ? Sum<A>{scratch.data(), 1, int64_t(map.width) * channels, channels}
                    : Sum<A>{scratch.data(), cells, map.width, 1};
      }
      if (dense) {
        for (int64_t i = 0; i < map.height; ++i)
          for (int64_t j = 0; j < map.width; ++j)
            std::fill_n(sum.data + i * sum.y_stride + j * sum.x_stride, channels, A(0));
      } else {
        for (int c = 0; c < channels; ++c)
          for (int64_t i = 0; i < map.height; ++i)
            for (int64_t j = 0; j < map.width; ++j)
              sum.data[c * sum.channel_stride + i * sum.y_stride + j * sum.x_stride] = A(0);
      }
      const int k = map.first_canvas + row;
      for (int64_t i = boxes_by.begin[k]; i < boxes_by.begin[k + 1]; ++i) {
        const int64_t r = boxes_by.order[i];
        const auto region = make_region(map, boxes + 5 * r, static_cast<int>(r), bins, ratio);
        if (region.empty()) continue;
        y.build(region.y, map.height, bins);
        x.build(region.x, map.width, bins);
        if (y.last < 0 || x.last < 0) continue;
        const T* g = grad + r * from.box + first * from.channel;
        if (dense && from.channel == 1) {
          unpool_dense(sum, y, x, g, from, bins, channels);
        } else {
          for (int c = 0; c < channels; ++c)
            unpool_plane(sum.data + c * sum.channel_stride, sum.y_stride, sum.x_stride, y, x, bins,
                         g + c * from.channel, from, columns.data());
        }
      }
      if constexpr (!std::is_same_v<T, A>) {
        for (int64_t i = 0; i < map.height; ++i) {
          if (dense) {
            for (int64_t j = 0; j < map.width; ++j)
              convert(canvas + i * map.y_stride + j * map.x_stride, sum.data + i * sum.y_stride + j * sum.x_stride,
                      channels);
          } else {
            for (int c = 0; c < channels; ++c)
              for (int64_t j = 0; j < map.width; ++j)
                canvas[c * map.channel_stride + i * map.y_stride + j * map.x_stride] =
                    static_cast<T>(sum.data[c * sum.channel_stride + i * sum.y_stride + j]);
          }
        }
      }
    }
  }
}

}  // namespace mcl::cpu
