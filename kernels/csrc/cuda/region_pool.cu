#include <algorithm>
#include <bit>
#include <cstdint>

#include "cuda/launch.h"
#include "cuda/region_pool.cuh"
#include "region_pool.h"

namespace mcl {
namespace {

using cuda::kThreads;

template <typename T>
constexpr int kVector = 16 / sizeof(T);
constexpr int kPlanes = 4;  // channels per thread if channels are not contiguous

// Whether a tensor's channels can be read in whole words of `vector` elements.
bool packed(const Tensor& t, int vector) {
  if (t.stride(1) != 1 || reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 != 0) return false;
  for (int d : {0, 2, 3})
    if (t.size(d) > 1 && t.stride(d) % vector != 0) return false;
  return t.size(1) % vector == 0;
}

bool packed(const std::vector<Tensor>& tensors, int vector) {
  return std::all_of(tensors.begin(), tensors.end(), [&](const Tensor& t) { return packed(t, vector); });
}

// Calls f(channels per thread, whether channels are contiguous) with compile-time constants.
template <typename T, typename F>
void choose_layout(bool dense, int64_t channels, F&& f) {
  if (dense) return f(std::integral_constant<int, kVector<T>>{}, std::true_type{});
  if (channels % kPlanes == 0) return f(std::integral_constant<int, kPlanes>{}, std::false_type{});
  f(std::integral_constant<int, 1>{}, std::false_type{});
}

Tensor region_pool(std::vector<Tensor> features, std::vector<double> strides, Tensor boxes, Tensor index,
                   int64_t output_size, int64_t sampling_ratio) {
  check_features(features, strides);
  check_pooling(output_size, sampling_ratio);
  const ScalarType dtype = features[0].scalar_type();
  const cuda::Stream stream(features[0]);
  const Boxes at = check_boxes(boxes, index, features[0], dtype);
  const int channels = static_cast<int>(features[0].size(1)), bins = static_cast<int>(output_size);
  Tensor pooled = empty_maps(features[0], at.number, channels, bins, bins, channels_last(features));
  if (pooled.numel() == 0) return pooled;
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    choose_layout<T>(packed(features, kVector<T>), channels, [&](auto vector, auto dense) {
      const int items = bins * bins * (channels / vector);
      // Each thread prepares the box once for about four items, which hides the cost.
      const dim3 grid(at.number, std::clamp((items + 4 * kThreads - 1) / (4 * kThreads), 1, 65535));
      cuda::region_pool_forward<T, A, vector, dense><<<grid, kThreads, 0, stream.get()>>>(
          make_maps<const T>(features, strides), read<A>(at.boxes), read<int64_t>(at.index), channels, bins,
          static_cast<int>(sampling_ratio), write<T>(pooled), pooled_strides(pooled));
    });
  });
  cuda::check_launch("region_pool");
  return pooled;
}

std::vector<Tensor> region_pool_backward(Tensor grad, std::vector<int64_t> sizes, std::vector<double> strides,
                                         Tensor boxes, Tensor index, int64_t sampling_ratio, bool channels_last) {
  const cuda::Stream stream(grad);
  std::vector<Tensor> grads = empty_gradients(grad, sizes, strides, channels_last);
  check_features(grads, strides);
  check_pooling(grad.size(2), sampling_ratio);
  const Boxes at = check_boxes(boxes, index, grad, grad.scalar_type());
  STD_TORCH_CHECK(at.number == grad.size(0), "region_pool_backward: grad must have one row per box");
  STD_TORCH_CHECK(grads[0].size(1) == grad.size(1), "region_pool_backward: grad must have the channels of the maps");
  const int channels = static_cast<int>(grad.size(1)), bins = static_cast<int>(grad.size(2));
  int64_t canvases = 0;
  for (const Tensor& g : grads) canvases += g.size(0);
  if (canvases == 0 || channels == 0) return grads;

  const std::vector<int64_t> length{canvases + 1 + at.number};
  Tensor lists = torch::stable::empty(length, ScalarType::Int, std::nullopt, grad.device());
  int* begin = write<int>(lists);
  int* order = begin + canvases + 1;
  dispatch(grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    const auto maps = make_maps<T>(grads, strides);
    const A* b = read<A>(at.boxes);
    cuda::boxes_by_canvas<T, A><<<canvases, kThreads, 0, stream.get()>>>(maps, b, read<int64_t>(at.index),
                                                                         static_cast<int>(at.number), begin, order);
    cuda::check_launch("boxes_by_canvas");
    const bool dense = packed(grads, kVector<T>) && packed(grad, kVector<T>);
    choose_layout<T>(dense, channels, [&](auto vector, auto is_dense) {
      const int all = channels / vector;
      // Neighbouring threads take the same cell if channels are contiguous, and the same channels otherwise.
      const int groups = is_dense ? std::min<int>(std::bit_ceil(static_cast<unsigned>(all)), kThreads) : kThreads / 32;
      int64_t blocks = 0;
      for (const Tensor& g : grads) {
        const int64_t cells = g.size(2) * g.size(3), per_block = kThreads / groups;
        blocks += g.size(0) * ((cells + per_block - 1) / per_block);
      }
      const dim3 grid(blocks, (all + groups - 1) / groups);
      cuda::region_pool_backward<T, A, vector, is_dense>
          <<<grid, kThreads, 0, stream.get()>>>(read<T>(grad), pooled_strides(grad), maps, b, begin, order, channels,
                                                bins, static_cast<int>(sampling_ratio), groups);
    });
  });
  cuda::check_launch("region_pool_backward");
  return grads;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mcl, CUDA, library) {
  library.impl("region_pool", TORCH_BOX(&region_pool));
  library.impl("region_pool_backward", TORCH_BOX(&region_pool_backward));
}

}  // namespace mcl
