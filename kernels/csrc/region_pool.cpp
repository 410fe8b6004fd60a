#include "region_pool.h"

#include <limits>

namespace mcl {

Boxes check_boxes(const Tensor& boxes, const Tensor& index, const Tensor& on, ScalarType dtype) {
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 5, "region_pool: boxes must be (R, 5): row, x1, y1, x2, y2");
  STD_TORCH_CHECK(index.dim() == 1 && index.size(0) == boxes.size(0), "region_pool: index must be (R,), one per box");
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Long, "region_pool: index must be int64");
  STD_TORCH_CHECK(boxes.device() == on.device() && index.device() == on.device(),
                  "region_pool: boxes and index must be on the device of the features");
  STD_TORCH_CHECK(boxes.size(0) <= std::numeric_limits<int>::max(), "region_pool: too many boxes");
  const auto accumulation = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return {torch::stable::contiguous(torch::stable::to(boxes, accumulation)), torch::stable::contiguous(index),
          boxes.size(0)};
}

void check_features(const std::vector<Tensor>& features, const std::vector<double>& strides) {
  STD_TORCH_CHECK(!features.empty() && features.size() <= kMaxMaps, "region_pool: between 1 and ", kMaxMaps,
                  " maps are needed, got ", features.size());
  STD_TORCH_CHECK(strides.size() == features.size(), "region_pool: strides must be one per map");
  const Tensor& first = features[0];
  for (size_t m = 0; m < features.size(); ++m) {
    const Tensor& f = features[m];
    STD_TORCH_CHECK(f.dim() == 4 && f.size(1) == first.size(1),
                    "region_pool: features must be (n, C, H, W) with the same C");
    STD_TORCH_CHECK(f.scalar_type() == first.scalar_type() && f.device() == first.device(),
                    "region_pool: features must share one dtype and one device");
    STD_TORCH_CHECK(f.size(2) > 0 && f.size(3) > 0, "region_pool: a map must have at least one cell");
    STD_TORCH_CHECK(strides[m] > 0, "region_pool: strides must be positive");
    for (int d = 0; d < 4; ++d)
      STD_TORCH_CHECK(f.size(d) <= std::numeric_limits<int>::max(), "region_pool: a map is too large");
  }
}

void check_pooling(int64_t output_size, int64_t sampling_ratio) {
  // A bin's samples are counted in int, along one axis.
  STD_TORCH_CHECK(output_size > 0 && output_size <= 1024, "region_pool: output_size must lie in 1..1024");
  STD_TORCH_CHECK(sampling_ratio >= 0 && sampling_ratio <= 1024, "region_pool: sampling_ratio must lie in 0..1024");
}

bool channels_last(const std::vector<Tensor>& features) {
  for (const Tensor& f : features)
    if (f.stride(1) != 1) return false;
  return true;
}

Tensor empty_maps(const Tensor& like, int64_t rows, int64_t channels, int64_t height, int64_t width,
                  bool channels_last) {
  const std::vector<int64_t> size{rows, channels, height, width};
  return torch::stable::empty(
      size, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
      channels_last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous);
}

std::vector<Tensor> empty_gradients(const Tensor& grad, const std::vector<int64_t>& sizes,
                                    const std::vector<double>& strides, bool channels_last) {
  STD_TORCH_CHECK(sizes.size() == 4 * strides.size(), "region_pool_backward: sizes must be four per map");
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(2) == grad.size(3),
                  "region_pool_backward: grad must be (R, C, output_size, output_size)");
  std::vector<Tensor> grads;
  for (size_t m = 0; m < strides.size(); ++m) {
    const int64_t* s = sizes.data() + 4 * m;
    grads.push_back(empty_maps(grad, s[0], s[1], s[2], s[3], channels_last));
  }
  return grads;
}

}  // namespace mcl
