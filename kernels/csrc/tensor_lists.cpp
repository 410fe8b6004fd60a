#include "tensor_lists.h"

#include <algorithm>

namespace mcl {
namespace {

// Whether the elements fill a range of memory without gaps or overlaps.
bool without_gaps(const Tensor& t) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.size(d) != 1) dims.emplace_back(t.stride(d), t.size(d));
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

bool same_order(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != b.size(d) || (a.size(d) != 1 && a.stride(d) != b.stride(d))) return false;
  return true;
}

}  // namespace

void check_lists(const char* name, std::initializer_list<const TensorList*> lists) {
  const TensorList& first = **lists.begin();
  for (const TensorList* list : lists) {
    STD_TORCH_CHECK(list->size() == first.size(), name, ": the lists differ in length");
    for (size_t t = 0; t < list->size(); ++t) {
      const Tensor& tensor = (*list)[t];
      const auto dtype = tensor.scalar_type();
      STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, name,
                      ": tensors must be float32 or float64");
      STD_TORCH_CHECK(dtype == first[0].scalar_type() && tensor.device() == first[0].device(), name,
                      ": tensors must share one dtype and one device");
      STD_TORCH_CHECK(without_gaps(tensor) || tensor.numel() == 0, name, ": tensor ", t, " has gaps in memory");
      STD_TORCH_CHECK(same_order(tensor, first[t]), name, ": tensors ", t,
                      " differ in size or in the order of their elements in memory");
    }
  }
}

const float* flag_of(const char* name, const std::optional<Tensor>& found_inf, const TensorList& tensors) {
  if (!found_inf) return nullptr;
  STD_TORCH_CHECK(found_inf->numel() == 1 && found_inf->scalar_type() == ScalarType::Float &&
                      found_inf->device() == tensors[0].device(),
                  name, ": found_inf must be one float32 on the tensors' device");
  return static_cast<const float*>(found_inf->const_data_ptr());
}

}  // namespace mcl
