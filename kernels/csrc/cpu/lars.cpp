#include <cmath>
#include <optional>

#include "cpu/chunks.h"
#include "cpu/lars_kernel.h"
#include "tensor_lists.h"

namespace mcl {
namespace {

using namespace cpu;

template <typename T>
std::vector<double> norms_of(const TensorList& list, const std::vector<Chunk>& chunks, size_t first, size_t last) {
  std::vector<double> partial(chunks.size()), squares(last - first, 0.0);
  for_each_chunk(chunks, [&](int64_t i, const Chunk& chunk) {
    partial[i] = sum_of_squares(read<T>(list[chunk.tensor]) + chunk.offset, chunk.length);
  });
  for (size_t i = 0; i < chunks.size(); ++i) squares[chunks[i].tensor - first] += partial[i];
  for (double& s : squares) s = std::sqrt(s);
  return squares;
}

Tensor norms(TensorList tensors) {
  STD_TORCH_CHECK(!tensors.empty(), "norms: the list is empty");
  // Tensors may differ in shape, so each is checked as a list of its own.
  for (const Tensor& t : tensors) {
    const TensorList one{t};
    check_lists("norms", {&one});
    STD_TORCH_CHECK(t.scalar_type() == tensors[0].scalar_type(), "norms: tensors must share one dtype");
  }
  const std::vector<int64_t> size{static_cast<int64_t>(tensors.size())};
  Tensor result = torch::stable::empty(size, tensors[0].scalar_type(), std::nullopt, tensors[0].device());
  dispatch_float(tensors, [&](auto zero) {
    using T = decltype(zero);
    const std::vector<double> values = norms_of<T>(tensors, chunks_of(tensors, 0, tensors.size()), 0, tensors.size());
    std::copy(values.begin(), values.end(), write<T>(result));
  });
  return result;
}

// Tensors are processed in groups of up to this many elements. A group is still in the cache when its norms are known
// and the update starts, so a step makes five passes over memory instead of seven.
constexpr int64_t kTogether = 1 << 20;

void lars_(TensorList weights, TensorList grads, TensorList momenta, std::optional<Tensor> given, double lr,
           double momentum, double weight_decay, double trust_coefficient, bool adapt,
           std::optional<Tensor> found_inf) {
  if (weights.empty()) return;
  check_lists("lars_", {&weights, &grads, &momenta});
  const size_t number = weights.size();
  if (given)
    STD_TORCH_CHECK(given->numel() == static_cast<int64_t>(2 * number) && given->is_contiguous() &&
                        given->scalar_type() == weights[0].scalar_type() && given->is_cpu(),
                    "lars_: norms must be (2, tensors), contiguous, of the tensors' dtype and device");
  if (const float* flag = flag_of("lars_", found_inf, weights); flag && *flag != 0) return;
  dispatch_float(weights, [&](auto zero) {
    using T = decltype(zero);
    for (size_t first = 0, last = 0; first < number; first = last) {
      int64_t elements = 0;
      for (; last < number && (last == first || elements + weights[last].numel() <= kTogether); ++last)
        elements += weights[last].numel();
      const std::vector<Chunk> chunks = chunks_of(weights, first, last);
      std::vector<double> rates(last - first, lr);
      if (adapt) {
        std::vector<double> w, g;
        if (given) {
          const T* values = read<T>(*given);
          w.assign(values + first, values + last);
          g.assign(values + number + first, values + number + last);
        } else {
          w = norms_of<T>(weights, chunks, first, last);
          g = norms_of<T>(grads, chunks, first, last);
        }
        for (size_t t = 0; t < rates.size(); ++t) rates[t] *= trust_ratio(w[t], g[t], weight_decay, trust_coefficient);
      }
      for_each_chunk(chunks, [&](int64_t, const Chunk& chunk) {
        const size_t t = chunk.tensor;
        lars_update(write<T>(weights[t]) + chunk.offset, read<T>(grads[t]) + chunk.offset,
                    write<T>(momenta[t]) + chunk.offset, chunk.length, static_cast<T>(rates[t - first]),
                    static_cast<T>(momentum), static_cast<T>(weight_decay));
      });
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mcl, CPU, library) {
  library.impl("norms", TORCH_BOX(&norms));
  library.impl("lars_", TORCH_BOX(&lars_));
}

}  // namespace mcl
