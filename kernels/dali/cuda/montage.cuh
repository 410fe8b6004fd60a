// CUDA kernels of `mcl.montage`. Launches are elsewhere, and neither DALI nor CUDA headers are included, so that tests
// can emulate the kernels on a CPU.
//
// A block makes one tile, independently of other blocks. Intermediate results are in global memory: a tile of 224
// pixels takes 200 KB, too much for shared memory. Its pixels are 32-bit words with red in the lowest byte, so that a
// warp reads and writes whole cache lines; most of them stay in the caches.
#pragma once

#include <cmath>

#include "dali/arithmetic.h"
#include "dali/cells.h"

namespace mcl::montage::cuda {

constexpr int kThreads = 384;  // maximum per block; any number of whole warps works
constexpr int kBlocks = 2;     // minimum per multiprocessor
constexpr int kStrip = 16;     // rows that are filtered vertically, then horizontally
constexpr int kOperations = 4;

// An image, RGB.
struct Image {
  const uint8_t* data;
  int height, width;

  MCL_HOST_DEVICE const uint8_t* at(int y, int x) const { return data + (static_cast<int64_t>(y) * width + x) * 3; }
};

// A tile to make.
struct Job {
  int source;         // number of its image in the batch
  Image image, copy;  // the copy is 2^halvings times smaller, rounded down
  int halvings;
  Recipe recipe;
  int radius;            // of the blur, in pixels; 0 for none
  int64_t first_weight;  // of the blur, in the table of all blurs' weights
  int side;              // of the tile when it is made, in pixels
  int step;              // every step-th pixel of each axis is shown
  int first_place, places;
  int64_t scratch;  // its first word of the scratch memory

  MCL_HOST_DEVICE Cells columns() const { return {recipe.x1, recipe.x2, halvings}; }
  MCL_HOST_DEVICE Cells rows() const { return {recipe.y1, recipe.y2, halvings}; }
};

// The scratch memory of a job: offsets of its parts and its size, in words. The size is a multiple of 16 bytes.
struct Scratch {
  int64_t between, tile, blurred, x, y, words;
};

// Size of a filter from these cells to `out` pixels, in words.
MCL_HOST_DEVICE int64_t filter_words(const Cells& cells, int out) {
  return static_cast<int64_t>(most_cells(cells.last - cells.first, out, cells.halvings) + 2) * out;
}

MCL_HOST_DEVICE Scratch scratch_of(const Job& job) {
  const int64_t side = job.side, area = side * side;
  const int64_t rescaled = job.columns().number(), blurred = job.radius > 0 ? 2 * side : 0;
  Scratch s{};
  s.tile = kStrip * larger(rescaled, blurred);
  s.blurred = s.tile + area;
  s.x = s.blurred + (job.radius > 0 ? area : 0);
  s.y = s.x + filter_words(job.columns(), job.side);
  s.words = (s.y + filter_words(job.rows(), job.side) + 3) / 4 * 4;
  return s;
}

// A filter to `out` pixels: output i is the sum of weight(i, k) * cell[first(i) + k] over k < count(i). Neighbouring
// threads read neighbouring weights.
struct Filter {
  uint32_t* words;
  int out;

  __device__ __forceinline__ uint32_t& first(int i) const { return words[i]; }
  __device__ __forceinline__ uint32_t& count(int i) const { return words[out + i]; }
  __device__ __forceinline__ uint32_t& weight(int i, int k) const { return words[(k + 2) * out + i]; }

  __device__ __forceinline__ void build(int i, const Cells& cells) const {
    const Span span = span_of(cells, i, out);
    double sum = 0;
    for (int c = span.low; c < span.high; ++c) sum += span.share(cells, c);
    Weights weights(sum);
    for (int c = span.low; c < span.high; ++c) weight(i, c - span.low) = weights.next(span.share(cells, c));
    first(i) = span.low;
    count(i) = span.high - span.low;
  }
};

struct Levels {
  uint8_t r, g, b;
};

__device__ __forceinline__ Levels unpack(uint32_t pixel) {
  return {static_cast<uint8_t>(pixel), static_cast<uint8_t>(pixel >> 8), static_cast<uint8_t>(pixel >> 16)};
}

__device__ __forceinline__ uint32_t pack(uint32_t r, uint32_t g, uint32_t b) {
  return r | g << 8 | b << 16;
}

// Weighted sums of channels, in units of 1/256 level.
struct alignas(8) Sums {
  uint16_t r, g, b;

