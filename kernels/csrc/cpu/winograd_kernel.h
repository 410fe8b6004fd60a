// 3x3 convolutions of stride 1 and padding 1 by minimal filtering: fewer multiplications, free of torch.
//
// Winograd, Arithmetic Complexity of Computations (1980); Lavin and Gray, Fast Algorithms for Convolutional Neural
// Networks (2016). A map is cut into tiles. Both axes of a tile, of a kernel and of the result are transformed;
// between, the convolution is one product of matrices, tiles by channels, per transformed point. The gradient of the
// inputs is the same with the kernel turned round; that of the kernel takes the transforms transposed.
//
// Maps are (n, h, w, c), channels next to each other: what channels_last makes of (n, c, h, w). T is what memory holds
// of them, A what is computed in and what kernels are of. Channels are taken in panels of two vectors.
#pragma once

#include <concepts>
#include <cstdint>
#include <type_traits>

#include "cpu/bfloat16.h"
#include "cpu/vectorize.h"

// Vectors are handed over only to functions that become part of their caller. GCC would warn of it at the end of the
// file, where templates are made.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace mcl::cpu::winograd {

// F(4, 3): four outputs along an axis from six inputs, by six products instead of twelve. The points 0, +-p, +-q and
// infinity, with p and q around 1, round half as much as the usual 0, +-1, +-2: measured, 1.5e-6 of the output's
// standard deviation with 256 channels in fp32.
struct FourOutputs {
  static constexpr int kInputs = 6, kPoints = 6, kOutputs = 4, kPadding = 1;
  static constexpr double p = 0.75, q = 1.5, a = p * p, b = q * q;
  static constexpr double kInput[kPoints][kInputs] = {{a * b, 0, -a - b, 0, 1, 0}, {0, -b * p, -b, p, 1, 0},
                                                      {0, b * p, -b, -p, 1, 0},    {0, -a * q, -a, q, 1, 0},
                                                      {0, a * q, -a, -q, 1, 0},    {0, a * b, 0, -a - b, 0, 1}};
  static constexpr double f = 2 * a * (a - b), g = 2 * b * (b - a);
  static constexpr double kKernel[kPoints][3] = {{1 / (a * b), 0, 0},   {1 / f, p / f, a / f},  {1 / f, -p / f, a / f},
                                                 {1 / g, q / g, b / g}, {1 / g, -q / g, b / g}, {0, 0, 1}};
  static constexpr double kOutput[kOutputs][kPoints] = {
      {1, 1, 1, 1, 1, 0}, {0, p, -p, q, -q, 0}, {0, a, a, b, b, 0}, {0, a * p, -a * p, b * q, -b * q, 1}};
};

// Two cells between padding, the whole of an axis: two outputs of two taps each by three products instead of four.
struct TwoCells {
  static constexpr int kInputs = 2, kPoints = 3, kOutputs = 2, kPadding = 0;
  static constexpr double kInput[kPoints][kInputs] = {{1, 0}, {1, 1}, {0, 1}};
  static constexpr double kKernel[kPoints][3] = {{1, -1, 0}, {0, 1, 0}, {0, -1, 1}};
  static constexpr double kOutput[kOutputs][kPoints] = {{0, 1, 1}, {1, 1, 0}};
};

// One register of AVX-512; compilers cut it up for other instruction sets.
template <typename A>
struct Lanes {
  static constexpr int kCount = 64 / sizeof(A), kPanel = 2 * kCount;
  typedef A Vector __attribute__((vector_size(64), aligned(sizeof(A)), may_alias));
};
template <typename A>
using Vector = typename Lanes<A>::Vector;

// Matrices of points: (points, c / panel, rows, panel).
template <typename A>
struct Points {
  A* data;
  int64_t rows, channels;

  // From one point to the next: a cache line more than there is, or all points of a tile would share a set of a cache.
  static MCL_INLINE int64_t stride(int64_t rows, int64_t channels) { return rows * channels + Lanes<A>::kCount; }
  MCL_INLINE int64_t stride() const { return stride(rows, channels); }

