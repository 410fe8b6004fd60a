// Compares the CUDA kernels of BatchNorm, emulated on the CPU, with the CPU kernels in fp64.
#include "cuda_emulation.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <limits>

#include "check.h"
#include "cpu/batch_norm_kernel.h"
#include "cuda/batch_norm.cuh"
#include "types.h"

namespace {

using namespace mcl;
using cuda::kNormThreads;

template <typename To, typename From>
std::vector<To> convert_all(const std::vector<From>& from) {
  std::vector<To> to;
  for (const From& x : from) to.push_back(static_cast<To>(x));
  return to;
}

struct Case {
  std::string name;
  std::vector<int64_t> groups;  // rows of each group
  int channels;
  double mean;
  bool affine, residual, relu;
};

// Results of the CPU kernels in fp64: statistics of batch_norm_stats and of batch_norm_combine.
struct Truth {
  std::vector<double> squares, statistics, y, passed, sums, parameters, of_x;

  Truth(const Case& c, const std::vector<double>& x, const std::vector<double>& residual,
        const std::vector<double>& grad, const std::vector<double>& weight, const std::vector<double>& bias, double eps,
        const auto& rounded)
      : y(x.size()), passed(grad), parameters(2 * c.channels), of_x(x.size()) {
    const int channels = c.channels, groups = static_cast<int>(c.groups.size());
    sums.resize(2 * groups * channels);
    int64_t row = 0;
    for (int g = 0; g < groups; row += c.groups[g++]) {
      const int64_t rows = c.groups[g], at = row * channels;
      std::vector<double> mean(channels), spread(channels), scale(channels), slope(channels), offset(channels);
      cpu::moments(x.data() + at, rows, channels, mean.data(), spread.data());
      for (const auto* from : {&mean, &spread}) squares.insert(squares.end(), from->begin(), from->end());
      squares.push_back(rows);
      std::vector<double> inverse;
      for (const double s : spread) inverse.push_back(1 / std::sqrt(s / rows + eps));
      for (const auto* from : {&mean, &inverse}) statistics.insert(statistics.end(), from->begin(), from->end());
      statistics.push_back(rows);
      for (int i = 0; i < channels; ++i) scale[i] = inverse[i] * weight[i];
      const cpu::Affine<double> by{mean.data(), scale.data(), bias.data()};
      const auto normalize = [&](auto with_residual, auto with_relu) {
        cpu::normalize<with_residual.value, with_relu.value>(x.data() + at, residual.data() + at, rows, channels, by,
                                                             y.data() + at);
        double *plain = sums.data() + g * channels, *weighted = sums.data() + (groups + g) * channels;
        constexpr bool by_y = with_residual.value && with_relu.value;
        cpu::gradient_sums<by_y, with_relu.value>(grad.data() + at, x.data() + at, rounded.data() + at, rows, channels,
                                                  by, plain, weighted, passed.data() + at);
        for (int i = 0; i < channels; ++i) {
          weighted[i] *= inverse[i];
          parameters[i] += plain[i];
          parameters[channels + i] += weighted[i];
          slope[i] = -scale[i] * inverse[i] * weighted[i] / rows;
          offset[i] = -scale[i] * plain[i] / rows;
        }
        const double* of_y = by_y ? passed.data() : grad.data();
        cpu::gradient<with_relu.value && !by_y>(of_y + at, x.data() + at, rows, channels, by, slope.data(),
                                                offset.data(), of_x.data() + at);
      };
      if (c.residual) {
        c.relu ? normalize(std::true_type{}, std::true_type{}) : normalize(std::true_type{}, std::false_type{});
      } else {
        c.relu ? normalize(std::false_type{}, std::true_type{}) : normalize(std::false_type{}, std::false_type{});
      }
    }
  }
};

template <typename T, int VEC>
void compare(const Case& c) {
  using A = Accumulate<T>;
  const double eps = 1e-3;
  const int channels = c.channels, groups = static_cast<int>(c.groups.size());
  std::vector<int64_t> first{0};
  for (const int64_t rows : c.groups) first.push_back(first.back() + rows);
  const size_t size = first.back() * channels;
  check::Random draw;
  std::vector<T> x(size), residual(size), grad(size), y(size), passed(size), of_x(size);
  for (T& value : x) value = static_cast<T>(c.mean + 3 * draw());
  for (T& value : residual) value = static_cast<T>(draw());
  for (T& value : grad) value = static_cast<T>(draw());
  std::vector<A> weight(channels, A(1)), bias(channels, A(0));
  if (c.affine)
    for (int i = 0; i < channels; ++i) weight[i] = static_cast<A>(1 + draw() / 2), bias[i] = static_cast<A>(draw());
  const A *by = c.affine ? weight.data() : nullptr, *shift = c.affine ? bias.data() : nullptr;

  const cuda::NormRows rows = cuda::make_rows(first.data(), groups, channels, VEC, cuda::kBlocksOfSum);
  const cuda::NormRows maps = cuda::make_rows(first.data(), groups, channels, VEC, cuda::kBlocksOfMap);
  const dim3 grid(rows.parts, rows.tiles, groups), map_grid(maps.parts, maps.tiles, groups);
  const int tiles = (channels + cuda::kFinishLanes - 1) / cuda::kFinishLanes;
  std::vector<A> partials(rows.parts * groups * (2 * channels + 1), A(std::nanf(""))),
      statistics(groups * (2 * channels + 1));
  std::vector<A> combined(statistics.size()), sums(2 * groups * channels), parameters(2 * channels);
  emulation::launch(grid, kNormThreads, cuda::batch_norm_partials<T, A, VEC>, rows, x.data(), partials.data());
  std::vector<A> running_mean(channels, A(2)), running_var(channels, A(2));
  int64_t batches = 3;
  const double momentum = c.affine ? 0.25 : -1;  // tests a momentum, and means over all groups
  const auto combine = [&](const std::vector<A>& from, int parts, bool final, const Running<A>& running,
                           std::vector<A>& to) {
    emulation::launch(running.momentum < 0 ? 1 : tiles, kNormThreads, cuda::batch_norm_combine<A>, from.data(), parts,
                      groups, channels, final, running, eps, to.data());
  };
  combine(partials, rows.parts, false, {}, statistics);
  // Two processes with the same rows: only the number of rows differs from that of one process.
  std::vector<A> both = statistics;
  both.insert(both.end(), statistics.begin(), statistics.end());
  combine(both, 2, true, {running_mean.data(), running_var.data(), &batches, momentum}, combined);
  check::close(c.name + ", batches", std::vector<int64_t>{batches}, std::vector<int64_t>{3 + groups}, 0);
  combine(partials, rows.parts, true, {}, combined);
  std::fill(partials.begin(), partials.end(), A(std::nanf("")));
  emulation::launch(map_grid, kNormThreads, cuda::batch_norm_apply<T, A, VEC>, maps, x.data(),
                    c.residual ? residual.data() : nullptr, combined.data(), by, shift, c.relu, y.data());
  const bool by_y = c.residual && c.relu;
  emulation::launch(grid, kNormThreads, cuda::batch_norm_gradient_partials<T, A, VEC>, rows, grad.data(), x.data(),
                    by_y ? y.data() : nullptr, combined.data(), by, shift, c.relu && !by_y,
                    by_y ? passed.data() : nullptr, partials.data());
  emulation::launch(tiles, kNormThreads, cuda::batch_norm_gradient_sums<A>, rows, partials.data(), combined.data(),
                    sums.data(), parameters.data());
  emulation::launch(map_grid, kNormThreads, cuda::batch_norm_gradient<T, A, VEC>, maps,
                    by_y ? passed.data() : grad.data(), x.data(), combined.data(), by, shift, sums.data(),
                    c.relu && !by_y, of_x.data());

  const Truth truth(c, convert_all<double>(x), convert_all<double>(residual), convert_all<double>(grad),
                    convert_all<double>(weight), convert_all<double>(bias), eps, convert_all<double>(y));
  const double close = kTolerance<A>, far = std::abs(c.mean) * std::numeric_limits<A>::epsilon();
  check::close(c.name + ", statistics", statistics, truth.squares, 4 * close);
  check::close(c.name + ", combined", combined, truth.statistics, close);
  check::close(c.name + ", output", y, truth.y, 2 * (kTolerance<T> + far));
  std::vector<double> mean(channels, 2.0), var(channels, 2.0);
  for (int g = 0; g < groups; ++g) {
    const double share = c.affine ? 0.25 : 1.0 / (3 + g + 1), all = 2.0 * c.groups[g];
    for (int i = 0; i < channels; ++i) {
      const double* own = truth.squares.data() + g * (2 * channels + 1);
      mean[i] += share * (own[i] - mean[i]);
      var[i] += share * (2 * own[channels + i] / (all - 1) - var[i]);
    }
  }
  check::close(c.name + ", running mean", running_mean, mean, close);
  check::close(c.name + ", running variance", running_var, var, 4 * close);
  if (by_y) check::close(c.name + ", residual's gradient", passed, truth.passed, 0);
  check::close(c.name + ", sums", sums, truth.sums, 100 * (close + far));
  check::close(c.name + ", parameters' gradients", parameters, truth.parameters, 100 * (close + far));
  check::close(c.name + ", gradient", of_x, truth.of_x, 2 * (kTolerance<T> + far));
}

// A float that counts how often it is read.
struct Counted {
  float value = 1;
  static inline std::atomic<int64_t> reads{0};

