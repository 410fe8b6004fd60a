#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/access.h"
#include "cpu/batch_norm_kernel.h"

namespace mcl {
namespace {

using namespace cpu;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Maps (n, c, h, w), or rows (n, c): the dtype that they are computed in.
ScalarType accumulation(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_channels_last(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu() && (t.dim() == 2 || t.dim() == 4), op, ": ", name,
                  " must be (n, c) or (n, c, h, w) on a CPU");
  // Channels next to each other, then columns, rows, maps; strides of sizes of 1 do not matter.
  int64_t expected = 1;
  for (const int64_t d : t.dim() == 4 ? std::vector<int64_t>{1, 3, 2, 0} : std::vector<int64_t>{1, 0}) {
    STD_TORCH_CHECK(t.size(d) == 1 || t.stride(d) == expected, op, ": ", name, " must be channels_last");
    expected *= t.size(d);
  }
}

// Calls f(of the type of the elements, of the type of arithmetic).
template <typename F>
void dispatch_types(const char* op, const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return f(double{}, double{});
    case ScalarType::Float:
      return f(float{}, float{});
    case ScalarType::BFloat16:
      return f(BFloat16{}, float{});
    default:
      STD_TORCH_CHECK(false, op, ": x must be float32, float64 or bfloat16");
  }
}

constexpr int64_t kChunk = 1 << 14;  // elements that are read twice while they lie in a core's cache
constexpr int64_t kRows = 512;       // that are summed in fp32; their sums are added in fp64

// Rows of one group; chunks do not depend on the number of threads, and neither does any sum.
struct Chunk {
  size_t group;
  int64_t row, rows;
};

struct Shape {
  int64_t channels;
  std::vector<int64_t> rows;  // per group
  std::vector<Chunk> chunks;

  // counts: of the first dimension of x, per group.
  Shape(const Tensor& x, const std::vector<int64_t>& counts) : channels(x.size(1)) {
    check_channels_last("batch_norm", "x", x);
    const int64_t cells = x.dim() == 4 ? x.size(2) * x.size(3) : 1;
    const int64_t step = std::clamp<int64_t>(kChunk / std::max<int64_t>(1, channels), 1, kRows);
    int64_t row = 0;
    for (const int64_t count : counts) {
      STD_TORCH_CHECK(count > 0, "batch_norm: counts must be positive");
      const int64_t end = row + count * cells;
      for (; row < end; row += step) chunks.push_back({rows.size(), row, std::min(step, end - row)});
      row = end;
      rows.push_back(count * cells);
    }
    STD_TORCH_CHECK(row == x.size(0) * cells, "batch_norm: counts must add up to the first dimension of x");
  }

  template <typename F>
  void for_each_chunk(const F& f) const {
    torch::stable::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i, chunks[i]);
    });
  }
};

void check_like(const Tensor& t, const Tensor& x, const char* name) {
  bool same = t.dim() == x.dim() && t.scalar_type() == x.scalar_type() && t.is_cpu();
  for (int64_t d = 0; same && d < x.dim(); ++d) same = t.size(d) == x.size(d);
  STD_TORCH_CHECK(same, "batch_norm: ", name, " must have the shape, dtype and device of x");
  check_channels_last("batch_norm", name, t);
}

void check_per_channel(const std::optional<Tensor>& t, int64_t size, ScalarType dtype, const char* name) {
  if (!t) return;
  STD_TORCH_CHECK(t->numel() == size && t->is_contiguous() && t->scalar_type() == dtype && t->is_cpu(),
                  "batch_norm: ", name,
                  " must be contiguous, of one value per channel, float64 for a float64 x and float32 otherwise");
}

Tensor empty(std::vector<int64_t> size, const Tensor& x) {
  return torch::stable::empty(size, accumulation(x), std::nullopt, x.device());
}

template <typename F>
void dispatch(const Tensor& x, const F& f) {
  dispatch_types("batch_norm", x, f);
}

template <typename F>
void dispatch(bool residual, bool relu, const F& f) {
  using True = std::true_type;
  using False = std::false_type;
  if (residual) return relu ? f(True{}, True{}) : f(True{}, False{});
  return relu ? f(False{}, True{}) : f(False{}, False{});
}

