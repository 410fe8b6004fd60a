#include "cuda/batch_norm.cuh"

#include "batch_norm.h"
#include "cuda/launch.h"

namespace mcl {
namespace {

using cuda::kNormThreads;
using cuda::NormRows;
using torch::stable::Tensor;

bool aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
}

// Calls f(stored, computed, channels per word as a compile-time constant, rows, grid). `maps`: the tensors that kernels
// read or write in words. `blocks`: approximate maximum of the grid.
template <typename F>
void launch(const Rows& all, const Tensor& x, std::initializer_list<const Tensor*> maps, int blocks, F&& f) {
  STD_TORCH_CHECK(all.groups() <= cuda::kMaxGroups, "batch_norm: at most ", cuda::kMaxGroups, " groups on a GPU");
  if (x.numel() == 0) return;
  dispatch_types(x, [&](auto stored, auto computed) {
    constexpr int kVector = 16 / sizeof(stored);
    const auto go = [&](auto vector) {
      const NormRows rows = cuda::make_rows(all.first.data(), static_cast<int>(all.groups()),
                                            static_cast<int>(all.channels), vector, blocks);
      f(stored, computed, vector, rows, dim3(rows.parts, rows.tiles, rows.groups));
    };
    bool words = all.channels % kVector == 0;
    for (const Tensor* map : maps) words = words && aligned(*map);
    if (words) return go(std::integral_constant<int, kVector>{});
    go(std::integral_constant<int, 1>{});
  });
}

int finish_tiles(int channels) {
  return std::max(1, (channels + cuda::kFinishLanes - 1) / cuda::kFinishLanes);
}

// Statistics of parts of the rows: (parts, groups, 2 C + 1). The result may be freed as soon as its reader has been
// launched, since memory is reused in the order of the stream.
Tensor stats_of_parts(const Tensor& x, const Counts& counts) {
  const Rows all(x, counts);
  const cuda::Stream stream(x);
  Tensor partials = empty_small(x, {1, all.groups(), all.statistics()});
  launch(all, x, {&x}, cuda::kBlocksOfSum,
         [&](auto stored, auto computed, auto vector, const NormRows& rows, dim3 grid) {
           using T = decltype(stored);
           using A = decltype(computed);
           partials = empty_small(x, {rows.parts, rows.groups, all.statistics()});
           cuda::batch_norm_partials<T, A, vector>
               <<<grid, kNormThreads, 0, stream.get()>>>(rows, read<T>(x), write<A>(partials));
         });
  cuda::check_launch("batch_norm_stats");
  return partials;
}

Tensor batch_norm_stats(Tensor x, Counts counts) {
  const Tensor partials = stats_of_parts(x, counts);
  const cuda::Stream stream(x);
  const int groups = static_cast<int>(partials.size(1)), channels = static_cast<int>(partials.size(2) / 2);
  Tensor statistics = empty_small(x, {1, groups, partials.size(2)});
  dispatch_types(partials, [&](auto, auto computed) {
    using A = decltype(computed);
    cuda::batch_norm_combine<A><<<finish_tiles(channels), kNormThreads, 0, stream.get()>>>(
        read<A>(partials), static_cast<int>(partials.size(0)), groups, channels, false, Running<A>{}, 0,
        write<A>(statistics));
  });
  cuda::check_launch("batch_norm_stats");
  return statistics;
}

Tensor batch_norm_combine(Tensor parts, std::optional<Tensor> running_mean, std::optional<Tensor> running_var,
                          std::optional<Tensor> batches, std::optional<double> momentum, double eps) {
  check_combine(parts, momentum, running_mean, running_var, batches);
  const cuda::Stream stream(parts);
  const int groups = static_cast<int>(parts.size(1)), channels = static_cast<int>(parts.size(2) / 2);
  Tensor statistics = empty_small(parts, {groups, parts.size(2)});
  dispatch_types(parts, [&](auto, auto computed) {
    using A = decltype(computed);
    cuda::batch_norm_combine<A><<<momentum ? finish_tiles(channels) : 1, kNormThreads, 0, stream.get()>>>(
        read<A>(parts), static_cast<int>(parts.size(0)), groups, channels, true,
        make_running<A>(running_mean, running_var, batches, momentum), eps, write<A>(statistics));
  });
  cuda::check_launch("batch_norm_combine");
  return statistics;
}

Tensor batch_norm_stats_alone(Tensor x, Counts counts, std::optional<Tensor> running_mean,
                              std::optional<Tensor> running_var, std::optional<Tensor> batches,
                              std::optional<double> momentum, double eps) {
  return batch_norm_combine(stats_of_parts(x, counts), running_mean, running_var, batches, momentum, eps);
}

Tensor batch_norm_apply(Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias, Tensor statistics,
                        Counts counts, std::optional<Tensor> residual, bool relu) {
  const Rows all(x, counts);
  check_apply(all, x, weight, bias, statistics);
  if (residual) check_like(*residual, x, "residual");
  const cuda::Stream stream(x);
  Tensor y = torch::stable::empty_like(x);
  const Tensor& added = residual ? *residual : x;
  launch(all, x, {&x, &added, &y}, cuda::kBlocksOfMap,
         [&](auto stored, auto computed, auto vector, const NormRows& rows, dim3 grid) {
           using T = decltype(stored);
           using A = decltype(computed);
           cuda::batch_norm_apply<T, A, vector>
               <<<grid, kNormThreads, 0, stream.get()>>>(rows, read<T>(x), read<T>(residual), read<A>(statistics),
                                                         read<A>(weight), read<A>(bias), relu, write<T>(y));
         });
  cuda::check_launch("batch_norm_apply");
  return y;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward_reduce(Tensor grad, Tensor x, std::optional<Tensor> y,
                                                              std::optional<Tensor> weight, std::optional<Tensor> bias,
                                                              Tensor statistics, Counts counts, bool relu) {
  const Rows all(x, counts);
  check_apply(all, x, weight, bias, statistics);
  check_like(grad, x, "grad");
  if (y) check_like(*y, x, "y");
  const cuda::Stream stream(x);
  Tensor sums = empty_small(x, {2, all.groups(), all.channels}), parameters = empty_small(x, {2, all.channels});
  Tensor passed = y ? torch::stable::empty_like(x) : empty_small(x, {0});
  const Tensor& output = y ? *y : x;
  const Tensor& into = y ? passed : x;
  launch(all, x, {&grad, &x, &output, &into}, cuda::kBlocksOfSum,
         [&](auto stored, auto computed, auto vector, const NormRows& rows, dim3 grid) {
           using T = decltype(stored);
           using A = decltype(computed);
           const Tensor partials = empty_small(x, {rows.parts, rows.groups, 2, rows.channels});
           cuda::batch_norm_gradient_partials<T, A, vector><<<grid, kNormThreads, 0, stream.get()>>>(
               rows, read<T>(grad), read<T>(x), read<T>(y), read<A>(statistics), read<A>(weight), read<A>(bias),
               relu && !y, y ? write<T>(passed) : nullptr, write<A>(partials));
           cuda::batch_norm_gradient_sums<A><<<finish_tiles(rows.channels), kNormThreads, 0, stream.get()>>>(
               rows, read<A>(partials), read<A>(statistics), write<A>(sums), write<A>(parameters));
         });
  cuda::check_launch("batch_norm_backward_reduce");
  return {sums, parameters, passed};
}

Tensor batch_norm_backward_apply(Tensor grad, Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias,
                                 Tensor statistics, Tensor sums, Counts counts, bool relu) {
  const Rows all(x, counts);
  check_apply(all, x, weight, bias, statistics);
  check_like(grad, x, "grad");
  check_small(sums, x, 2 * all.groups() * all.channels, "sums");
  const cuda::Stream stream(x);
  Tensor of_x = torch::stable::empty_like(x);
  launch(all, x, {&grad, &x, &of_x}, cuda::kBlocksOfMap,
         [&](auto stored, auto computed, auto vector, const NormRows& rows, dim3 grid) {
           using T = decltype(stored);
           using A = decltype(computed);
           cuda::batch_norm_gradient<T, A, vector><<<grid, kNormThreads, 0, stream.get()>>>(
               rows, read<T>(grad), read<T>(x), read<A>(statistics), read<A>(weight), read<A>(bias), read<A>(sums),
               relu, write<T>(of_x));
         });
  cuda::check_launch("batch_norm_backward_apply");
  return of_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mcl, CUDA, library) {
  library.impl("batch_norm_stats", TORCH_BOX(&batch_norm_stats));
  library.impl("batch_norm_combine", TORCH_BOX(&batch_norm_combine));
  library.impl("batch_norm_stats_alone", TORCH_BOX(&batch_norm_stats_alone));
  library.impl("batch_norm_apply", TORCH_BOX(&batch_norm_apply));
  library.impl("batch_norm_backward_reduce", TORCH_BOX(&batch_norm_backward_reduce));
  library.impl("batch_norm_backward_apply", TORCH_BOX(&batch_norm_backward_apply));
}

}  // namespace mcl
