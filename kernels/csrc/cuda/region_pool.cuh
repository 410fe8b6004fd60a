// CUDA kernels of region_pool. Launches are elsewhere, and neither torch nor CUDA headers are included, so that tests
// can emulate the kernels on a CPU.
//
// A thread processes VEC channels. If they are contiguous and aligned (DENSE), they are read and written as one word of
// up to 16 bytes.
#pragma once

#include "cuda/pack.cuh"
#include "region_sampling.h"

namespace mcl::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kBlocks = 2;  // minimum per multiprocessor; with more, the compiler spills registers

template <int VEC, bool DENSE, typename T>
__device__ __forceinline__ Pack<T, VEC> load(const T* from, int64_t channel_stride) {
  if constexpr (DENSE) {
    return *reinterpret_cast<const Pack<T, VEC>*>(from);
  } else {
    Pack<T, VEC> pack;
    for (int v = 0; v < VEC; ++v) pack.value[v] = from[v * channel_stride];
    return pack;
  }
}

template <int VEC, bool DENSE, typename T>
__device__ __forceinline__ void store(T* to, const Pack<T, VEC>& pack, int64_t channel_stride) {
  if constexpr (DENSE) {
    *reinterpret_cast<Pack<T, VEC>*>(to) = pack;
  } else {
    for (int v = 0; v < VEC; ++v) to[v * channel_stride] = pack.value[v];
  }
}

// The bin and the first channel of item `i`. Neighbouring items are neighbours in memory.
struct Item {
  int place, channel;
};

template <int VEC, bool DENSE>
__device__ __forceinline__ Item split(int i, int places, int channels) {
  const int groups = channels / VEC;
  return DENSE ? Item{i / groups, i % groups * VEC} : Item{i % places, i / places * VEC};
}

// Grid: (boxes, any). Block: kThreads. `channels` is a multiple of VEC.
template <typename T, typename A, int VEC, bool DENSE>
__global__ void __launch_bounds__(kThreads, kBlocks)
    region_pool_forward(Maps<const T> maps, const A* boxes, const int64_t* index, int channels, int bins, int ratio,
                        T* out, PooledStrides to) {
  const int64_t r = blockIdx.x;
  const int m = map_of(maps, boxes + 5 * r, index[r]);
  const Map<const T>& map = maps.map[m < 0 ? 0 : m];
  Region<A> region{};
  if (m >= 0) region = make_region(map, boxes + 5 * r, static_cast<int>(r), bins, ratio);
  const bool empty = m < 0 || region.empty();
  const int items = bins * bins * (channels / VEC);
  for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < items; i += gridDim.y * blockDim.x) {
    const Item item = split<VEC, DENSE>(i, bins * bins, channels);
    const int py = item.place / bins, px = item.place % bins;
    T* pooled = out + r * to.box + item.channel * to.channel + py * to.y + px * to.x;
    const T* from = map.data + region.row * map.row_stride + item.channel * map.channel_stride;
    Pack<T, VEC> pack;
    if (!empty && region.copy()) {
      pack = load<VEC, DENSE>(from + (region.y.origin + py) * map.y_stride + (region.x.origin + px) * map.x_stride,
                              map.channel_stride);
    } else {
      A sum[VEC] = {};
      for (int i_y = py * region.y.count; i_y < (py + 1) * region.y.count; ++i_y) {
        Tap<A> y;
        if (empty || !make_tap(region.y.coordinate(i_y), map.height, &y)) continue;
        for (int i_x = px * region.x.count; i_x < (px + 1) * region.x.count; ++i_x) {
          Tap<A> x;
          if (!make_tap(region.x.coordinate(i_x), map.width, &x)) continue;
          for (int corner = 0; corner < 4; ++corner) {
            const bool down = corner / 2, right = corner % 2;
            const A weight = (down ? y.high_weight : y.low_weight) * (right ? x.high_weight : x.low_weight);
            if (weight == A(0)) continue;
            const auto f = load<VEC, DENSE>(
                from + (down ? y.high : y.low) * map.y_stride + (right ? x.high : x.low) * map.x_stride,
                map.channel_stride);
            for (int v = 0; v < VEC; ++v) sum[v] += weight * static_cast<A>(f.value[v]);
          }
        }
      }
      for (int v = 0; v < VEC; ++v) pack.value[v] = static_cast<T>(empty ? A(0) : sum[v] * region.norm());
    }
    store<VEC, DENSE>(pooled, pack, to.channel);
  }
}

