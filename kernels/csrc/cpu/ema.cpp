#include "cpu/chunks.h"
#include "cpu/ema_kernel.h"
#include "tensor_lists.h"

namespace mcl {
namespace {

using namespace cpu;

void ema_(TensorList targets, TensorList onlines, double momentum, std::optional<Tensor> found_inf) {
  if (targets.empty()) return;
  check_lists("ema_", {&targets, &onlines});
  if (const float* flag = flag_of("ema_", found_inf, targets); flag && *flag != 0) return;
  dispatch_float(targets, [&](auto zero) {
    using T = decltype(zero);
    for_each_chunk(chunks_of(targets, 0, targets.size()), [&](int64_t, const Chunk& chunk) {
      ema_update(write<T>(targets[chunk.tensor]) + chunk.offset, read<T>(onlines[chunk.tensor]) + chunk.offset,
                 chunk.length, static_cast<T>(momentum), static_cast<T>(1 - momentum));
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mcl, CPU, library) {
  library.impl("ema_", TORCH_BOX(&ema_));
}

}  // namespace mcl