  MCL_INLINE A* at(int64_t point, int64_t row, int64_t channel) const {
    constexpr int panel = Lanes<A>::kPanel;
    return data + point * stride() + (channel / panel * rows + row) * panel + channel % panel;
  }
};

// How many parts of at most so many.
MCL_INLINE int64_t parts(int64_t whole, int64_t most) {
  return (whole + most - 1) / most;
}

template <std::floating_point A>
MCL_INLINE Vector<A> load_vector(const A* from) {
  return *reinterpret_cast<const Vector<A>*>(from);
}

typedef uint16_t Halves __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint32_t Words __attribute__((vector_size(64), aligned(4)));

MCL_INLINE Vector<float> load_vector(const BFloat16* from) {
  return (Vector<float>)(__builtin_convertvector(*reinterpret_cast<const Halves*>(from), Words) << 16);
}

template <std::floating_point A>
MCL_INLINE void store_vector(A* to, Vector<A> value) {
  *reinterpret_cast<Vector<A>*>(to) = value;
}

// As store() of bfloat16.h.
MCL_INLINE void store_vector(BFloat16* to, Vector<float> value) {
  const Words bits = (Words)value;
  const Words rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  *reinterpret_cast<Halves*>(to) = __builtin_convertvector(value == value ? rounded : Words{} + 0x7fc0, Halves);
}

// M x, or M transposed times x, along one axis; its zeros cost nothing.
template <bool kTransposed, int kRows, int kColumns, typename A>
MCL_INLINE void apply(const double (&matrix)[kRows][kColumns], const Vector<A>* x, int step, Vector<A>* y, int y_step) {
#pragma GCC unroll 8
  for (int o = 0; o < (kTransposed ? kColumns : kRows); ++o) {
    Vector<A> sum{};
#pragma GCC unroll 8
    for (int i = 0; i < (kTransposed ? kRows : kColumns); ++i) {
      const double factor = kTransposed ? matrix[i][o] : matrix[o][i];
      if (factor == 1)
        sum += x[i * step];
      else if (factor != 0)
        sum += x[i * step] * static_cast<A>(factor);
    }
    y[o * y_step] = sum;
  }
}

// M x M transposed, or with M transposed: along both axes.
template <bool kTransposed, typename A, int kRows, int kColumns>
MCL_INLINE void transform(const double (&matrix)[kRows][kColumns], const Vector<A>* x, Vector<A>* y) {
  constexpr int from = kTransposed ? kRows : kColumns, to = kTransposed ? kColumns : kRows;
  Vector<A> half[to * from];
#pragma GCC unroll 8
  for (int j = 0; j < from; ++j) apply<kTransposed, kRows, kColumns, A>(matrix, x + j, from, half + j, from);
#pragma GCC unroll 8
  for (int i = 0; i < to; ++i) apply<kTransposed, kRows, kColumns, A>(matrix, half + i * from, 1, y + i * to, 1);
}

struct Maps {
  int64_t height, width, channels;
};

// Where a tile lies: its map's first element, and the first row and column of its outputs.
template <typename F>
struct Tile {
  int64_t start, top, left;

  MCL_INLINE Tile(const Maps& maps, int64_t number) {
    const int64_t across = count(maps.width), all = count(maps.height) * across;
    start = number / all * maps.height * maps.width * maps.channels;
    top = number % all / across * F::kOutputs;
    left = number % across * F::kOutputs;
  }

  static MCL_INLINE int64_t count(int64_t size) { return parts(size, F::kOutputs); }
};

// Tiles that are worked on together.
struct Chunk {
  int64_t first, tiles;
};

