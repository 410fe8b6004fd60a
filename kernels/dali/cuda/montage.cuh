// The tiles of `mcl.montage` on CUDA: kernels only. No launches, no DALI, no headers of CUDA, so that they can be
// emulated.
//
// A block makes one tile, and no block waits for another. While it is made a tile lies in global memory: one of 224
// pixels is 200 KB, more than a multiprocessor can share out. Its pixels are words, red in the lowest byte, so that a
// warp moves whole cache lines; most of them stay in the caches.
#pragma once

#include <cmath>

#include "dali/arithmetic.h"
#include "dali/recipe.h"

namespace mcl::montage::cuda {

constexpr int kThreads = 512;  // of a block at most; fewer will do, in whole warps
constexpr int kBlocks = 2;     // of one multiprocessor at least
constexpr int kStrip = 16;     // rows that are filtered one way, then the other
constexpr int kOperations = 4;

// A tile to make.
struct Job {
  const uint8_t* window;  // first pixel, RGB
  int64_t stride;         // bytes from one row of the image to the next
  Recipe recipe;
  int radius;  // of the blur, pixels; 0: none
  int side;    // pixels of the tile as it is made
  int step;    // every step-th of them is shown, per axis
  int first_place, places;
  int64_t scratch;  // its first word of the scratch memory

  MCL_HOST_DEVICE int width() const { return recipe.x2 - recipe.x1; }
  MCL_HOST_DEVICE int height() const { return recipe.y2 - recipe.y1; }
};

// The scratch memory of a job: where its parts begin, in words, and its size, a multiple of 16 bytes.
struct Scratch {
  int64_t between, tile, blurred, gauss, x, y, words;
};

// Words of a filter from `in` to `out` pixels.
MCL_HOST_DEVICE int64_t filter_words(int in, int out) {
  const int reach = in > out ? (in + out - 1) / out : 1;
  return static_cast<int64_t>(2 * reach + 3) * out;
}

MCL_HOST_DEVICE Scratch scratch_of(const Job& job) {
  const int64_t side = job.side, area = side * side;
  const int64_t rescaled = job.height() > side ? job.width() : 0, blurred = job.radius > 0 ? 4 * side : 0;
  Scratch s{};
  s.tile = kStrip * (rescaled > blurred ? rescaled : blurred);
  s.blurred = s.tile + area;
  s.gauss = s.blurred + (job.radius > 0 ? area : 0);
  s.x = s.gauss + (job.radius > 0 ? 2 * job.radius + 1 : 0);
  s.y = s.x + filter_words(job.width(), job.side);
  s.words = (s.y + filter_words(job.height(), job.side) + 3) / 4 * 4;
  return s;
}

// A filter to `out` pixels: output i takes inputs first(i) .. first(i) + count(i) - 1, the k-th of them times
// weight(i, k). Neighbouring threads read neighbouring weights.
struct Filter {
  int* words;
  int out;

  __device__ __forceinline__ int& first(int i) const { return words[i]; }
  __device__ __forceinline__ int& count(int i) const { return words[out + i]; }
  __device__ __forceinline__ int& weight(int i, int k) const { return words[(k + 2) * out + i]; }

  __device__ __forceinline__ void build(int i, int in) const {
    const Taps taps = taps_of(i, in, out);
    double sum = 0;
    for (int x = taps.first; x < taps.last; ++x) sum += taps.weight(x);
    for (int x = taps.first; x < taps.last; ++x) weight(i, x - taps.first) = fixed_point(taps.weight(x) / sum);
    first(i) = taps.first;
    count(i) = taps.last - taps.first;
  }
};

struct Levels {
  int r, g, b;
};

__device__ __forceinline__ Levels unpack(uint32_t pixel) {
  return {static_cast<int>(pixel & 255), static_cast<int>(pixel >> 8 & 255), static_cast<int>(pixel >> 16 & 255)};
}

__device__ __forceinline__ uint32_t pack(int r, int g, int b) {
  return static_cast<uint32_t>(r) | static_cast<uint32_t>(g) << 8 | static_cast<uint32_t>(b) << 16;
}

// Output i of a filter over pixels that load(x) returns. Weights of thousands of pixels may be rounded to more than 1.
template <typename Load>
__device__ __forceinline__ uint32_t filtered(const Filter& filter, int i, const Load& load) {
  constexpr int half = 1 << (kFilterBits - 1);
  Levels sum{half, half, half};
  const int first = filter.first(i), count = filter.count(i);
  for (int k = 0; k < count; ++k) {
    const int weight = filter.weight(i, k);
    const Levels pixel = load(first + k);
    sum.r += weight * pixel.r;
    sum.g += weight * pixel.g;
    sum.b += weight * pixel.b;
  }
  return pack(min(sum.r >> kFilterBits, 255), min(sum.g >> kFilterBits, 255), min(sum.b >> kFilterBits, 255));
}

// Calls f(y, x) for all pixels, each from one thread of the block; neighbouring threads take neighbours of a row.
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

// Two passes, a strip at a time: row y of `columns` values first(y, column), from which second(y, x, row) makes `side`
// pixels. The block meets before and after the second.
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

// Calls put(y, x, pixel) for all pixels of the window rescaled and flipped, rounded to levels between the two passes.
// Down the columns first where that shrinks, since neighbouring threads read neighbours; otherwise along the rows, as
// Pillow.
template <typename Put>
__device__ __forceinline__ void rescale(const Job& job, const Filter& along, const Filter& down, uint32_t* between,
                                        const Put& put) {
  const int side = job.side;
  const auto read = [&](int y, int x) {
    const uint8_t* pixel = job.window + y * job.stride + 3 * static_cast<int64_t>(x);
    return Levels{pixel[0], pixel[1], pixel[2]};
  };
  const auto across = [&](int x, const auto& load) {
    return filtered(along, job.recipe.flip ? side - 1 - x : x, load);
  };
  if (job.height() > side) {
    const auto lower = [&](int y, int x) { return filtered(down, y, [&](int row) { return read(row, x); }); };
    const auto narrow = [&](int y, int x, const uint32_t* row) {
      put(y, x, across(x, [&](int column) { return unpack(row[column]); }));
    };
    in_two_passes(side, job.width(), between, lower, narrow);
  } else {
    // Few rows enter a pixel, so that filtering them anew for each costs less than meeting.
    for_each_pixel(side, side, [&](int y, int x) {
      put(y, x,
          filtered(down, y, [&](int row) { return unpack(across(x, [&](int column) { return read(row, column); })); }));
    });
  }
}

// Operations from .. to - 1 of the jitter, none of which is contrast; gray after the last.
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

// Place of the first contrast from `i` on, kOperations if there is none.
__device__ __forceinline__ int next_contrast(const Recipe& recipe, int i) {
  while (i < kOperations && recipe.order[i] != kContrast) ++i;
  return i;
}

// Sum over the block, in all threads.
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
  while (contrast < kOperations) {  // needs the mean of all pixels, at every place where the order has it
    const double mean = static_cast<double>(block_sum(grays)) / area;
    const float factor = recipe.factors[kContrast], constant = static_cast<float>(mean) * (1 - factor);
    const int from = contrast + 1;
    contrast = next_contrast(recipe, from);
    grays = 0;
    for (int i = threadIdx.x; i < area; i += blockDim.x)
      put(tile[i], colour(blend(widened(tile[i]), factor, constant), recipe, from, contrast));
  }
}