// weight / standard deviation and bias per group and channel.
template <typename A>
struct Affines {
  int64_t channels;
  std::vector<A> scale, shift;
  const A* mean;

  Affines(const Shape& shape, const A* mean_, const A* inverse, const std::optional<Tensor>& weight,
          const std::optional<Tensor>& bias)
      : channels(shape.channels), scale(shape.rows.size() * channels), shift(scale.size()), mean(mean_) {
    for (size_t i = 0; i < scale.size(); ++i) {
      scale[i] = inverse[i] * (weight ? read<A>(*weight)[i % channels] : A(1));
      shift[i] = bias ? read<A>(*bias)[i % channels] : A(0);
    }
  }

  Affine<A> of(size_t group) const {
    const size_t at = group * channels;
    return {mean + at, scale.data() + at, shift.data() + at};
  }
};

std::tuple<Tensor, Tensor, Tensor> batch_norm(Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias,
                                              std::optional<Tensor> running_mean, std::optional<Tensor> running_var,
                                              std::vector<int64_t> counts, double momentum, double eps,
                                              std::optional<Tensor> residual, bool relu) {
  const Shape shape(x, counts);
  if (residual) check_like(*residual, x, "residual");
  const ScalarType wide = accumulation(x);
  check_per_channel(weight, shape.channels, wide, "weight");
  check_per_channel(bias, shape.channels, wide, "bias");
  check_per_channel(running_mean, shape.channels, wide, "running_mean");
  check_per_channel(running_var, shape.channels, wide, "running_var");
  const int64_t groups = static_cast<int64_t>(shape.rows.size()), channels = shape.channels;
  Tensor y = torch::stable::empty_like(x);
  Tensor mean = empty({groups, channels}, x), inverse = empty({groups, channels}, x);
  dispatch(x, [&](auto stored, auto computed) {
    using T = decltype(stored);
    using A = decltype(computed);
    std::vector<A> means(shape.chunks.size() * channels), squares(means.size());
    shape.for_each_chunk([&](int64_t i, const Chunk& chunk) {
      moments(read<T>(x) + chunk.row * channels, chunk.rows, channels, means.data() + i * channels,
              squares.data() + i * channels);
    });
    // Chan, Golub and LeVeque's pairwise update, chunk after chunk.
    std::vector<double> all(groups * channels), spread(all.size()), seen(groups);
    for (size_t i = 0; i < shape.chunks.size(); ++i) {
      const Chunk& chunk = shape.chunks[i];
      const double before = seen[chunk.group], after = before + chunk.rows;
      const double part = chunk.rows / after, between = before * part;
      for (int64_t c = 0; c < channels; ++c) {
        double& center = all[chunk.group * channels + c];
        const double distance = means[i * channels + c] - center;
        center += distance * part;
        spread[chunk.group * channels + c] += squares[i * channels + c] + distance * distance * between;
      }
      seen[chunk.group] = after;
    }
    for (int64_t i = 0; i < groups * channels; ++i) {
      const double rows = static_cast<double>(shape.rows[i / channels]);
      write<A>(mean)[i] = static_cast<A>(all[i]);
      write<A>(inverse)[i] = static_cast<A>(1 / std::sqrt(spread[i] / rows + eps));
      if (running_mean) {
        A& running = write<A>(*running_mean)[i % channels];
        running = static_cast<A>((1 - momentum) * running + momentum * all[i]);
      }
      if (running_var) {
        A& running = write<A>(*running_var)[i % channels];
        running = static_cast<A>((1 - momentum) * running + momentum * (spread[i] / (rows - 1)));
      }
    }
    const Affines<A> affines(shape, read<A>(mean), read<A>(inverse), weight, bias);
    dispatch(residual.has_value(), relu, [&](auto with_residual, auto with_relu) {
      shape.for_each_chunk([&](int64_t, const Chunk& chunk) {
        const int64_t at = chunk.row * channels;
        const T* added = residual ? read<T>(*residual) + at : nullptr;
        normalize<with_residual.value, with_relu.value>(read<T>(x) + at, added, chunk.rows, channels,
                                                        affines.of(chunk.group), write<T>(y) + at);
      });
    });
  });
  return {y, mean, inverse};
}

