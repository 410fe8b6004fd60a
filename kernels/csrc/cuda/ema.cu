#include "cuda/ema.cuh"
#include "cuda/launch.h"
#include "cuda/tables.h"

namespace mcl {
namespace {

void ema_(TensorList targets, TensorList onlines, double momentum, std::optional<Tensor> found_inf) {
  if (targets.empty()) return;
  check_lists("ema_", {&targets, &onlines});
  const float* flag = flag_of("ema_", found_inf, targets);
  const cuda::Stream stream(targets[0]);
  dispatch_float(targets, [&](auto zero) {
    using T = decltype(zero);
    cuda::for_each_table<T, 2>({&targets, &onlines}, [&](const auto& table, int chunks, int64_t) {
      if (chunks == 0) return;
      cuda::ema_update<T><<<chunks, cuda::kTableThreads, 0, stream.get()>>>(table, static_cast<T>(momentum),
                                                                            static_cast<T>(1 - momentum), flag);
    });
  });
  cuda::check_launch("ema_");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mcl, CUDA, library) {
  library.impl("ema_", TORCH_BOX(&ema_));
}

}  // namespace mcl
