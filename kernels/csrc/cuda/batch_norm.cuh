// CUDA kernels of BatchNorm. Launches are elsewhere, and neither torch nor CUDA headers are included, so that tests can
// emulate the kernels on a CPU.
//
// Maps are rows of contiguous channels; VEC channels are read and written as one word of up to 16 bytes. A block
// processes a part of one group's rows and a tile of channels: `lanes` threads lie along the channels, the others along
// the rows. The sums of a part are written to memory, and a second kernel adds parts in a fixed order. There are no
// atomics, so results are bit-identical in every run.
#pragma once

#include <algorithm>
#include <bit>

#include "batch_norm_math.h"
#include "cuda/pack.cuh"

namespace mcl::cuda {

constexpr int kNormThreads = 256;
constexpr int kNormBlocks = 2;      // minimum per multiprocessor
constexpr int kMaxGroups = 64;      // limited by the size of kernel arguments
constexpr int kRowsPerThread = 16;  // minimum, if there are enough rows
constexpr int kBlocksOfSum = 1024;  // approximate maximum; the partial sums of all blocks are added
constexpr int kBlocksOfMap = 8192;  // the same for kernels that add nothing; many waves, so that all end together
constexpr int kFinishLanes = 8;     // channels per block of kernels that add parts; they fill a sector of the cache

struct NormRows {
  int64_t first[kMaxGroups + 1];  // first row of each group, then the number of rows
  int groups, channels, parts, lanes, tiles;

  // The first row, and the number of rows, of a part of a group. A part may be empty.
  __device__ __forceinline__ int64_t begin(int group, int part) const {
    const int64_t rows = first[group + 1] - first[group], step = (rows + parts - 1) / parts;
    return first[group] + min(rows, part * step);
  }
  __device__ __forceinline__ int64_t number(int group, int part) const {
    return begin(group, part + 1) - begin(group, part);
  }
};

// first: groups + 1 entries, as in NormRows. blocks: approximate maximum. The result does not depend on the GPU.
inline NormRows make_rows(const int64_t* first, int groups, int channels, int vector, int blocks) {
  NormRows rows{};
  int64_t longest = 0;
  for (int g = 0; g <= groups; ++g) {
    rows.first[g] = first[g];
    if (g > 0) longest = std::max(longest, first[g] - first[g - 1]);
  }
  const unsigned words = static_cast<unsigned>(channels / vector);
  rows.groups = groups;
  rows.channels = channels;
  rows.lanes = static_cast<int>(std::min(std::bit_ceil(words), 32u));
  rows.tiles = static_cast<int>((words + rows.lanes - 1) / rows.lanes);
  const int64_t per_part = kNormThreads / rows.lanes * kRowsPerThread;
  const int64_t most = std::max(1, blocks / (rows.tiles * groups));
  rows.parts = static_cast<int>(std::clamp<int64_t>((longest + per_part - 1) / per_part, 1, most));
  return rows;
}

// The rows and channels of a thread. Grid: (parts, tiles, groups). Block: kNormThreads.
struct Place {
  int group, lane, slot, slots, channel;
  int64_t begin, end;
  bool active;

  __device__ __forceinline__ Place(const NormRows& rows, int vector)
      : group(blockIdx.z),
        lane(threadIdx.x % rows.lanes),
        slot(threadIdx.x / rows.lanes),
        slots(kNormThreads / rows.lanes),
        channel((blockIdx.y * rows.lanes + lane) * vector),
        begin(rows.begin(group, blockIdx.x)),
        end(rows.begin(group, blockIdx.x + 1)),
        active(channel < rows.channels) {}

  // Calls f(index of the thread's first channel) for each of the thread's rows.
  template <typename F>
  __device__ __forceinline__ void for_each_row(const NormRows& rows, const F& f) const {
#pragma unroll 4
    for (int64_t r = begin + slot; r < end; r += slots) f(r * rows.channels + channel);
  }
};

template <int VEC, typename T>
__device__ __forceinline__ Pack<T, VEC> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, VEC>*>(from);
}

template <int VEC, typename T>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, VEC>& pack) {
  *reinterpret_cast<Pack<T, VEC>*>(to) = pack;
}

