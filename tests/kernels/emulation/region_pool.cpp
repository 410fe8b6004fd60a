// Compares the CUDA kernels of region_pool, emulated on the CPU, with the CPU kernel in the same precision and in fp64.
#include "cuda_emulation.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <limits>

#include "check.h"
#include "cpu/region_pool_kernel.h"
#include "cuda/region_pool.cuh"
#include "types.h"

namespace {

using namespace mcl;

struct Shape {
  int rows, height, width;
  double stride;
};

// Maps of odd sizes, each in memory of exactly its size.
template <typename T>
struct Features {
  std::vector<std::vector<T>> memory;
  Maps<T> maps{};

  Features(const std::vector<Shape>& shapes, int channels, bool dense) {
    for (const Shape& s : shapes)
      memory.emplace_back(static_cast<size_t>(s.rows) * channels * s.height * s.width, T(std::nanf("")));
    int canvases = 0;
    for (const Shape& s : shapes) {
      const int64_t row = int64_t(channels) * s.height * s.width;
      Map<T>& map = maps.map[maps.count];
      map = dense ? Map<T>{memory[maps.count].data(),
                           row,
                           1,
                           int64_t(s.width) * channels,
                           channels,
                           s.rows,
                           s.height,
                           s.width,
                           1 / s.stride,
                           canvases}
                  : Map<T>{memory[maps.count].data(),
                           row,
                           s.height * s.width,
                           s.width,
                           1,
                           s.rows,
                           s.height,
                           s.width,
                           1 / s.stride,
                           canvases};
      ++maps.count;
      canvases += s.rows;
    }
  }

  int canvases() const { return maps.map[maps.count - 1].first_canvas + maps.map[maps.count - 1].rows; }

  Maps<const T> read() const {
    Maps<const T> result{};
    result.count = maps.count;
    for (int m = 0; m < maps.count; ++m) {
      const Map<T>& f = maps.map[m];
      result.map[m] = {f.data, f.row_stride, f.channel_stride, f.y_stride, f.x_stride,
                       f.rows, f.height,     f.width,          f.scale,    f.first_canvas};
    }
    return result;
  }
};

template <typename To, typename From>
std::vector<To> convert_all(const std::vector<From>& from) {
  std::vector<To> to;
  for (const From& x : from) to.push_back(static_cast<To>(x));
  return to;
}

struct Boxes {
  std::vector<double> values;
  std::vector<int64_t> index;

