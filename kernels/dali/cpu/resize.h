// Rescales a window of an image with Pillow's antialiased bilinear filter, clamped to the window.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/vectorize.h"
#include "dali/cells.h"
#include "dali/cpu/rows.h"

namespace mcl::montage::cpu {

struct Image {
  const uint8_t* data;  // height x width x RGB
  int height, width;

  const uint8_t* at(int y, int x) const { return data + (static_cast<size_t>(y) * width + x) * 3; }
};

// Weights of an axis: output i is the sum of of(i)[k] * cell[start[i] + k] over k < count[i].
struct Filter {
  std::vector<int> start, count;

  const uint16_t* of(int i) const { return weights_.data() + static_cast<size_t>(i) * most_; }

  void build(const Cells& cells, int out) {
    most_ = most_cells(cells.last - cells.first, out, cells.halvings);
    start.resize(out);
    count.resize(out);
    weights_.resize(static_cast<size_t>(out) * most_);
    for (int i = 0; i < out; ++i) {
      const Span span = span_of(cells, i, out);
      start[i] = span.low;
      count[i] = span.high - span.low;
      double sum = 0;
      for (int c = span.low; c < span.high; ++c) sum += span.share(cells, c);
      Weights weights(sum);
      uint16_t* weight = weights_.data() + static_cast<size_t>(i) * most_;
      for (int c = span.low; c < span.high; ++c) *weight++ = weights.next(span.share(cells, c));
    }
  }

 private:
  int most_ = 0;  // upper bound of count
  std::vector<uint16_t> weights_;
};

// An image and its smaller copies, which are made on first use.
class Copies {
 public:
  void reset(const Image& image) { sizes_.assign(1, image); }

  Image original() const { return sizes_[0]; }

  // A copy that is 2^halvings times smaller, rounded down. Its pixels are means of whole cells.
  Image smaller(int halvings) {
    while (static_cast<int>(sizes_.size()) <= halvings) {
      const Image from = sizes_.back();
      const int height = from.height / 2, width = from.width / 2;
      const size_t level = sizes_.size() - 1;
      if (memory_.size() <= level) memory_.emplace_back();
      memory_[level].resize(static_cast<size_t>(height) * width * 3);
      means_.resize(static_cast<size_t>(6) * width);
      for (int y = 0; y < height; ++y)
        halve(from.at(2 * y, 0), from.at(2 * y + 1, 0), width, means_.data(),
              memory_[level].data() + static_cast<size_t>(y) * width * 3);
      sizes_.push_back({memory_[level].data(), height, width});
    }
    return sizes_[halvings];
  }

 private:
  std::vector<Image> sizes_;
  std::vector<std::vector<uint8_t>> memory_;
  std::vector<uint8_t> means_;  // scratch of one row

  // Averages two rows to one of `width` pixels. The means of all neighbours are computed, since that vectorizes, and
  // every other one is kept.
  MCL_VECTORIZE static void halve(const uint8_t* __restrict__ a, const uint8_t* __restrict__ b, int width,
                                  uint8_t* __restrict__ means, uint8_t* __restrict__ to) {
    for (int i = 0; i < 6 * width - 3; ++i) means[i] = mean_of(a[i], a[i + 3], b[i], b[i + 3]);
    for (int x = 0; x < width - 1; ++x) std::memcpy(to + 3 * x, means + 6 * x, 4);  // the 4th byte is overwritten next
    std::memcpy(to + 3 * (width - 1), means + 6 * (width - 1), 3);
  }
};

// to[i * to_stride + j] = from[j * from_stride + i] for i < width, j < height.
class Transposer {
 public:
  MCL_VECTORIZE static void run(const uint8_t* from, size_t from_stride, int width, int height, uint8_t* to,
                                size_t to_stride) {
    for (int y = 0; y + kSide <= height; y += kSide)
      for (int x = 0; x + kSide <= width; x += kSide)
        square(from + y * from_stride + x, from_stride, to + x * to_stride + y, to_stride);
    const int whole_x = width / kSide * kSide, whole_y = height / kSide * kSide;
    for (int y = 0; y < height; ++y)
      for (int x = y < whole_y ? whole_x : 0; x < width; ++x) to[x * to_stride + y] = from[y * from_stride + x];
  }

 private:
  static constexpr int kSide = 8;
  using Longs = uint64_t __attribute__((vector_size(16)));
  using Bytes = uint8_t __attribute__((vector_size(16)));
  using Words = uint16_t __attribute__((vector_size(16)));
  using Pairs = uint32_t __attribute__((vector_size(16)));