// The affine map that normalises the channels of a thread: (x - mean) * scale + shift.
template <typename A, int VEC>
struct Affines {
  A mean[VEC], scale[VEC], shift[VEC];

  __device__ __forceinline__ Affines(const NormRows& rows, const Place& at, const A* statistics, const A* weight,
                                     const A* bias) {
    const A* own = statistics + at.group * (2 * int64_t(rows.channels) + 1) + at.channel;
    for (int v = 0; v < VEC; ++v) {
      mean[v] = own[v];
      scale[v] = own[rows.channels + v] * (weight == nullptr ? A(1) : weight[at.channel + v]);
      shift[v] = bias == nullptr ? A(0) : bias[at.channel + v];
    }
  }
  __device__ __forceinline__ A operator()(A x, int v) const { return (x - mean[v]) * scale[v] + shift[v]; }
};

// Adds each of N values over the slots of the block, in a fixed order. Slot 0 has the results. Block: kNormThreads.
template <typename A, int N>
__device__ __forceinline__ void add_slots(const Place& at, A (&values)[N]) {
  __shared__ A sums[N][kNormThreads];
  for (int i = 0; i < N; ++i) sums[i][threadIdx.x] = values[i];
  __syncthreads();  // all values are written
  for (int half = kNormThreads / 2; half >= kNormThreads / at.slots; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half)
      for (int i = 0; i < N; ++i) sums[i][threadIdx.x] += sums[i][threadIdx.x + half];
    __syncthreads();
  }
  for (int i = 0; i < N; ++i) values[i] = sums[i][threadIdx.x];
}

// Statistics of every part, with the values of batch_norm_stats: partials (parts, groups, 2 channels + 1).
//
// Sums are of distances from the part's first row, so that values far from 0 lose no digits.
template <typename T, typename A, int VEC>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    batch_norm_partials(NormRows rows, const T* __restrict__ x, A* __restrict__ partials) {
  const Place at(rows, VEC);
  A* to = partials + (int64_t(blockIdx.x) * rows.groups + at.group) * (2 * int64_t(rows.channels) + 1);
  const A number = static_cast<A>(at.end - at.begin);
  if (blockIdx.y == 0 && threadIdx.x == 0) to[2 * rows.channels] = number;
  if (at.begin == at.end) return;
  A origin[VEC] = {}, sums[2 * VEC] = {};
  if (at.active) {
    const auto first = load_pack<VEC>(x + at.begin * rows.channels + at.channel);
    for (int v = 0; v < VEC; ++v) origin[v] = static_cast<A>(first.value[v]);
    at.for_each_row(rows, [&](int64_t i) {
      const auto pack = load_pack<VEC>(x + i);
      for (int v = 0; v < VEC; ++v) {
        const A distance = static_cast<A>(pack.value[v]) - origin[v];
        sums[v] += distance;
        sums[VEC + v] += distance * distance;
      }
    });
  }
  add_slots(at, sums);
  if (!at.active || at.slot != 0) return;
  for (int v = 0; v < VEC; ++v) {
    const A shift = sums[v] / number, squares = sums[VEC + v] - sums[v] * shift;
    to[at.channel + v] = origin[v] + shift;
    to[rows.channels + at.channel + v] = squares < A(0) ? A(0) : squares;  // keeps NaN
  }
}

// Adds each of N values over the threads that have the same channel. Block: kNormThreads.
template <int N>
__device__ __forceinline__ void add_finish(double (&values)[N]) {
  __shared__ double sums[N][kNormThreads];
  for (int i = 0; i < N; ++i) sums[i][threadIdx.x] = values[i];
  __syncthreads();  // all sums are written
  for (int i = 0; i < N; ++i) {
    values[i] = 0;
    for (int t = threadIdx.x % kFinishLanes; t < kNormThreads; t += kFinishLanes) values[i] += sums[i][t];
  }
  __syncthreads();  // all values have been read: the next call may write
}

