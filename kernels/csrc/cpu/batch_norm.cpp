#include "batch_norm.h"

#include <algorithm>
#include <cmath>

#include "cpu/batch_norm_kernel.h"
#include "cpu/chunks.h"

namespace mcl {
namespace {

using namespace cpu;

constexpr int64_t kChunk = 1 << 14;  // elements of a chunk, which is read twice and fits a core's cache
constexpr int64_t kRows = 512;       // rows of a chunk, which is summed in fp32; chunks are added in fp64

// Rows of one group. Chunks do not depend on the number of threads, so sums do not either.
struct Chunk {
  int64_t group, row, rows;
};

std::vector<Chunk> chunks_of(const Rows& all) {
  std::vector<Chunk> chunks;
  const int64_t step = std::clamp<int64_t>(kChunk / std::max<int64_t>(1, all.channels), 1, kRows);
  for (int64_t g = 0; g < all.groups(); ++g)
    for (int64_t row = all.first[g]; row < all.first[g + 1]; row += step)
      chunks.push_back({g, row, std::min(step, all.first[g + 1] - row)});
  return chunks;
}

// Of one channel: number of rows, mean, and sum of squared distances from the mean.
struct Moments {
  double rows = 0, mean = 0, squares = 0;

  // Merges the moments of other rows (Chan, Golub and LeVeque).
  void add(double other_rows, double other_mean, double other_squares) {
    if (other_rows == 0) return;
    const double all = rows + other_rows, distance = other_mean - mean, share = other_rows / all;
    mean += distance * share;
    squares += other_squares + distance * distance * rows * share;
    rows = all;
  }
};

// Mean, scale (weight / standard deviation) and shift (bias), (groups, C) each. They are stored in a tensor because its
// memory starts at a cache line: with vectors that cross cache lines, kernels took up to 50% longer.
template <typename A>
struct Affines {
  int64_t channels, size;
  const A* statistics;
  Tensor memory;  // holds the following arrays
  A *mean, *scale, *shift;

  Affines(const Rows& all, const Tensor& statistics_, const std::optional<Tensor>& weight,
          const std::optional<Tensor>& bias)
      : channels(all.channels),
        size(all.statistics()),
        statistics(read<A>(statistics_)),
        memory(empty_small(statistics_, {3, all.groups(), channels})),
        mean(write<A>(memory)),
        scale(mean + all.groups() * channels),
        shift(scale + all.groups() * channels) {
    for (int64_t i = 0; i < all.groups() * channels; ++i) {
      const int64_t c = i % channels;
      mean[i] = statistics[i / channels * size + c];
      scale[i] = inverse(i / channels)[c] * (weight ? read<A>(*weight)[c] : A(1));
      shift[i] = bias ? read<A>(*bias)[c] : A(0);
    }
  }

