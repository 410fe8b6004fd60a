#include "region_pool.h"

#include "cpu/region_pool_kernel.h"

namespace mcl {
namespace {

Tensor region_pool(std::vector<Tensor> features, std::vector<double> strides, Tensor boxes, Tensor index,
                   int64_t output_size, int64_t sampling_ratio) {
  check_features(features, strides);
  check_pooling(output_size, sampling_ratio);
  const ScalarType dtype = features[0].scalar_type();
  const Boxes at = check_boxes(boxes, index, features[0], dtype);
  const int channels = static_cast<int>(features[0].size(1));
  Tensor pooled = empty_maps(features[0], at.number, channels, output_size, output_size, channels_last(features));
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    const auto maps = make_maps<const T>(features, strides);
    torch::stable::parallel_for(0, at.number, 1, [&](int64_t first, int64_t last) {
      cpu::region_pool_forward<T, A>(maps, read<A>(at.boxes), read<int64_t>(at.index), channels,
                                     static_cast<int>(output_size), static_cast<int>(sampling_ratio), write<T>(pooled),
                                     pooled_strides(pooled), first, last);
    });
  });
  return pooled;
}

std::vector<Tensor> region_pool_backward(Tensor grad, std::vector<int64_t> sizes, std::vector<double> strides,
                                         Tensor boxes, Tensor index, int64_t sampling_ratio, bool channels_last) {
  std::vector<Tensor> grads = empty_gradients(grad, sizes, strides, channels_last);
  check_features(grads, strides);
  check_pooling(grad.size(2), sampling_ratio);
  const Boxes at = check_boxes(boxes, index, grad, grad.scalar_type());
  STD_TORCH_CHECK(at.number == grad.size(0), "region_pool_backward: grad must have one row per box");
  STD_TORCH_CHECK(grads[0].size(1) == grad.size(1), "region_pool_backward: grad must have the channels of the maps");
  dispatch(grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    const auto maps = make_maps<T>(grads, strides);
    const A* b = read<A>(at.boxes);
    const cpu::BoxesByCanvas boxes_by(maps, b, read<int64_t>(at.index), at.number);
    // Each thread computes a range of channels, so that threads have equal work and need no synchronisation.
    torch::stable::parallel_for(0, grad.size(1), 16, [&](int64_t first, int64_t last) {
      cpu::region_pool_backward<T, A>(read<T>(grad), pooled_strides(grad), maps, b, boxes_by,
                                      static_cast<int>(grad.size(2)), static_cast<int>(sampling_ratio), first, last);
    });
  });
  return grads;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mcl, CPU, library) {
  library.impl("region_pool", TORCH_BOX(&region_pool));
  library.impl("region_pool_backward", TORCH_BOX(&region_pool_backward));
}

}  // namespace mcl