  template <typename Pixel>
  __device__ __forceinline__ void add(const Pixel& pixel, uint16_t weight) {
    r += weighed(pixel.r, weight);
    g += weighed(pixel.g, weight);
    b += weighed(pixel.b, weight);
  }
  __device__ __forceinline__ uint32_t levels() const { return pack(to_level(r), to_level(g), to_level(b)); }
};

// Output i of a filter; load(x) returns cell x.
template <typename Load>
__device__ __forceinline__ uint32_t filtered(const Filter& filter, int i, const Load& load) {
  const int first = filter.first(i), count = filter.count(i);
  const uint16_t start = kRound + lost(count);
  Sums sum{start, start, start};
  for (int k = 0; k < count; ++k) sum.add(load(first + k), static_cast<uint16_t>(filter.weight(i, k)));
  return sum.levels();
}

// Calls f(y, x) for all pixels, each in one thread of the block. Neighbouring threads take neighbours of a row.
template <typename F>
__device__ __forceinline__ void for_each_pixel(int rows, int columns, const F& f) {
  const int threads = static_cast<int>(blockDim.x), t = static_cast<int>(threadIdx.x);
  const int down = threads / columns, right = threads % columns;
  int y = t / columns, x = t % columns;
  while (y < rows) {
    f(y, x);
    y += down;
    x += right;
    if (x >= columns) {
      x -= columns;
      ++y;
    }
  }
}

// Two passes, one strip at a time. The first stores `columns` values first(y, column) of each row; the second calls
// second(y, x, row) for `side` pixels of each row. The block synchronises after each pass.
template <typename Value, typename First, typename Second>
__device__ __forceinline__ void in_two_passes(int side, int columns, Value* between, const First& first,
                                              const Second& second) {
  for (int top = 0; top < side; top += kStrip) {
    const int rows = min(kStrip, side - top);
    for_each_pixel(rows, columns, [&](int y, int x) { between[y * columns + x] = first(top + y, x); });
    __syncthreads();
    for_each_pixel(rows, side, [&](int y, int x) { second(top + y, x, between + y * columns); });
    __syncthreads();
  }
}

// A cell of the window: a pixel of the copy or, where the border cuts the cell, the mean of its pixels in the window.
__device__ __forceinline__ Levels cell(const Job& job, const Cells& columns, const Cells& rows, int y, int x) {
  if (columns.whole(x) && rows.whole(y)) {
    const uint8_t* pixel = job.copy.at(rows.base() + y, columns.base() + x);
    return {pixel[0], pixel[1], pixel[2]};
  }
  const int number = rows.size(y) * columns.size(x);
  int r = number / 2, g = r, b = r;
  for (int row = rows.begin(y); row < rows.end(y); ++row) {
    for (int column = columns.begin(x); column < columns.end(x); ++column) {
      const uint8_t* pixel = job.image.at(row, column);
      r += pixel[0];
      g += pixel[1];
      b += pixel[2];
    }
  }
  return {static_cast<uint8_t>(r / number), static_cast<uint8_t>(g / number), static_cast<uint8_t>(b / number)};
}

// Calls put(y, x, pixel) for all pixels of the rescaled and flipped window. The vertical pass is first, as on the CPU,
// since pixels are rounded between the passes.
template <typename Put>
__device__ __forceinline__ void rescale(const Job& job, const Filter& along, const Filter& down, uint32_t* between,
                                        const Put& put) {
  const int side = job.side;
  const Cells columns = job.columns(), rows = job.rows();
  const auto lower = [&](int y, int x) {
    return filtered(down, y, [&](int row) { return cell(job, columns, rows, row, x); });
  };
  const auto narrow = [&](int y, int x, const uint32_t* row) {
    const int output = job.recipe.flip ? side - 1 - x : x;
    put(y, x, filtered(along, output, [&](int column) { return unpack(row[column]); }));
  };
  in_two_passes(side, columns.number(), between, lower, narrow);
}

// Applies operations from .. to - 1 of the jitter, none of which is contrast, and grayscale after the last operation.
__device__ __forceinline__ Rgb colour(Rgb c, const Recipe& recipe, int from, int to) {
  for (int i = from; i < to; ++i) {
    const int operation = recipe.order[i];
    if (operation == kBrightness) {
      c = blend(c, recipe.factors[kBrightness], 0);
    } else if (operation == kSaturation) {
      c = saturate(c, recipe.factors[kSaturation]);
    } else if (operation == kHue) {
      c = turn_hue(c, recipe.factors[kHue]);
    }
  }
  return to == kOperations && recipe.gray ? saturate(c, 0) : c;
}

// Position of the first contrast at or after `i` in the order of operations; kOperations if there is none.
__device__ __forceinline__ int next_contrast(const Recipe& recipe, int i) {
  while (i < kOperations && recipe.order[i] != kContrast) ++i;
  return i;
}

// The sum over the block, returned to all threads.
__device__ __forceinline__ int64_t block_sum(int64_t x) {
  __shared__ int64_t sums[kThreads / 32];
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_down_sync(0xffffffffu, x, distance);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  int64_t total = 0;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) total += sums[w];
  __syncthreads();
  return total;
}

