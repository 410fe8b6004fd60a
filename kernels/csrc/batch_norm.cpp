#include "batch_norm.h"

namespace mcl {
namespace {

ScalarType computed_in(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_channels_last(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 || t.dim() == 4, "batch_norm: ", name, " must be (n, c) or (n, c, h, w)");
  // In channels_last, strides grow from channels over columns and rows to maps; a dimension of size 1 has any stride.
  int64_t expected = 1;
  for (const int64_t d : t.dim() == 4 ? Counts{1, 3, 2, 0} : Counts{1, 0}) {
    STD_TORCH_CHECK(t.size(d) == 1 || t.stride(d) == expected, "batch_norm: ", name, " must be channels_last");
    expected *= t.size(d);
  }
}

}  // namespace

Rows::Rows(const Tensor& x, const Counts& counts) : channels(0), first{0} {
  check_channels_last(x, "x");
  channels = x.size(1);
  const int64_t cells = x.dim() == 4 ? x.size(2) * x.size(3) : 1;
  for (const int64_t count : counts) {
    STD_TORCH_CHECK(count > 0, "batch_norm: counts must be positive");
    first.push_back(first.back() + count * cells);
  }
  STD_TORCH_CHECK(first.back() == x.size(0) * cells, "batch_norm: counts must add up to the first dimension of x");
}

void check_like(const Tensor& t, const Tensor& x, const char* name) {
  bool same = t.dim() == x.dim() && t.scalar_type() == x.scalar_type() && t.device() == x.device();
  for (int64_t d = 0; same && d < x.dim(); ++d) same = t.size(d) == x.size(d);
  STD_TORCH_CHECK(same, "batch_norm: ", name, " must have the shape, dtype and device of x");
  check_channels_last(t, name);
}

void check_small(const std::optional<Tensor>& t, const Tensor& x, int64_t size, const char* name) {
  if (!t) return;
  STD_TORCH_CHECK(
      t->numel() == size && t->is_contiguous() && t->scalar_type() == computed_in(x) && t->device() == x.device(),
      "batch_norm: ", name, " must be contiguous, of ", size,
      " elements, on the device of x, float64 for a float64 x and float32 otherwise");
}

void check_apply(const Rows& all, const Tensor& x, const std::optional<Tensor>& weight,
                 const std::optional<Tensor>& bias, const Tensor& statistics) {
  check_small(weight, x, all.channels, "weight");
  check_small(bias, x, all.channels, "bias");
  check_small(statistics, x, all.groups() * all.statistics(), "statistics");
}

void check_combine(const Tensor& parts, const std::optional<double>& momentum,
                   const std::optional<Tensor>& running_mean, const std::optional<Tensor>& running_var,
                   const std::optional<Tensor>& batches) {
  STD_TORCH_CHECK(parts.dim() == 3 && parts.size(2) % 2 == 1 && parts.is_contiguous() &&
                      (parts.scalar_type() == ScalarType::Double || parts.scalar_type() == ScalarType::Float),
                  "batch_norm: statistics must be contiguous (processes, groups, 2 C + 1), float64 or float32");
  const int64_t channels = parts.size(2) / 2;
  check_small(running_mean, parts, channels, "running_mean");
  check_small(running_var, parts, channels, "running_var");
  STD_TORCH_CHECK(running_mean.has_value() == running_var.has_value(),
                  "batch_norm: running_mean and running_var go together");
  STD_TORCH_CHECK(!running_mean || batches || momentum, "batch_norm: without momentum, num_batches_tracked is needed");
  if (batches)
    STD_TORCH_CHECK(
        batches->numel() == 1 && batches->scalar_type() == ScalarType::Long && batches->device() == parts.device(),
        "batch_norm: num_batches_tracked must be one int64 on the device of x");
}

Tensor empty_small(const Tensor& x, std::vector<int64_t> size) {
  return torch::stable::empty(size, computed_in(x), std::nullopt, x.device());
}

}  // namespace mcl