  const A* inverse(int64_t group) const { return statistics + group * size + channels; }
  A rows(int64_t group) const { return statistics[group * size + 2 * channels]; }
  Affine<A> of(int64_t group) const {
    const int64_t at = group * channels;
    return {mean + at, scale + at, shift + at};
  }
};

Tensor batch_norm_stats(Tensor x, Counts counts) {
  const Rows all(x, counts);
  const std::vector<Chunk> chunks = chunks_of(all);
  const int64_t channels = all.channels, size = all.statistics();
  Tensor statistics = empty_small(x, {1, all.groups(), size});
  const Tensor of_chunks = empty_small(x, {2, static_cast<int64_t>(chunks.size()), channels});
  dispatch_types(x, [&](auto stored, auto computed) {
    using T = decltype(stored);
    using A = decltype(computed);
    A *means = write<A>(of_chunks), *squares = means + chunks.size() * channels;
    for_each_chunk(chunks, [&](int64_t i, const Chunk& chunk) {
      moments(read<T>(x) + chunk.row * channels, chunk.rows, channels, means + i * channels, squares + i * channels);
    });
    std::vector<Moments> sums(all.groups() * channels);
    for (size_t i = 0; i < chunks.size(); ++i)
      for (int64_t c = 0; c < channels; ++c)
        sums[chunks[i].group * channels + c].add(static_cast<double>(chunks[i].rows), means[i * channels + c],
                                                 squares[i * channels + c]);
    for (int64_t g = 0; g < all.groups(); ++g) {
      A* to = write<A>(statistics) + g * size;
      for (int64_t c = 0; c < channels; ++c) {
        to[c] = static_cast<A>(sums[g * channels + c].mean);
        to[channels + c] = static_cast<A>(sums[g * channels + c].squares);
      }
      to[2 * channels] = static_cast<A>(all.first[g + 1] - all.first[g]);
    }
  });
  return statistics;
}

Tensor batch_norm_combine(Tensor parts, std::optional<Tensor> running_mean, std::optional<Tensor> running_var,
                          std::optional<Tensor> batches, std::optional<double> momentum, double eps) {
  check_combine(parts, momentum, running_mean, running_var, batches);
  const int64_t processes = parts.size(0), groups = parts.size(1), size = parts.size(2), channels = size / 2;
  Tensor statistics = empty_small(parts, {groups, size});
  dispatch_types(parts, [&](auto, auto computed) {
    using A = decltype(computed);
    const Running<A> running = make_running<A>(running_mean, running_var, batches, momentum);
    for (int64_t g = 0; g < groups; ++g) {
      A* to = write<A>(statistics) + g * size;
      double rows = 0;
      for (int64_t p = 0; p < processes; ++p) rows += read<A>(parts)[(p * groups + g) * size + 2 * channels];
      for (int64_t c = 0; c < channels; ++c) {
        Moments sum;
        for (int64_t p = 0; p < processes; ++p) {
          const A* part = read<A>(parts) + (p * groups + g) * size;
          sum.add(part[2 * channels], part[c], part[channels + c]);
        }
        to[c] = static_cast<A>(sum.mean);
        to[channels + c] = static_cast<A>(1 / std::sqrt(sum.squares / rows + eps));
        running.take(g, c, rows, sum.mean, sum.squares);
      }
      to[2 * channels] = static_cast<A>(rows);
    }
    if (running.batches != nullptr) *running.batches += groups;
  });
  return statistics;
}

Tensor batch_norm_stats_alone(Tensor x, Counts counts, std::optional<Tensor> running_mean,
                              std::optional<Tensor> running_var, std::optional<Tensor> batches,
                              std::optional<double> momentum, double eps) {
  return batch_norm_combine(batch_norm_stats(x, counts), running_mean, running_var, batches, momentum, eps);
}

Tensor batch_norm_apply(Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias, Tensor statistics,
                        Counts counts, std::optional<Tensor> residual, bool relu) {
  const Rows all(x, counts);
  check_apply(all, x, weight, bias, statistics);
  if (residual) check_like(*residual, x, "residual");
  Tensor y = torch::stable::empty_like(x);
  dispatch_types(x, [&](auto stored, auto computed) {
    using T = decltype(stored);
    const Affines<decltype(computed)> affines(all, statistics, weight, bias);
    dispatch_conditions(residual.has_value(), relu, [&](auto with_residual, auto with_relu) {
      for_each_chunk(chunks_of(all), [&](int64_t, const Chunk& chunk) {
        const int64_t at = chunk.row * all.channels;
        const T* added = residual ? read<T>(*residual) + at : nullptr;
        normalize<with_residual.value, with_relu.value>(read<T>(x) + at, added, chunk.rows, all.channels,
                                                        affines.of(chunk.group), write<T>(y) + at);
      });
    });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward_reduce(Tensor grad, Tensor x, std::optional<Tensor> y,
                                                              std::optional<Tensor> weight, std::optional<Tensor> bias,
                                                              Tensor statistics, Counts counts, bool relu) {
  const Rows all(x, counts);
  check_apply(all, x, weight, bias, statistics);
  check_like(grad, x, "grad");
  if (y) check_like(*y, x, "y");
  const std::vector<Chunk> chunks = chunks_of(all);
  const int64_t channels = all.channels, groups = all.groups();
  Tensor sums = empty_small(x, {2, groups, channels}), parameters = empty_small(x, {2, channels});
  Tensor passed = y ? torch::stable::empty_like(x) : empty_small(x, {0});
  const Tensor of_chunks = empty_small(x, {2, static_cast<int64_t>(chunks.size()), channels});
  dispatch_types(x, [&](auto stored, auto computed) {
    using T = decltype(stored);
    using A = decltype(computed);
    const Affines<A> affines(all, statistics, weight, bias);
    A *plain = write<A>(of_chunks), *weighted = plain + chunks.size() * channels;
    dispatch_conditions(y.has_value(), relu || y, [&](auto with_y, auto with_relu) {
      for_each_chunk(chunks, [&](int64_t i, const Chunk& chunk) {
        const int64_t at = chunk.row * channels;
        gradient_sums<with_y.value, with_relu.value>(read<T>(grad) + at, read<T>(x) + at,
                                                     y ? read<T>(*y) + at : nullptr, chunk.rows, channels,
                                                     affines.of(chunk.group), plain + i * channels,
                                                     weighted + i * channels, y ? write<T>(passed) + at : nullptr);
      });
    });
    std::vector<double> sum(2 * groups * channels), total(2 * channels);
    double* product = sum.data() + groups * channels;
    for (size_t i = 0; i < chunks.size(); ++i)
      for (int64_t c = 0; c < channels; ++c) {
        sum[chunks[i].group * channels + c] += plain[i * channels + c];
        product[chunks[i].group * channels + c] += weighted[i * channels + c];
      }
    for (int64_t i = 0; i < groups * channels; ++i) {
      product[i] *= affines.inverse(i / channels)[i % channels];
      total[i % channels] += sum[i];
      total[channels + i % channels] += product[i];
    }
    std::copy(sum.begin(), sum.end(), write<A>(sums));
    std::copy(total.begin(), total.end(), write<A>(parameters));
  });
  return {sums, parameters, passed};
}

Tensor batch_norm_backward_apply(Tensor grad, Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias,
                                 Tensor statistics, Tensor sums, Counts counts, bool relu) {
  const Rows all(x, counts);
  check_apply(all, x, weight, bias, statistics);
  check_like(grad, x, "grad");
  const int64_t channels = all.channels, groups = all.groups();
  check_small(sums, x, 2 * groups * channels, "sums");
  Tensor of_x = torch::stable::empty_like(x);
  dispatch_types(x, [&](auto stored, auto computed) {
    using T = decltype(stored);
    using A = decltype(computed);
    const Affines<A> affines(all, statistics, weight, bias);
    const A *sum = read<A>(sums), *product = sum + groups * channels;
    const Tensor lines = empty_small(x, {2, groups, channels});
    A *slope = write<A>(lines), *offset = slope + groups * channels;
    for (int64_t i = 0; i < groups * channels; ++i) {
      const double share = affines.scale[i] / static_cast<double>(affines.rows(i / channels));
      slope[i] = static_cast<A>(-share * affines.inverse(i / channels)[i % channels] * product[i]);
      offset[i] = static_cast<A>(-share * sum[i]);
    }
    dispatch_conditions(false, relu, [&](auto, auto with_relu) {
      for_each_chunk(chunks_of(all), [&](int64_t, const Chunk& chunk) {
        const int64_t at = chunk.row * channels, group = chunk.group * channels;
        gradient<with_relu.value>(read<T>(grad) + at, read<T>(x) + at, chunk.rows, channels, affines.of(chunk.group),
                                  slope + group, offset + group, write<T>(of_x) + at);
      });
    });
  });
  return of_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mcl, CPU, library) {
  library.impl("batch_norm_stats", TORCH_BOX(&batch_norm_stats));
  library.impl("batch_norm_combine", TORCH_BOX(&batch_norm_combine));
  library.impl("batch_norm_stats_alone", TORCH_BOX(&batch_norm_stats_alone));
  library.impl("batch_norm_apply", TORCH_BOX(&batch_norm_apply));
  library.impl("batch_norm_backward_reduce", TORCH_BOX(&batch_norm_backward_reduce));
  library.impl("batch_norm_backward_apply", TORCH_BOX(&batch_norm_backward_apply));
}

}  // namespace mcl
