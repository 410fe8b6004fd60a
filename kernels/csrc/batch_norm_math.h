// Running statistics of BatchNorm, shared by CPU and CUDA kernels. Does not depend on torch.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace mcl {

// Running statistics, which are updated with one group after another. `mean` and `var` may be null.
template <typename A>
struct Running {
  A *mean, *var;
  int64_t* batches;  // number of earlier groups; required if momentum is negative
  double momentum;   // weight of a new group; if negative, the statistics are means over all groups so far

  // Updates channel `c` with a group: its number of rows, its mean, and the sum of squared distances from the mean.
  MCL_HOST_DEVICE void take(int group, int c, double rows, double of_group, double squares) const {
    if (mean == nullptr) return;
    const double share = momentum < 0 ? 1.0 / static_cast<double>(*batches + group + 1) : momentum;
    mean[c] = static_cast<A>((1 - share) * mean[c] + share * of_group);
    var[c] = static_cast<A>((1 - share) * var[c] + share * (squares / (rows - 1)));
  }
};

}  // namespace mcl