// Points of inputs, or of the gradient of outputs, a row per tile; of the chunk's tiles begin to end.
template <typename F, bool kOfOutput, typename T, typename A>
MCL_VECTORIZE void to_points(const T* x, Maps maps, Chunk chunk, int64_t begin, int64_t end, Points<A> points) {
  constexpr int lanes = Lanes<A>::kCount, all = F::kPoints * F::kPoints;
  constexpr int size = kOfOutput ? F::kOutputs : F::kInputs, padding = kOfOutput ? 0 : F::kPadding;
  for (int64_t t = begin; t < end; ++t) {
    const Tile<F> tile(maps, chunk.first + t);
    for (int64_t c = 0; c < maps.channels; c += lanes) {
      Vector<A> in[size * size], out[all];
#pragma GCC unroll 8
      for (int i = 0; i < size; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < size; ++j) {
          const int64_t row = tile.top - padding + i, column = tile.left - padding + j;
          const bool inside = row >= 0 && row < maps.height && column >= 0 && column < maps.width;
          in[i * size + j] =
              inside ? load_vector(x + tile.start + (row * maps.width + column) * maps.channels + c) : Vector<A>{};
        }
      if constexpr (kOfOutput)
        transform<true, A>(F::kOutput, in, out);
      else
        transform<false, A>(F::kInput, in, out);
#pragma GCC unroll 36
      for (int i = 0; i < all; ++i) store_vector(points.at(i, t, c), out[i]);
    }
  }
}

// Outputs from their points, all tiles of a chunk.
template <typename F, typename T, typename A>
MCL_VECTORIZE void from_points(Points<A> points, Maps maps, Chunk chunk, T* y) {
  constexpr int lanes = Lanes<A>::kCount, all = F::kPoints * F::kPoints;
  constexpr int size = F::kOutputs;
  for (int64_t t = 0; t < chunk.tiles; ++t) {
    const Tile<F> tile(maps, chunk.first + t);
    for (int64_t c = 0; c < maps.channels; c += lanes) {
      Vector<A> in[all], out[size * size];
#pragma GCC unroll 36
      for (int i = 0; i < all; ++i) in[i] = load_vector(points.at(i, t, c));
      transform<false, A>(F::kOutput, in, out);
#pragma GCC unroll 4
      for (int i = 0; i < size; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < size; ++j) {
          const int64_t row = tile.top + i, column = tile.left + j;
          if (row < maps.height && column < maps.width)
            store_vector(y + tile.start + (row * maps.width + column) * maps.channels + c, out[i * size + j]);
        }
    }
  }
}

// Points of a weight (outputs, 3, 3, inputs), a row per input, one panel of outputs; with kAdjoint of the convolution
// that makes gradients of inputs from those of outputs, a row per output, one panel of inputs.
template <typename F, bool kAdjoint, typename A>
MCL_VECTORIZE void to_kernel(const A* weight, int64_t inputs, int64_t number, Points<A> points) {
  constexpr int lanes = Lanes<A>::kCount, panel = Lanes<A>::kPanel, all = F::kPoints * F::kPoints;
  // Whole cache lines of the weight, whichever way it is read.
  for (int64_t first = 0; first < points.rows; first += lanes)
    for (int64_t c = number * panel; c < (number + 1) * panel; c += lanes) {
      Vector<A> taps[lanes][9], out[all];
      for (int i = 0; i < lanes; ++i)
        for (int tap = 0; tap < 9; ++tap) {
          if constexpr (kAdjoint) {
            taps[i][8 - tap] = load_vector(weight + ((first + i) * 9 + tap) * inputs + c);
          } else {
            const Vector<A> column = load_vector(weight + ((c + i) * 9 + tap) * inputs + first);
            for (int j = 0; j < lanes; ++j) taps[j][tap][i] = column[j];
          }
        }
      for (int i = 0; i < lanes; ++i) {
        transform<false, A>(F::kKernel, taps[i], out);
#pragma GCC unroll 36
        for (int j = 0; j < all; ++j) store_vector(points.at(j, first + i, c), out[j]);
      }
    }
}