  Counted() = default;
  explicit Counted(float x) : value(x) {}
  explicit operator float() const {
    ++reads;
    return value;
  }
};

// Every kernel reads every map once, and the first rows of parts twice.
void count_reads() {
  const std::vector<int64_t> first{0, 130, 200};
  const int channels = 32;
  const int64_t size = first.back() * channels;
  std::vector<Counted> x(size), y(size), to(size);
  std::vector<float> sums(10000, 1.0f), statistics(2 * (2 * channels + 1), 1.0f);
  const cuda::NormRows rows = cuda::make_rows(first.data(), 2, channels, 4, cuda::kBlocksOfSum);
  const dim3 grid(rows.parts, rows.tiles, 2);
  const auto expect = [&](const char* name, int64_t reads) {
    check::close(std::string("reads of ") + name, std::vector<int64_t>{Counted::reads.exchange(0)},
                 std::vector<int64_t>{reads}, 0);
  };
  emulation::launch(grid, kNormThreads, cuda::batch_norm_partials<Counted, float, 4>, rows, x.data(), sums.data());
  expect("partials", size + int64_t(rows.parts) * rows.tiles * 2 * kNormThreads * 4);
  const float *by = statistics.data(), *none = nullptr;
  emulation::launch(grid, kNormThreads, cuda::batch_norm_apply<Counted, float, 4>, rows, x.data(), y.data(), by, none,
                    none, true, to.data());
  expect("apply", 2 * size);
  emulation::launch(grid, kNormThreads, cuda::batch_norm_gradient_partials<Counted, float, 4>, rows, x.data(), x.data(),
                    y.data(), by, none, none, false, to.data(), sums.data());
  expect("gradient_partials", 3 * size);
  emulation::launch(grid, kNormThreads, cuda::batch_norm_gradient<Counted, float, 4>, rows, x.data(), x.data(), by,
                    none, none, sums.data(), false, to.data());
  expect("gradient", 2 * size);
}

}  // namespace

int main() {
  count_reads();
  // Several parts, groups with fewer rows than parts, and tiles that the channels do not fill.
  compare<c10::BFloat16, 8>({"bf16", {150, 1, 40}, 264, 0, true, true, true});
  compare<float, 4>({"fp32", {700, 300}, 12, 0, true, false, true});
#ifndef __SANITIZE_THREAD__  // slow, and races do not depend on precision
  compare<c10::Half, 8>({"fp16", {5, 2000}, 16, 1, false, true, false});
  compare<float, 1>({"fp32, far from zero", {900}, 3, 1e4, false, false, false});
  compare<double, 2>({"fp64", {64, 300}, 10, -2, true, true, true});
  compare<double, 1>({"fp64, no words", {40, 33}, 5, 1, false, false, true});
#endif
  return check::report();
}
