// The CPU's kernels of 3x3 convolutions against plain loops, in memory of exactly the size they need.
#include <algorithm>

#include "check.h"
#include "cpu/winograd_kernel.h"

namespace {

using namespace mcl::cpu;
using namespace mcl::cpu::winograd;

double plain(double x) {
  return x;
}
double plain(float x) {
  return x;
}
double plain(BFloat16 x) {
  return load(&x);
}

struct Shape {
  int64_t n, height, width, inputs, outputs;
  int64_t cell(int64_t i, int64_t row, int64_t column) const { return (i * height + row) * width + column; }
};

template <typename T, typename A>
std::vector<T> noise(int64_t size, check::Random& draw) {
  std::vector<T> values(size);
  for (T& value : values) store(&value, static_cast<A>(draw()));
  return values;
}

// Calls f(output cell, input cell, tap) for all that meet.
template <typename F>
void for_each_tap(const Shape& s, const F& f) {
  for (int64_t i = 0; i < s.n; ++i)
    for (int64_t row = 0; row < s.height; ++row)
      for (int64_t column = 0; column < s.width; ++column)
        for (int64_t tap = 0; tap < 9; ++tap) {
          const int64_t from_row = row + tap / 3 - 1, from_column = column + tap % 3 - 1;
          if (from_row >= 0 && from_row < s.height && from_column >= 0 && from_column < s.width)
            f(s.cell(i, row, column), s.cell(i, from_row, from_column), tap);
        }
}

template <typename A>
struct Matrices {
  std::vector<A> memory;
  Points<A> points;
  Matrices(int64_t count, int64_t rows, int64_t channels)
      : memory(count * Points<A>::stride(rows, channels)), points{memory.data(), rows, channels} {}
};

template <typename F, bool kAdjoint, typename T, typename A>
std::vector<T> convolve(const Shape& s, const std::vector<T>& x, const std::vector<A>& weight) {
  constexpr int64_t count = F::kPoints * F::kPoints, panel = Lanes<A>::kPanel;
  const int64_t inputs = kAdjoint ? s.outputs : s.inputs, outputs = kAdjoint ? s.inputs : s.outputs;
  const Maps in{s.height, s.width, inputs}, out{s.height, s.width, outputs};
  const int64_t tiles = s.n * Tile<F>::count(s.height) * Tile<F>::count(s.width);
  std::vector<T> y(s.n * s.height * s.width * outputs);
  Matrices<A> kernel(count, inputs, outputs);
  for (int64_t k = 0; k < outputs / panel; ++k) to_kernel<F, kAdjoint>(weight.data(), s.inputs, k, kernel.points);
  for (int64_t first = 0; first < tiles; first += 13) {
    const Chunk chunk{first, std::min<int64_t>(13, tiles - first)};
    Matrices<A> of_x(count, chunk.tiles, inputs), of_y(count, chunk.tiles, outputs);
    to_points<F, false>(x.data(), in, chunk, 0, chunk.tiles / 2, of_x.points);
    to_points<F, false>(x.data(), in, chunk, chunk.tiles / 2, chunk.tiles, of_x.points);
    for (int64_t p = 0; p < count; ++p)
      for (int64_t k = 0; k < outputs; k += panel)
        for (int64_t c = 0; c < inputs; c += 2 * panel)
          product<A>({of_x.points.at(p, 0, c), panel, 1, chunk.tiles * panel}, chunk.tiles,
                     std::min<int64_t>(2, (inputs - c) / panel), panel, kernel.points.at(p, c, k), c > 0,
                     of_y.points.at(p, 0, k));
    from_points<F>(of_y.points, out, chunk, y.data());
  }
  return y;
}

template <typename F, typename T, typename A>
std::vector<A> weight_gradient(const Shape& s, const std::vector<T>& grad, const std::vector<T>& x) {
  constexpr int64_t count = F::kPoints * F::kPoints, panel = Lanes<A>::kPanel;
  const int64_t tiles = s.n * Tile<F>::count(s.height) * Tile<F>::count(s.width);
  Matrices<A> of_x(count, tiles, s.inputs), of_y(count, tiles, s.outputs), kernel(count, s.inputs, s.outputs);
  to_points<F, false>(x.data(), {s.height, s.width, s.inputs}, {0, tiles}, 0, tiles, of_x.points);
  to_points<F, true>(grad.data(), {s.height, s.width, s.outputs}, {0, tiles}, 0, tiles, of_y.points);
  for (int64_t p = 0; p < count; ++p)
    for (int64_t c = 0; c < s.inputs; c += panel)
      for (int64_t k = 0; k < s.outputs; k += panel)
        product<A>({of_x.points.at(p, 0, c), 1, panel, 0}, panel, 1, tiles, of_y.points.at(p, 0, k), false,
                   kernel.points.at(p, c, k));
  std::vector<A> of_weight(s.outputs * 9 * s.inputs);
  for (int64_t k = 0; k < s.outputs / panel; ++k) from_kernel<F>(kernel.points, k, of_weight.data());
  return of_weight;
}

template <typename T>
std::vector<double> plain(const std::vector<T>& values) {
  std::vector<double> all;
  for (const T& value : values) all.push_back(plain(value));
  return all;
}

template <typename F, typename T, typename A>
void compare(const std::string& name, const Shape& s, double tolerance) {
  check::Random draw;
  const int64_t cells = s.n * s.height * s.width;
  const std::vector<T> x = noise<T, A>(cells * s.inputs, draw), grad = noise<T, A>(cells * s.outputs, draw);
  const std::vector<A> weight = noise<A, A>(s.outputs * 9 * s.inputs, draw);
  std::vector<double> y(grad.size()), of_x(x.size()), of_weight(weight.size());
  for_each_tap(s, [&](int64_t to, int64_t from, int64_t tap) {
    for (int64_t k = 0; k < s.outputs; ++k)
      for (int64_t c = 0; c < s.inputs; ++c) {
        const int64_t w = (k * 9 + tap) * s.inputs + c;
        const double out = plain(grad[to * s.outputs + k]), in = plain(x[from * s.inputs + c]);
        y[to * s.outputs + k] += in * weight[w];
        of_x[from * s.inputs + c] += out * weight[w];
        of_weight[w] += out * in;
      }
  });
  check::close(name + " y", plain(convolve<F, false>(s, x, weight)), y, tolerance);
  check::close(name + " gradient of x", plain(convolve<F, true>(s, grad, weight)), of_x, tolerance);
  check::close(name + " gradient of weight", plain(weight_gradient<F, T, A>(s, grad, x)), of_weight, 1e-3);
}

}  // namespace

int main() {
  compare<FourOutputs, double, double>("fp64, 5 x 9", {2, 5, 9, 32, 48}, 1e-11);
  compare<FourOutputs, float, float>("fp32, 5 x 9", {2, 5, 9, 64, 32}, 1e-3);
  compare<FourOutputs, float, float>("fp32, 1 x 4", {1, 1, 4, 32, 32}, 1e-3);
  compare<FourOutputs, BFloat16, float>("bf16, 8 x 3", {2, 8, 3, 32, 64}, 2e-2);
  compare<TwoCells, double, double>("fp64, 2 x 2", {27, 2, 2, 48, 32}, 1e-11);
  compare<TwoCells, float, float>("fp32, 2 x 2", {27, 2, 2, 32, 64}, 1e-3);
  compare<TwoCells, BFloat16, float>("bf16, 2 x 2", {3, 2, 2, 64, 32}, 2e-2);
  return check::report();
}
