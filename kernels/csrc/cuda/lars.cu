#include <optional>

#include "cuda/lars.cuh"
#include "cuda/launch.h"
#include "cuda/tables.h"

namespace mcl {
namespace {

using cuda::kTableThreads;

Tensor norms(TensorList tensors) {
  STD_TORCH_CHECK(!tensors.empty(), "norms: the list is empty");
  for (const Tensor& t : tensors) {
    const TensorList one{t};
    check_lists("norms", {&one});
    STD_TORCH_CHECK(t.scalar_type() == tensors[0].scalar_type() && t.device() == tensors[0].device(),
                    "norms: tensors must share one dtype and one device");
  }
  const cuda::Stream stream(tensors[0]);
  const auto empty = [&](int64_t n) {
    const std::vector<int64_t> size{n};
    return torch::stable::empty(size, tensors[0].scalar_type(), std::nullopt, tensors[0].device());
  };
  Tensor result = empty(static_cast<int64_t>(tensors.size()));
  dispatch_float(tensors, [&](auto zero) {
    using T = decltype(zero);
    cuda::for_each_table<const T, 1>({&tensors}, [&](const auto& table, int chunks, int64_t first) {
      Tensor partial = empty(chunks);  // may be freed after the launches: memory is reused in the order of the stream
      T* sums = write<T>(partial);
      if (chunks > 0) cuda::partial_squares<T><<<chunks, kTableThreads, 0, stream.get()>>>(table, sums);
      cuda::finish_norms<T><<<table.count, kTableThreads, 0, stream.get()>>>(table, sums, write<T>(result) + first);
    });
  });
  cuda::check_launch("norms");
  return result;
}

void lars_(TensorList weights, TensorList grads, TensorList momenta, std::optional<Tensor> given, double lr,
           double momentum, double weight_decay, double trust_coefficient, bool adapt,
           std::optional<Tensor> found_inf) {
  if (weights.empty()) return;
  check_lists("lars_", {&weights, &grads, &momenta});
  const auto number = static_cast<int64_t>(weights.size());
  if (adapt && !given) {
    TensorList both = weights;
    both.insert(both.end(), grads.begin(), grads.end());
    given = norms(both);
  }
  if (given)
    STD_TORCH_CHECK(given->numel() == 2 * number && given->is_contiguous() &&
                        given->scalar_type() == weights[0].scalar_type() && given->device() == weights[0].device(),
                    "lars_: norms must be (2, tensors), contiguous, of the tensors' dtype and device");
  const float* flag = flag_of("lars_", found_inf, weights);
  const cuda::Stream stream(weights[0]);
  dispatch_float(weights, [&](auto zero) {
    using T = decltype(zero);
    const T* values = read<T>(given);
    cuda::for_each_table<T, 3>({&weights, &grads, &momenta}, [&](const auto& table, int chunks, int64_t first) {
      if (chunks == 0) return;
      cuda::lars_update<T><<<chunks, kTableThreads, 0, stream.get()>>>(
          table, adapt ? values + first : nullptr, adapt ? values + number + first : nullptr, static_cast<T>(lr),
          static_cast<T>(momentum), static_cast<T>(weight_decay), static_cast<T>(trust_coefficient), flag);
    });
  });
  cuda::check_launch("lars_");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mcl, CUDA, library) {
  library.impl("norms", TORCH_BOX(&norms));
  library.impl("lars_", TORCH_BOX(&lars_));
}

}  // namespace mcl
