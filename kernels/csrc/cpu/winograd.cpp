#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <memory>
#include <new>
#include <optional>
#include <vector>

#include "cpu/access.h"
#include "cpu/maps.h"
#include "cpu/winograd_kernel.h"

namespace mcl {
namespace {

using namespace cpu;
using namespace cpu::winograd;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kDepth = 256;  // channels of one product: its right factor stays in the first cache

// Memory for points.
template <typename A>
class Memory {
 public:
  Memory(int64_t points, int64_t rows, int64_t channels)
      : memory_(static_cast<A*>(::operator new(points * Points<A>::stride(rows, channels) * sizeof(A), kAlignment))) {}
  Points<A> of(int64_t rows, int64_t channels) { return {memory_.get(), rows, channels}; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Delete {
    void operator()(A* memory) const { ::operator delete(memory, kAlignment); }
  };
  std::unique_ptr<A, Delete> memory_;
};

template <typename F>
void parallel(int64_t size, const F& f) {
  torch::stable::parallel_for(0, size, 1, f);
}

// How much of the maps is worked on at once, measured.
struct Portion {
  int64_t bytes;  // of points, which stay in the cache between the steps
  int64_t tiles;  // but at least so many, or the kernel's points would be read too often
};
constexpr Portion kOfThread{1 << 19, 48}, kOfAll{1 << 21, 128};

// Tiles of all maps, in chunks of equal size.
template <typename F, typename A>
struct Tiling {
  static constexpr int64_t kPoints = F::kPoints * F::kPoints;
  int64_t tiles, chunks;

  // channels: of inputs and outputs together. threads: who take chunks by themselves, all of them equally many, unless
  // these would have fewer tiles than a product takes at once.
  Tiling(int64_t n, const Maps& maps, int64_t channels, Portion portion, int64_t threads)
      : tiles(n * Tile<F>::count(maps.height) * Tile<F>::count(maps.width)) {
    const int64_t most = std::max<int64_t>(portion.tiles, portion.bytes / (channels * kPoints * sizeof(A)));
    chunks = parts(tiles, most);
    chunks = std::clamp(parts(tiles, kMostRows), chunks, parts(chunks, threads) * threads);
  }

  Chunk chunk(int64_t i) const {
    const int64_t first = tiles * i / chunks;
    return {first, tiles * (i + 1) / chunks - first};
  }