// Combines statistics of parts into those of batch_norm_stats or, if `final`, of batch_norm_combine. Parts are parts of
// a process's rows, or processes. Grid: tiles of kFinishLanes channels. A negative momentum needs a single block, which
// has read `running.batches` for all channels before it updates it.
template <typename A>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    batch_norm_combine(const A* __restrict__ partials, int parts, int groups, int channels, bool final,
                       Running<A> running, double eps, A* __restrict__ statistics) {
  const int slot = threadIdx.x / kFinishLanes, slots = kNormThreads / kFinishLanes;
  const int64_t size = 2 * int64_t(channels) + 1;
  for (int first = blockIdx.x * kFinishLanes; first < channels; first += gridDim.x * kFinishLanes) {
    const int c = first + threadIdx.x % kFinishLanes;
    const bool active = c < channels;
    for (int g = 0; g < groups; ++g) {
      const auto for_each_part = [&](const auto& f) {
        for (int p = slot; active && p < parts; p += slots) {
          const A* part = partials + (int64_t(p) * groups + g) * size;
          const double number = part[2 * channels];
          if (number > 0) f(number, double(part[c]), double(part[channels + c]));
        }
      };
      double sums[2] = {}, squares[1] = {};
      for_each_part([&](double number, double of_part, double) {
        sums[0] += number;
        sums[1] += number * of_part;
      });
      add_finish(sums);
      const double rows = sums[0], mean = sums[1] / rows;
      for_each_part([&](double number, double of_part, double spread) {
        squares[0] += spread + number * (of_part - mean) * (of_part - mean);
      });
      add_finish(squares);
      if (!active || slot != 0) continue;
      A* to = statistics + g * size;
      to[c] = static_cast<A>(mean);
      to[channels + c] = static_cast<A>(final ? 1 / sqrt(squares[0] / rows + eps) : squares[0]);
      if (c == 0) to[2 * channels] = static_cast<A>(rows);
      running.take(g, c, rows, mean, squares[0]);
    }
  }
  __syncthreads();  // all threads have read running.batches
  if (running.batches != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *running.batches += groups;
}

// y = relu(affine(x) + residual); ReLU is optional, and `residual` may be null.
template <typename T, typename A, int VEC>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    batch_norm_apply(NormRows rows, const T* __restrict__ x, const T* __restrict__ residual, const A* statistics,
                     const A* weight, const A* bias, bool relu, T* __restrict__ y) {
  const Place at(rows, VEC);
  if (!at.active) return;
  const Affines<A, VEC> affine(rows, at, statistics, weight, bias);
  at.for_each_row(rows, [&](int64_t i) {
    auto pack = load_pack<VEC>(x + i);
    Pack<T, VEC> added;
    if (residual != nullptr) added = load_pack<VEC>(residual + i);
    for (int v = 0; v < VEC; ++v) {
      A value = affine(static_cast<A>(pack.value[v]), v);
      if (residual != nullptr) value += static_cast<A>(added.value[v]);
      if (relu && value < A(0)) value = A(0);  // keeps NaN
      pack.value[v] = static_cast<T>(value);
    }
    store_pack<VEC>(y + i, pack);
  });
}

// Of every part, the sums of g and of g * (x - mean), g being the gradient of ReLU's input: partials (parts, groups, 2,
// channels). If ReLU's output y is given, it tells which elements are zero, and g is written to `passed`. Otherwise
// they are computed from x again, if `relu`.
template <typename T, typename A, int VEC>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    batch_norm_gradient_partials(NormRows rows, const T* __restrict__ grad, const T* __restrict__ x,
                                 const T* __restrict__ y, const A* statistics, const A* weight, const A* bias,
                                 bool relu, T* __restrict__ passed, A* __restrict__ partials) {
  const Place at(rows, VEC);
  if (at.begin == at.end) return;
  A sums[2 * VEC] = {};
  if (at.active) {
    const Affines<A, VEC> affine(rows, at, statistics, weight, bias);
    at.for_each_row(rows, [&](int64_t i) {
      auto gradient = load_pack<VEC>(grad + i);
      const auto pack = load_pack<VEC>(x + i);
      if (y != nullptr) {
        const auto output = load_pack<VEC>(y + i);
        for (int v = 0; v < VEC; ++v)
          if (static_cast<A>(output.value[v]) <= A(0)) gradient.value[v] = static_cast<T>(0.0f);
        store_pack<VEC>(passed + i, gradient);
      }
      for (int v = 0; v < VEC; ++v) {
        const A value = static_cast<A>(pack.value[v]);
        const bool stopped = relu && affine(value, v) <= A(0);
        const A through = stopped ? A(0) : static_cast<A>(gradient.value[v]);
        sums[v] += through;
        sums[VEC + v] += through * (value - affine.mean[v]);
      }
    });
  }
  add_slots(at, sums);
  if (!at.active || at.slot != 0) return;
  A* to = partials + (int64_t(blockIdx.x) * rows.groups + at.group) * 2 * rows.channels + at.channel;
  for (int v = 0; v < VEC; ++v) {
    to[v] = sums[v];
    to[rows.channels + v] = sums[VEC + v];
  }
}

// Adds parts. sums (2, groups, channels): of g and of g times the normalised x. parameters (2, channels): sums over
// groups, which are the gradients of bias and weight. Grid: tiles of kFinishLanes channels.
template <typename A>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    batch_norm_gradient_sums(NormRows rows, const A* __restrict__ partials, const A* statistics, A* __restrict__ sums,
                             A* __restrict__ parameters) {
  const int slot = threadIdx.x / kFinishLanes, slots = kNormThreads / kFinishLanes;
  const int c = blockIdx.x * kFinishLanes + threadIdx.x % kFinishLanes;
  const bool active = c < rows.channels;
  double of_bias = 0, of_weight = 0;
  for (int g = 0; g < rows.groups; ++g) {
    double added[2] = {};
    for (int p = slot; active && p < rows.parts; p += slots) {
      const A* part = partials + (int64_t(p) * rows.groups + g) * 2 * rows.channels + c;
      if (rows.number(g, p) == 0) continue;
      added[0] += part[0];
      added[1] += part[rows.channels];
    }
    add_finish(added);
    if (!active || slot != 0) continue;
    const double plain = added[0];
    const double weighted = added[1] * statistics[g * (2 * int64_t(rows.channels) + 1) + rows.channels + c];
    sums[int64_t(g) * rows.channels + c] = static_cast<A>(plain);
    sums[int64_t(rows.groups + g) * rows.channels + c] = static_cast<A>(weighted);
    of_bias += plain;
    of_weight += weighted;
  }
  if (!active || slot != 0) return;
  parameters[c] = static_cast<A>(of_bias);
  parameters[rows.channels + c] = static_cast<A>(of_weight);
}

// The gradient of x, from sums over all processes.
template <typename T, typename A, int VEC>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    batch_norm_gradient(NormRows rows, const T* __restrict__ grad, const T* __restrict__ x, const A* statistics,
                        const A* weight, const A* bias, const A* sums, bool relu, T* __restrict__ of_x) {
  const Place at(rows, VEC);
  if (!at.active) return;
  const Affines<A, VEC> affine(rows, at, statistics, weight, bias);
  A slope[VEC], offset[VEC];
  const int64_t size = 2 * int64_t(rows.channels) + 1;
  const A all = statistics[at.group * size + 2 * rows.channels];
  for (int v = 0; v < VEC; ++v) {
    const int64_t c = at.channel + v;
    const A share = affine.scale[v] / all;
    const A inverse = statistics[at.group * size + rows.channels + c];
    slope[v] = -share * inverse * sums[int64_t(rows.groups + at.group) * rows.channels + c];
    offset[v] = -share * sums[int64_t(at.group) * rows.channels + c];
  }
  at.for_each_row(rows, [&](int64_t i) {
    const auto gradient = load_pack<VEC>(grad + i);
    auto pack = load_pack<VEC>(x + i);
    for (int v = 0; v < VEC; ++v) {
      const A value = static_cast<A>(pack.value[v]);
      const bool stopped = relu && affine(value, v) <= A(0);
      const A through = stopped ? A(0) : static_cast<A>(gradient.value[v]);
      pack.value[v] = static_cast<T>(affine.scale[v] * through + (slope[v] * (value - affine.mean[v]) + offset[v]));
    }
    store_pack<VEC>(of_x + i, pack);
  });
}

}  // namespace mcl::cuda