  void add(int64_t map, std::initializer_list<double> box) {
    values.insert(values.end(), box);
    index.push_back(map);
  }
  int64_t number() const { return static_cast<int64_t>(index.size()); }
};

Boxes some_boxes(const std::vector<Shape>& shapes, int bins, int random) {
  check::Random draw;
  const double nan = std::nan(""), inf = std::numeric_limits<double>::infinity();
  Boxes boxes;
  const double whole = bins * shapes[0].stride;
  boxes.add(0, {0, 0, 0, whole, whole});                                    // copied
  boxes.add(0, {1, shapes[0].stride, 0, shapes[0].stride + whole, whole});  // copied, shifted by a cell
  boxes.add(1, {0, -30, -30, 400, 400});                                    // many samples
  boxes.add(1, {0, -1e6, -1e6, 1e6, 1e6});                                  // as many samples as the map has cells
  boxes.add(0, {0, 10, 10, 10.5, 30});                                      // smaller than a cell
  boxes.add(0, {0, 9, 9, 9, 9});                                            // no area
  boxes.add(0, {0, 20, 0, 10, 30});                                         // reversed
  boxes.add(0, {0, nan, 0, 10, 30});
  boxes.add(0, {0, 0, 0, inf, 30});
  boxes.add(0, {nan, 0, 0, 10, 30});
  boxes.add(0, {-1, 0, 0, 10, 30});  // no such row
  boxes.add(0, {9, 0, 0, 10, 30});
  boxes.add(7, {0, 0, 0, 10, 30});  // no such map
  boxes.add(-1, {0, 0, 0, 10, 30});
  boxes.add(0, {0, 900, 900, 990, 990});  // outside
  for (int i = 0; i < random; ++i) {
    const int m = i % static_cast<int>(shapes.size());
    const double reach = shapes[m].stride * shapes[m].width;
    const double x = (draw() + 0.6) * reach, y = (draw() + 0.6) * reach;
    boxes.add(m, {double(i % shapes[m].rows), x, y, x + (draw() + 1) * reach / 2, y + (draw() + 1) * reach / 2});
  }
  return boxes;
}

template <typename T, int VEC, bool DENSE>
void compare(const char* name, const std::vector<Shape>& shapes, int channels, int bins, int ratio, int random) {
  using A = Accumulate<T>;
  const std::string what =
      std::string(name) + (DENSE ? " dense " : " planes ") + std::to_string(VEC) + " ratio " + std::to_string(ratio);
  check::Random draw;
  Features<T> features(shapes, channels, DENSE);
  Features<double> exact(shapes, channels, DENSE);
  for (size_t m = 0; m < shapes.size(); ++m) {
    for (T& x : features.memory[m]) x = static_cast<T>(draw());
    std::copy(features.memory[m].begin(), features.memory[m].end(), exact.memory[m].begin());
  }
  const Boxes boxes = some_boxes(shapes, bins, random);
  // Rounded once, so that all precisions have the same boxes.
  const auto rounded = convert_all<A>(convert_all<float>(boxes.values));
  const auto wide = convert_all<double>(rounded);
  const int64_t number = boxes.number();
  const PooledStrides to = DENSE ? PooledStrides{int64_t(channels) * bins * bins, 1, int64_t(bins) * channels, channels}
                                 : PooledStrides{int64_t(channels) * bins * bins, bins * bins, bins, 1};
  const size_t size = static_cast<size_t>(number) * channels * bins * bins;

  // Forward.
  std::vector<T> pooled(size, T(std::nanf(""))), by_cpu = pooled;
  std::vector<double> truth(size);
  emulation::launch(dim3(number, 2), cuda::kThreads, cuda::region_pool_forward<T, A, VEC, DENSE>, features.read(),
                    rounded.data(), boxes.index.data(), channels, bins, ratio, pooled.data(), to);
  cpu::region_pool_forward<T, A>(features.read(), rounded.data(), boxes.index.data(), channels, bins, ratio,
                                 by_cpu.data(), to, 0, number);
  cpu::region_pool_forward<double, double>(exact.read(), wide.data(), boxes.index.data(), channels, bins, ratio,
                                           truth.data(), to, 0, number);
  check::close(what + ", forward against the CPU", pooled, by_cpu, kTolerance<T>);
  check::close(what + ", forward against fp64", pooled, truth, kTolerance<T>);
  if (ratio < 2) {
    const auto copied = 2 * static_cast<std::ptrdiff_t>(to.box);
    check::close(what + ", copies", std::vector<T>(pooled.begin(), pooled.begin() + copied),
                 std::vector<T>(by_cpu.begin(), by_cpu.begin() + copied), 0);
  }

  // Backward: boxes of each canvas, then the cells that gather from them.
  const int canvases = features.canvases();
  std::vector<int> begin(canvases + 1, -1), order(number, -1);
  emulation::launch(canvases, cuda::kThreads, cuda::boxes_by_canvas<T, A>, features.maps, rounded.data(),
                    boxes.index.data(), static_cast<int>(number), begin.data(), order.data());
  const cpu::BoxesByCanvas listed(features.maps, rounded.data(), boxes.index.data(), number);
  order.resize(begin.back());
  check::close(what + ", ends of lists", begin, listed.begin, 0);
  check::close(what + ", lists of boxes", order, listed.order, 0);

  std::vector<T> grad(size);
  for (T& g : grad) g = static_cast<T>(draw());
  const std::vector<double> exact_grad = convert_all<double>(grad);
  Features<T> ours(shapes, channels, DENSE), cpus(shapes, channels, DENSE);
  Features<double> truths(shapes, channels, DENSE);
  const int all = channels / VEC;
  const int groups = DENSE ? static_cast<int>(std::bit_ceil(static_cast<unsigned>(all))) : cuda::kThreads / 32;
  int blocks = 0;
  for (const Shape& s : shapes) {
    const int per_block = cuda::kThreads / groups;
    blocks += s.rows * ((s.height * s.width + per_block - 1) / per_block);
  }
  emulation::launch(dim3(blocks, (all + groups - 1) / groups), cuda::kThreads,
                    cuda::region_pool_backward<T, A, VEC, DENSE>, grad.data(), to, ours.maps, rounded.data(),
                    begin.data(), order.data(), channels, bins, ratio, groups);
  cpu::region_pool_backward<T, A>(grad.data(), to, cpus.maps, rounded.data(), listed, bins, ratio, 0, channels);
  cpu::region_pool_backward<double, double>(exact_grad.data(), to, truths.maps, wide.data(), listed, bins, ratio, 0,
                                            channels);
  for (size_t m = 0; m < shapes.size(); ++m) {
    const std::string map = ", backward of map " + std::to_string(m);
    // Sums of up to all boxes.
    check::close(what + map + " against the CPU", ours.memory[m], cpus.memory[m], 4 * kTolerance<T>);
    check::close(what + map + " against fp64", ours.memory[m], truths.memory[m], 4 * kTolerance<T>);
  }
}

}  // namespace

int main() {
  const std::vector<Shape> shapes{{2, 4, 4, 32}, {1, 5, 7, 16}, {1, 1, 1, 8}};
  compare<c10::BFloat16, 8, true>("bf16", shapes, 16, 3, 0, 9);
  compare<float, 4, false>("fp32", shapes, 12, 3, 0, 9);
#ifndef __SANITIZE_THREAD__  // slow, and races do not depend on precision
  compare<c10::Half, 4, false>("fp16", shapes, 20, 3, 2, 3);
  compare<double, 1, false>("fp64", shapes, 3, 3, 1, 3);
#endif
  // More boxes on a canvas than a block has threads.
  compare<double, 2, true>("fp64", {{1, 3, 3, 8}, {1, 2, 2, 8}}, 2, 1, 0, 300);
  return check::report();
}