// Gradient of the weight from that of its points, one panel.
template <typename F, typename A>
MCL_VECTORIZE void from_kernel(Points<A> points, int64_t number, A* weight) {
  constexpr int lanes = Lanes<A>::kCount, panel = Lanes<A>::kPanel, all = F::kPoints * F::kPoints;
  const int64_t inputs = points.rows;
  for (int64_t first = 0; first < inputs; first += lanes)
    for (int64_t c = number * panel; c < (number + 1) * panel; c += lanes) {
      Vector<A> in[all], taps[lanes][9];
      for (int i = 0; i < lanes; ++i) {
#pragma GCC unroll 36
        for (int j = 0; j < all; ++j) in[j] = load_vector(points.at(j, first + i, c));
        transform<true, A>(F::kKernel, in, taps[i]);
      }
      for (int i = 0; i < lanes; ++i)
        for (int tap = 0; tap < 9; ++tap) {
          Vector<A> column;
          for (int j = 0; j < lanes; ++j) column[j] = taps[j][tap][i];
          store_vector(weight + ((c + i) * 9 + tap) * inputs + first, column);
        }
    }
}

// The left factor of a product: element (m, k) of block q is a[m * row + k * column + q * block].
template <typename A>
struct Left {
  const A* a;
  int64_t row, column, block;
};

// to (kRows, panel) = left (kRows, blocks * depth) times right (blocks * depth, panel), or added to what is there. The
// sums stay in registers: 24 of the 32 that AVX-512 has.
template <int kRows, typename A>
MCL_INLINE void few_rows(const Left<A>& left, int64_t blocks, int64_t depth, const A* right, bool add, A* to) {
  constexpr int lanes = Lanes<A>::kCount, panel = Lanes<A>::kPanel;
  Vector<A> low[kRows], high[kRows];
#pragma GCC unroll 12
  for (int m = 0; m < kRows; ++m) low[m] = high[m] = Vector<A>{};
  for (int64_t q = 0; q < blocks; ++q) {
    const A* a = left.a + q * left.block;
    for (int64_t k = 0; k < depth; ++k, a += left.column, right += panel) {
      const Vector<A> first = load_vector(right), second = load_vector(right + lanes);
#pragma GCC unroll 12
      for (int m = 0; m < kRows; ++m) {
        low[m] += a[m * left.row] * first;
        high[m] += a[m * left.row] * second;
      }
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < kRows; ++m) {
    A* out = to + m * panel;
    store_vector(out, add ? load_vector(out) + low[m] : low[m]);
    store_vector(out + lanes, add ? load_vector(out + lanes) + high[m] : high[m]);
  }
}

constexpr int64_t kMostRows = 12;  // of few_rows

// As few_rows, of any number of rows: cut into equal parts, for a rest of one or two would take as long as eight.
template <typename A>
MCL_VECTORIZE void product(Left<A> left, int64_t rows, int64_t blocks, int64_t depth, const A* right, bool add, A* to) {
  const int64_t pieces = parts(rows, kMostRows);
  for (int64_t i = 0; i < pieces; ++i) {
    const int64_t m = rows * i / pieces, count = rows * (i + 1) / pieces - m;
    const Left<A> part{left.a + m * left.row, left.row, left.column, left.block};
    A* out = to + m * Lanes<A>::kPanel;
    switch (count) {
      case 1:
        few_rows<1>(part, blocks, depth, right, add, out);
        break;
      case 2:
        few_rows<2>(part, blocks, depth, right, add, out);
        break;
      case 3:
        few_rows<3>(part, blocks, depth, right, add, out);
        break;
      case 4:
        few_rows<4>(part, blocks, depth, right, add, out);
        break;
      case 5:
        few_rows<5>(part, blocks, depth, right, add, out);
        break;
      case 6:
        few_rows<6>(part, blocks, depth, right, add, out);
        break;
      case 7:
        few_rows<7>(part, blocks, depth, right, add, out);
        break;
      case 8:
        few_rows<8>(part, blocks, depth, right, add, out);
        break;
      case 9:
        few_rows<9>(part, blocks, depth, right, add, out);
        break;
      case 10:
        few_rows<10>(part, blocks, depth, right, add, out);
        break;
      case 11:
        few_rows<11>(part, blocks, depth, right, add, out);
        break;
      default:
        few_rows<12>(part, blocks, depth, right, add, out);
    }
  }
}

}  // namespace mcl::cpu::winograd