  int64_t largest() const { return parts(tiles, chunks); }
};

void check(const Tensor& t, const char* name) {
  check_channels_last("winograd", name, t);
  STD_TORCH_CHECK(t.dim() == 4 && t.numel() > 0, "winograd: ", name, " must have four dimensions, none of size 0");
}

void check_channels(int64_t channels) {
  STD_TORCH_CHECK(channels % 32 == 0, "winograd: channels must be a multiple of 32, not ", channels);
}

Tensor empty(std::vector<int64_t> size, ScalarType type, const Tensor& x) {
  return torch::stable::empty(size, type, std::nullopt, x.device(), std::nullopt, MemoryFormat::ChannelsLast);
}

// Calls f(how an axis is cut up, type of the maps' elements, type of arithmetic).
template <typename F>
void dispatch(const Tensor& x, const F& f) {
  const auto typed = [&](auto stored, auto computed) {
    if (x.size(2) == 2 && x.size(3) == 2)
      f(TwoCells{}, stored, computed);
    else
      f(FourOutputs{}, stored, computed);
  };
  dispatch_types("winograd", x, typed);
}

Tensor convolve(Tensor x, Tensor weight, bool adjoint) {
  check(x, "x");
  check(weight, "weight");
  STD_TORCH_CHECK(weight.scalar_type() == accumulation(x) && weight.size(2) == 3 && weight.size(3) == 3,
                  "winograd: weight must be (outputs, inputs, 3, 3), float64 for a float64 x and float32 otherwise");
  const int64_t inputs = weight.size(adjoint ? 0 : 1), outputs = weight.size(adjoint ? 1 : 0);
  STD_TORCH_CHECK(x.size(1) == inputs, "winograd: weight takes ", inputs, " channels, x has ", x.size(1));
  check_channels(inputs);
  check_channels(outputs);
  Tensor y = empty({x.size(0), outputs, x.size(2), x.size(3)}, x.scalar_type(), x);
  dispatch(x, [&](auto scheme, auto stored, auto computed) {
    using F = decltype(scheme);
    using T = decltype(stored);
    using A = decltype(computed);
    constexpr int64_t points = F::kPoints * F::kPoints, panel = Lanes<A>::kPanel, deep = kDepth / panel;
    Memory<A> memory(points, inputs, outputs);
    const Points<A> kernel = memory.of(inputs, outputs);
    parallel(outputs / panel, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (adjoint)
          to_kernel<F, true>(read<A>(weight), outputs, i, kernel);
        else
          to_kernel<F, false>(read<A>(weight), inputs, i, kernel);
      }
    });
    const Maps in{x.size(2), x.size(3), inputs}, out{x.size(2), x.size(3), outputs};
    const Tiling<F, A> tiling(x.size(0), in, inputs + outputs, kOfThread, torch::stable::get_num_threads());
    parallel(tiling.chunks, [&](int64_t begin, int64_t end) {
      Memory<A> inner(points, tiling.largest(), inputs), outer(points, tiling.largest(), outputs);
      for (int64_t i = begin; i < end; ++i) {
        const Chunk chunk = tiling.chunk(i);
        const Points<A> of_x = inner.of(chunk.tiles, inputs), of_y = outer.of(chunk.tiles, outputs);
        to_points<F, false>(read<T>(x), in, chunk, 0, chunk.tiles, of_x);
        for (int64_t p = 0; p < points; ++p)
          for (int64_t k = 0; k < outputs; k += panel)
            for (int64_t c = 0; c < inputs; c += kDepth)
              product<A>({of_x.at(p, 0, c), panel, 1, chunk.tiles * panel}, chunk.tiles,
                         std::min(deep, (inputs - c) / panel), panel, kernel.at(p, c, k), c > 0, of_y.at(p, 0, k));
        from_points<F>(of_y, out, chunk, write<T>(y));
      }
    });
  });
  return y;
}

// Chunk after chunk, for sums must not depend on the number of threads; threads share the points.
Tensor weight_gradient(Tensor grad, Tensor x) {
  check(grad, "grad");
  check(x, "x");
  for (const int64_t d : {0, 2, 3})
    STD_TORCH_CHECK(grad.size(d) == x.size(d) && grad.scalar_type() == x.scalar_type(),
                    "winograd: grad must have the dtype and sizes of x, but for its channels");
  const int64_t inputs = x.size(1), outputs = grad.size(1);
  check_channels(inputs);
  check_channels(outputs);
  Tensor of_weight = empty({outputs, inputs, 3, 3}, accumulation(x), x);
  dispatch(x, [&](auto scheme, auto stored, auto computed) {
    using F = decltype(scheme);
    using T = decltype(stored);
    using A = decltype(computed);
    constexpr int64_t points = F::kPoints * F::kPoints, panel = Lanes<A>::kPanel;
    const Maps in{x.size(2), x.size(3), inputs}, out{x.size(2), x.size(3), outputs};
    const Tiling<F, A> tiling(x.size(0), in, inputs + outputs, kOfAll, 1);
    Memory<A> inner(points, tiling.largest(), inputs), outer(points, tiling.largest(), outputs);
    Memory<A> memory(points, inputs, outputs);
    const Points<A> kernel = memory.of(inputs, outputs);
    for (int64_t i = 0; i < tiling.chunks; ++i) {
      const Chunk chunk = tiling.chunk(i);
      const Points<A> of_x = inner.of(chunk.tiles, inputs), of_y = outer.of(chunk.tiles, outputs);
      parallel(chunk.tiles, [&](int64_t begin, int64_t end) {
        to_points<F, false>(read<T>(x), in, chunk, begin, end, of_x);
        to_points<F, true>(read<T>(grad), out, chunk, begin, end, of_y);
      });
      const int64_t panels = inputs / panel;
      parallel(points * panels, [&](int64_t begin, int64_t end) {
        for (int64_t unit = begin; unit < end; ++unit) {
          const int64_t p = unit / panels, c = unit % panels * panel;
          for (int64_t k = 0; k < outputs; k += panel)
            product<A>({of_x.at(p, 0, c), 1, panel, 0}, panel, 1, chunk.tiles, of_y.at(p, 0, k), i > 0,
                       kernel.at(p, c, k));
        }
      });
    }
    parallel(outputs / panel, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) from_kernel<F>(kernel, k, write<A>(of_weight));
    });
  });
  return of_weight;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mcl, CPU, library) {
  library.impl("winograd", TORCH_BOX(&convolve));
  library.impl("winograd_weight", TORCH_BOX(&weight_gradient));
}

}  // namespace mcl