// The number of earlier threads of the block that have `mine` set; `total` is the number of all. Block: kThreads.
__device__ __forceinline__ int rank_in_block(bool mine, int* total) {
  __shared__ int warps[kThreads / kWarp];
  const unsigned ballot = __ballot_sync(0xffffffffu, mine);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (lane == 0) warps[warp] = __popc(ballot);
  __syncthreads();
  int before = __popc(ballot & ((1u << lane) - 1u));
  *total = 0;
  for (int w = 0; w < kThreads / kWarp; ++w) {
    if (w < warp) before += warps[w];
    *total += warps[w];
  }
  __syncthreads();
  return before;
}

// Lists the boxes of each canvas in ascending order: canvas k has boxes order[begin[k]] .. order[begin[k + 1] - 1].
// Grid: canvases of all maps. Block: kThreads. `begin` has one entry more than there are canvases.
template <typename T, typename A>
__global__ void __launch_bounds__(kThreads, kBlocks)
    boxes_by_canvas(Maps<T> maps, const A* boxes, const int64_t* index, int number, int* begin, int* order) {
  const int canvas = blockIdx.x;
  int earlier = 0, listed = 0;
  // The first pass counts the boxes of earlier canvases, the second lists the boxes of this one.
  for (int pass = 0; pass < 2; ++pass) {
    for (int first = 0; first < number; first += kThreads) {
      const int r = first + threadIdx.x;
      int k = -1;
      if (r < number) {
        const int m = map_of(maps, boxes + 5 * int64_t(r), index[r]);
        if (m >= 0) k = maps.map[m].first_canvas + static_cast<int>(boxes[5 * int64_t(r)]);
      }
      int total;
      if (pass == 0) {
        rank_in_block(k >= 0 && k < canvas, &total);
        earlier += total;
      } else {
        const int rank = rank_in_block(k == canvas, &total);
        if (k == canvas) order[earlier + listed + rank] = r;
        listed += total;
      }
    }
  }
  if (threadIdx.x == 0) {
    begin[canvas] = earlier;
    if (canvas == static_cast<int>(gridDim.x) - 1) begin[canvas + 1] = earlier + listed;
  }
}

// The range of samples along one axis that can have a weight on a cell; first > last if there are none.
struct Stretch {
  int first, last;
};

template <typename A>
__device__ __forceinline__ Stretch samples_near(const Axis<A>& axis, int bins, int cell, int size) {
  const int samples = bins * axis.count;
  const A extent = axis.bin * bins;
  // The border is repeated for one cell outside the map. In small boxes all samples are tried, since rounding could
  // exclude one.
  if (extent < A(2)) return {0, samples - 1};
  const A low = cell == 0 ? A(-1) : A(cell - 1), high = cell == size - 1 ? A(size) : A(cell + 1);
  const A first = (low - axis.start) / extent * samples - A(1.5),
          last = (high - axis.start) / extent * samples + A(0.5);
  if (!(first < A(samples)) || !(last >= A(0))) return {0, -1};
  return {first > A(0) ? static_cast<int>(first) : 0, last < A(samples - 1) ? static_cast<int>(last) : samples - 1};
}

template <typename A>
__device__ __forceinline__ A weight_on(const Axis<A>& axis, int sample, int cell, int size) {
  Tap<A> tap;
  if (!make_tap(axis.coordinate(sample), size, &tap)) return A(0);
  // At the border both cells are the same, and the second weight is zero.
  return tap.low == cell ? tap.low_weight : tap.high == cell ? tap.high_weight : A(0);
}

// Whether some sample may have a weight on one of the cells `first` to `last`.
template <typename A>
__device__ __forceinline__ bool reaches(const Axis<A>& axis, int bins, int first, int last) {
  return A(last) >= axis.start - A(1) && A(first) <= axis.start + axis.bin * bins + A(1);
}