struct alignas(16) Sums {
  float r, g, b;
};

// sum over k of weights[k] * load(i + k - radius), mirrored at the ends of `side` pixels, on top of `start`.
template <typename Load>
__device__ __forceinline__ Sums blurred(const float* weights, int radius, int i, int side, float start,
                                        const Load& load) {
  Sums sum{start, start, start};
  for (int k = 0; k <= 2 * radius; ++k) {
    const auto pixel = load(reflect(i + k - radius, side));
    sum.r += weights[k] * static_cast<float>(pixel.r);
    sum.g += weights[k] * static_cast<float>(pixel.g);
    sum.b += weights[k] * static_cast<float>(pixel.b);
  }
  return sum;
}

// A Gaussian of `radius` pixels to either side, the sum of all 1.
__device__ __forceinline__ void build_gauss(float* weights, int radius, float sigma) {
  const auto bell = [=](int k) { return std::exp(-0.5f * (k / sigma) * (k / sigma)); };
  for (int i = threadIdx.x; i <= 2 * radius; i += blockDim.x) {
    float total = 0;
    for (int k = -radius; k <= radius; ++k) total += bell(k);
    weights[i] = bell(i - radius) / total;
  }
}

__device__ __forceinline__ void blur(const uint32_t* tile, int side, const float* weights, int radius, Sums* between,
                                     uint32_t* to) {
  const auto down = [&](int y, int x) {
    return blurred(weights, radius, y, side, 0, [&](int row) { return unpack(tile[row * side + x]); });
  };
  const auto along = [&](int y, int x, const Sums* row) {
    const Sums sum = blurred(weights, radius, x, side, 0.5f, [&](int column) { return row[column]; });
    to[y * side + x] = pack(static_cast<int>(sum.r), static_cast<int>(sum.g), static_cast<int>(sum.b));
  };
  in_two_passes(side, side, between, down, along);
}

// Copies what is shown of a tile to its places, in canvases of `canvas` pixels a side.
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

// Makes tile jobs[blockIdx.x] and puts it where it belongs. Grid: jobs. Block: up to kThreads, whole warps.
// `places`: first pixel of each tile slot. `values`: what is written for each of the 256 levels, per channel; the host
// computes them, so that they have the CPU's bits whatever T is.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    make_tiles(const Job* jobs, T* const* places, const T* values, int canvas, uint32_t* scratch) {
  __shared__ Job job;
  __shared__ T table[3 * 256];
  if (threadIdx.x == 0) job = jobs[blockIdx.x];
  for (int i = threadIdx.x; i < 3 * 256; i += blockDim.x) table[i] = values[i];
  __syncthreads();

  uint32_t* memory = scratch + job.scratch;
  const Scratch s = scratch_of(job);
  const Filter along{reinterpret_cast<int*>(memory + s.x), job.side},
      down{reinterpret_cast<int*>(memory + s.y), job.side};
  float* gauss = reinterpret_cast<float*>(memory + s.gauss);
  for (int i = threadIdx.x; i < 2 * job.side; i += blockDim.x) {
    if (i < job.side) {
      along.build(i, job.width());
    } else {
      down.build(i - job.side, job.height());
    }
  }
  if (job.radius > 0) build_gauss(gauss, job.radius, job.recipe.sigma);
  __syncthreads();

  uint32_t* tile = memory + s.tile;
  rescale_and_colour(job, along, down, memory + s.between, tile);
  __syncthreads();
  if (job.radius > 0) {
    blur(tile, job.side, gauss, job.radius, reinterpret_cast<Sums*>(memory + s.between), memory + s.blurred);
    tile = memory + s.blurred;
  }
  place(tile, job, table, places, canvas);
}

}  // namespace mcl::montage::cuda