// Gradients of x, weight, bias and residual; y is given where a residual was added, whose gradient is then not empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward(Tensor grad, Tensor x, std::optional<Tensor> y,
                                                               std::optional<Tensor> weight, std::optional<Tensor> bias,
                                                               Tensor mean, Tensor inverse, std::vector<int64_t> counts,
                                                               bool relu) {
  const Shape shape(x, counts);
  check_like(grad, x, "grad");
  if (y) check_like(*y, x, "y");
  const ScalarType wide = accumulation(x);
  const int64_t groups = static_cast<int64_t>(shape.rows.size()), channels = shape.channels;
  check_per_channel(weight, channels, wide, "weight");
  check_per_channel(bias, channels, wide, "bias");
  check_per_channel(mean, groups * channels, wide, "mean");
  check_per_channel(inverse, groups * channels, wide, "inverse");
  Tensor of_x = torch::stable::empty_like(x);
  Tensor of_weight = empty({channels}, x), of_bias = empty({channels}, x);
  Tensor of_residual = y ? torch::stable::empty_like(x) : empty({0}, x);
  dispatch(x, [&](auto stored, auto computed) {
    using T = decltype(stored);
    using A = decltype(computed);
    const Affines<A> affines(shape, read<A>(mean), read<A>(inverse), weight, bias);
    std::vector<A> sums(shape.chunks.size() * channels), weighted(sums.size());
    dispatch(y.has_value(), relu, [&](auto with_residual, auto with_relu) {
      shape.for_each_chunk([&](int64_t i, const Chunk& chunk) {
        const int64_t at = chunk.row * channels;
        gradient_sums<with_residual.value, with_relu.value>(
            read<T>(grad) + at, read<T>(x) + at, y ? read<T>(*y) + at : nullptr, chunk.rows, channels,
            affines.of(chunk.group), sums.data() + i * channels, weighted.data() + i * channels,
            y ? write<T>(of_residual) + at : nullptr);
      });
    });
    std::vector<double> sum(groups * channels), product(sum.size());
    for (size_t i = 0; i < shape.chunks.size(); ++i)
      for (int64_t c = 0; c < channels; ++c) {
        sum[shape.chunks[i].group * channels + c] += sums[i * channels + c];
        product[shape.chunks[i].group * channels + c] += weighted[i * channels + c];
      }
    std::vector<double> weights(channels), biases(channels);
    std::vector<A> slope(sum.size()), offset(sum.size());
    for (int64_t i = 0; i < groups * channels; ++i) {
      const double inv = read<A>(inverse)[i], scale = affines.scale[i];
      const double rows = static_cast<double>(shape.rows[i / channels]);
      weights[i % channels] += product[i] * inv;
      biases[i % channels] += sum[i];
      slope[i] = static_cast<A>(-scale * inv * inv * product[i] / rows);
      offset[i] = static_cast<A>(-scale * sum[i] / rows);
    }
    std::copy(weights.begin(), weights.end(), write<A>(of_weight));
    std::copy(biases.begin(), biases.end(), write<A>(of_bias));
    // What reached the residual has passed ReLU already.
    const T* passed = y ? read<T>(of_residual) : read<T>(grad);
    dispatch(false, relu && !y, [&](auto, auto with_relu) {
      shape.for_each_chunk([&](int64_t, const Chunk& chunk) {
        const int64_t at = chunk.row * channels;
        const size_t group = chunk.group * channels;
        gradient<with_relu.value>(passed + at, read<T>(x) + at, chunk.rows, channels, affines.of(chunk.group),
                                  slope.data() + group, offset.data() + group, write<T>(of_x) + at);
      });
    });
  });
  return {of_x, of_weight, of_bias, of_residual};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mcl, CPU, library) {
  library.impl("batch_norm", TORCH_BOX(&batch_norm));
  library.impl("batch_norm_backward", TORCH_BOX(&batch_norm_backward));
}

}  // namespace mcl