// Every cell adds the gradients of the boxes that cover it, in ascending order of boxes. There are no atomics, so
// results are bit-identical in every run.
// Grid: (blocks of cells of all canvases, groups of channels). Block: kThreads = cells x groups, `groups` a power of 2.
template <typename T, typename A, int VEC, bool DENSE>
__global__ void __launch_bounds__(kThreads, kBlocks)
    region_pool_backward(const T* grad, PooledStrides from, Maps<T> maps, const A* boxes, const int* begin,
                         const int* order, int channels, int bins, int ratio, int groups) {
  __shared__ Region<A> near[kThreads];
  const int cells_per_block = kThreads / groups;
  // Find the map, the canvas and the cells of this block.
  int m = 0;
  int64_t block = blockIdx.x;
  int64_t per_canvas = 0;
  for (;; ++m) {
    const int64_t cells = int64_t(maps.map[m].height) * maps.map[m].width;
    per_canvas = (cells + cells_per_block - 1) / cells_per_block;
    if (block < per_canvas * maps.map[m].rows) break;
    block -= per_canvas * maps.map[m].rows;
  }
  const Map<T>& map = maps.map[m];
  const int row = static_cast<int>(block / per_canvas);
  const int first = static_cast<int>(block % per_canvas) * cells_per_block;
  const int last = min(first + cells_per_block, map.height * map.width) - 1;
  const int y0 = first / map.width, y1 = last / map.width;
  const int x0 = y0 == y1 ? first % map.width : 0, x1 = y0 == y1 ? last % map.width : map.width - 1;

  const int cell = first + (DENSE ? threadIdx.x / groups : threadIdx.x % cells_per_block);
  const int group = blockIdx.y * groups + (DENSE ? threadIdx.x % groups : threadIdx.x / cells_per_block);
  const bool active = cell <= last && group < channels / VEC;
  const int y = cell / map.width, x = cell % map.width, channel = group * VEC;

  A sum[VEC] = {};
  const int canvas = map.first_canvas + row;
  for (int listed = begin[canvas]; listed < begin[canvas + 1]; listed += kThreads) {
    // Each thread examines one box. Boxes that reach the block's cells are kept, in order.
    Region<A> region{};
    if (listed + static_cast<int>(threadIdx.x) < begin[canvas + 1]) {
      const int r = order[listed + threadIdx.x];
      region = make_region(map, boxes + 5 * int64_t(r), r, bins, ratio);
    }
    const bool keep = !region.empty() && reaches(region.y, bins, y0, y1) && reaches(region.x, bins, x0, x1);
    int kept;
    const int rank = rank_in_block(keep, &kept);
    if (keep) near[rank] = region;
    __syncthreads();
    for (int k = 0; active && k < kept; ++k) {
      const Region<A>& at = near[k];
      const T* g = grad + at.box * from.box + channel * from.channel;
      if (at.copy()) {
        const int py = y - at.y.origin, px = x - at.x.origin;
        if (py < 0 || py >= bins || px < 0 || px >= bins) continue;
        const auto pack = load<VEC, DENSE>(g + py * from.y + px * from.x, from.channel);
        for (int v = 0; v < VEC; ++v) sum[v] += static_cast<A>(pack.value[v]);
        continue;
      }
      const Stretch along_y = samples_near(at.y, bins, y, map.height);
      const Stretch along_x = samples_near(at.x, bins, x, map.width);
      const A norm = at.norm();
      for (int i_y = along_y.first; i_y <= along_y.last; ++i_y) {
        const A weight_y = weight_on(at.y, i_y, y, map.height) * norm;
        if (weight_y == A(0)) continue;
        for (int i_x = along_x.first; i_x <= along_x.last; ++i_x) {
          const A weight = weight_y * weight_on(at.x, i_x, x, map.width);
          if (weight == A(0)) continue;
          const auto pack = load<VEC, DENSE>(g + i_y / at.y.count * from.y + i_x / at.x.count * from.x, from.channel);
          for (int v = 0; v < VEC; ++v) sum[v] += weight * static_cast<A>(pack.value[v]);
        }
      }
    }
    __syncthreads();
  }
  if (!active) return;
  Pack<T, VEC> pack;
  for (int v = 0; v < VEC; ++v) pack.value[v] = static_cast<T>(sum[v]);
  store<VEC, DENSE>(
      map.data + row * map.row_stride + channel * map.channel_stride + y * map.y_stride + x * map.x_stride, pack,
      map.channel_stride);
}

}  // namespace mcl::cuda
