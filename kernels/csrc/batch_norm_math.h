// Running statistics of BatchNorm, which CPU and CUDA kernels share; free of torch.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace mcl {

// Running statistics, which take one group after the other; `mean` and `var` may be null.
template <typename A>
struct Running {
  A *mean, *var;
  int64_t* batches;  // groups before; needed without a momentum
  double momentum;   // share of a group; negative: of the mean of all groups so far

  // Channel `c` of a group of `rows` rows.
  MCL_HOST_DEVICE void take(int group, int c, double rows, double of_group, double squares) const {
    if (mean == nullptr) return;
    const double share = momentum < 0 ? 1.0 / static_cast<double>(*batches + group + 1) : momentum;
    mean[c] = static_cast<A>((1 - share) * mean[c] + share * of_group);
    var[c] = static_cast<A>((1 - share) * var[c] + share * (squares / (rows - 1)));
  }
};

}  // namespace mcl