  // Transposes 8 x 8 bytes, two rows in a vector.
  [[gnu::always_inline]] static inline void square(const uint8_t* from, size_t from_stride, uint8_t* to,
                                                   size_t to_stride) {
    const auto two = [&](int row) {
      uint64_t a, b;
      std::memcpy(&a, from + row * from_stride, kSide);
      std::memcpy(&b, from + (row + 1) * from_stride, kSide);
      const Bytes both = (Bytes)Longs{a, b};
      return (Words)__builtin_shufflevector(both, both, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
    };
    const auto low = [](Words a, Words b) { return (Pairs)__builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); };
    const auto high = [](Words a, Words b) { return (Pairs)__builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15); };
    const Words r01 = two(0), r23 = two(2), r45 = two(4), r67 = two(6);
    const Pairs a = low(r01, r23), b = low(r45, r67), c = high(r01, r23), d = high(r45, r67);
    const Longs columns[4] = {
        (Longs)__builtin_shufflevector(a, b, 0, 4, 1, 5), (Longs)__builtin_shufflevector(a, b, 2, 6, 3, 7),
        (Longs)__builtin_shufflevector(c, d, 0, 4, 1, 5), (Longs)__builtin_shufflevector(c, d, 2, 6, 3, 7)};
    for (int i = 0; i < kSide; ++i) {
      const uint64_t column = columns[i / 2][i % 2];
      std::memcpy(to + i * to_stride, &column, kSide);
    }
  }
};

// Rescales vertically, transposes the result, and rescales vertically again: sums of whole rows vectorize best.
class Resizer {
 public:
  // Writes the window of a recipe as three planes of size x size, flipped if the recipe says so.
  void run(Copies& copies, const Recipe& r, int size, uint8_t* planes) {
    const int n = halvings(r, size);
    const Cells columns{r.x1, r.x2, n}, rows{r.y1, r.y2, n};
    filter_.build(rows, size);
    gather(copies, columns, rows);
    const int bytes = 3 * columns.number();
    const size_t area = static_cast<size_t>(size) * size;
    lowered_.resize(static_cast<size_t>(size) * bytes);
    turned_.resize(lowered_.size());
    sums_.resize(std::max(bytes, size));
    for (int y = 0; y < size; ++y) lower(y, bytes, lowered_.data() + static_cast<size_t>(y) * bytes);
    Transposer::run(lowered_.data(), bytes, bytes, size, turned_.data(), size);
    filter_.build(columns, size);
    rows_.resize(columns.number());
    lowered_.resize(area);
    for (int c = 0; c < 3; ++c) {
      for (int x = 0; x < columns.number(); ++x) rows_[x] = turned_.data() + static_cast<size_t>(3 * x + c) * size;
      for (int x = 0; x < size; ++x)
        lower(x, size, lowered_.data() + static_cast<size_t>(r.flip ? size - 1 - x : x) * size);
      Transposer::run(lowered_.data(), size, size, size, planes + c * area, size);
    }
  }

 private:
  Filter filter_;
  std::vector<const uint8_t*> rows_;       // input of filter_
  std::vector<uint8_t> cut_;               // rows with cells that the window's border cuts
  std::vector<uint8_t> lowered_, turned_;  // the result of a pass, and its transpose
  std::vector<uint16_t> sums_;

  // Finds the rows of the window in the copy. Rows with cells that the window's border cuts are computed from the
  // original image.
  void gather(Copies& copies, const Cells& columns, const Cells& rows) {
    const Image image = copies.original(), copy = copies.smaller(rows.halvings);
    const int width = columns.number(), height = rows.number();
    const int first = columns.whole(0) ? 0 : 1, last = columns.whole(width - 1) ? width : width - 1;
    const bool sides = first > 0 || last < width;
    rows_.resize(height);
    cut_.resize(static_cast<size_t>(3) * width * (sides ? height : 2));
    uint8_t* memory = cut_.data();
    for (int y = 0; y < height; ++y) {
      if (rows.whole(y) && !sides) {
        rows_[y] = copy.at(rows.base() + y, columns.base());
        continue;
      }
      rows_[y] = memory;
      for (int x = 0; x < width; ++x) {
        if (rows.whole(y) && x == first && first < last) {
          std::copy_n(copy.at(rows.base() + y, columns.base() + first), 3 * (last - first), memory + 3 * first);
          x = last - 1;
        } else {
          average(image, columns, rows, x, y, memory + 3 * x);
        }
      }
      memory += 3 * width;
    }
  }

  // The mean of a cell's pixels inside the window.
  static void average(const Image& image, const Cells& columns, const Cells& rows, int x, int y, uint8_t* to) {
    const int number = rows.size(y) * columns.size(x);
    int sum[3] = {number / 2, number / 2, number / 2};
    for (int row = rows.begin(y); row < rows.end(y); ++row)
      for (int column = columns.begin(x); column < columns.end(x); ++column)
        for (int c = 0; c < 3; ++c) sum[c] += image.at(row, column)[c];
    for (int c = 0; c < 3; ++c) to[c] = static_cast<uint8_t>(sum[c] / number);
  }

  // Computes output i of filter_.
  void lower(int i, int width, uint8_t* to) {
    weigh(rows_.data() + filter_.start[i], width, filter_.of(i), filter_.count[i], sums_.data(), to);
  }

  MCL_VECTORIZE static void weigh(const uint8_t* const* rows, int width, const uint16_t* weights, int taps,
                                  uint16_t* __restrict__ sums, uint8_t* __restrict__ to) {
    add_rows([&](int k) { return rows[k]; }, width, weights, taps, kRound + lost(taps), sums);
    for (int x = 0; x < width; ++x) to[x] = to_level(sums[x]);
  }
};

}  // namespace mcl::montage::cpu