__device__ __forceinline__ void rescale_and_colour(const Job& job, const Filter& along, const Filter& down,
                                                   uint32_t* between, uint32_t* tile) {
  const Recipe& recipe = job.recipe;
  int64_t grays = 0;
  const auto put = [&](uint32_t& pixel, Rgb c) {
    grays += static_cast<int>(gray(c));
    pixel = pack(static_cast<int>(c.r), static_cast<int>(c.g), static_cast<int>(c.b));
  };
  const auto widened = [](uint32_t pixel) {
    const Levels p = unpack(pixel);
    return Rgb{static_cast<float>(p.r), static_cast<float>(p.g), static_cast<float>(p.b)};
  };
  int contrast = next_contrast(recipe, 0);
  rescale(job, along, down, between, [&](int y, int x, uint32_t pixel) {
    put(tile[y * job.side + x], colour(widened(pixel), recipe, 0, contrast));
  });
  const int area = job.side * job.side;
  while (contrast < kOperations) {  // contrast needs the mean of all pixels
    const double mean = static_cast<double>(block_sum(grays)) / area;
    const float factor = recipe.factors[kContrast], constant = static_cast<float>(mean) * (1 - factor);
    const int from = contrast + 1;
    contrast = next_contrast(recipe, from);
    grays = 0;
    for (int i = threadIdx.x; i < area; i += blockDim.x)
      put(tile[i], colour(blend(widened(tile[i]), factor, constant), recipe, from, contrast));
  }
}

// start + sum over k of weights[k] * load(i + k - radius), with reflection padding of `side` pixels.
template <typename Load>
__device__ __forceinline__ Sums blurred(const uint16_t* weights, int radius, int i, int side, uint16_t start,
                                        const Load& load) {
  Sums sum{start, start, start};
  for (int k = 0; k <= 2 * radius; ++k) sum.add(load(reflect(i + k - radius, side)), static_cast<uint16_t>(weights[k]));
  return sum;
}

__device__ __forceinline__ void blur(const uint32_t* tile, int side, const uint16_t* weights, int radius, Sums* between,
                                     uint32_t* to) {
  const uint16_t start = lost(2 * radius + 1);
  const auto down = [&](int y, int x) {
    return blurred(weights, radius, y, side, start, [&](int row) { return unpack(tile[row * side + x]); });
  };
  const auto along = [&](int y, int x, const Sums* row) {
    const auto load = [&](int column) { return row[column]; };
    to[y * side + x] = blurred(weights, radius, x, side, kRound + start, load).levels();
  };
  in_two_passes(side, side, between, down, along);
}

// Copies the shown pixels of a tile to its slots, on canvases of `canvas` pixels a side.
template <typename T>
__device__ __forceinline__ void place(const uint32_t* tile, const Job& job, const T* values, T* const* places,
                                      int canvas) {
  const int shown = job.side / job.step;
  for_each_pixel(shown, 3 * shown, [&](int y, int i) {
    const int x = i / 3, channel = i % 3;
    int level = static_cast<int>(tile[(y * job.side + x) * job.step] >> (8 * channel) & 255);
    if (job.recipe.solarize && level >= 128) level = 255 - level;
    for (int p = 0; p < job.places; ++p)
      places[job.first_place + p][static_cast<int64_t>(y) * canvas * 3 + i] = values[channel * 256 + level];
  });
}

// An image and the memory for its copy of half the size, rounded down.
struct Halving {
  Image from;
  uint8_t* to;
};

// Makes the copy of halvings[blockIdx.y]; blocks along x share its pixels. Grid: (any, halvings).
__global__ void halve(const Halving* halvings) {
  const Halving job = halvings[blockIdx.y];
  const int64_t width = job.from.width / 2, values = 3 * width * (job.from.height / 2);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < values; i += stride) {
    const int64_t pixel = i / 3;
    const uint8_t* a = job.from.at(static_cast<int>(pixel / width) * 2, static_cast<int>(pixel % width) * 2) + i % 3;
    const uint8_t* b = a + 3 * static_cast<int64_t>(job.from.width);
    job.to[i] = mean_of(a[0], a[3], b[0], b[3]);
  }
}

// Makes tile jobs[blockIdx.x] and copies it to its slots. Grid: jobs. Block: up to kThreads, whole warps.
// `places`: address of the first pixel of each tile slot. `weights`: of all blurs. `values`: output value of each of
// the 256 levels, per channel; the host computes them, so that outputs of CPU and GPU are bit-identical for every T.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    make_tiles(const Job* jobs, T* const* places, const T* values, const uint16_t* weights, int canvas,
               uint32_t* scratch) {
  __shared__ Job job;
  __shared__ T table[3 * 256];
  if (threadIdx.x == 0) job = jobs[blockIdx.x];
  for (int i = threadIdx.x; i < 3 * 256; i += blockDim.x) table[i] = values[i];
  __syncthreads();

  uint32_t* memory = scratch + job.scratch;
  const Scratch s = scratch_of(job);
  const Filter along{memory + s.x, job.side}, down{memory + s.y, job.side};
  for (int i = threadIdx.x; i < 2 * job.side; i += blockDim.x) {
    if (i < job.side) {
      along.build(i, job.columns());
    } else {
      down.build(i - job.side, job.rows());
    }
  }
  __syncthreads();

  uint32_t* tile = memory + s.tile;
  rescale_and_colour(job, along, down, memory + s.between, tile);
  __syncthreads();
  if (job.radius > 0) {
    blur(tile, job.side, weights + job.first_weight, job.radius, reinterpret_cast<Sums*>(memory + s.between),
         memory + s.blurred);
    tile = memory + s.blurred;
  }
  place(tile, job, table, places, canvas);
}

}  // namespace mcl::montage::cuda
