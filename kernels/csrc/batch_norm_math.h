// Statistics of BatchNorm per channel, which CPU and CUDA kernels share; free of torch.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace mcl {

// What becomes of a group's statistics in the running ones.
struct Tracking {
  const int64_t* batches;  // groups before; needed without a momentum
  double momentum;         // share of a group; negative: of the mean of all groups so far

  MCL_HOST_DEVICE double share(int group) const {
    return momentum < 0 ? 1.0 / static_cast<double>(*batches + group + 1) : momentum;
  }
};

// Channel `c` of all groups over all processes, in the order of these: `statistics` from `parts`, as batch_norm.h has
// them. Running statistics, which may be null, take one group after the other.
template <typename A>
MCL_HOST_DEVICE void combine(const A* parts, int processes, int groups, int channels, int c, A* running_mean,
                             A* running_var, const Tracking& tracking, double eps, A* statistics) {
  const int64_t size = 2 * int64_t(channels) + 1, step = groups * size;
  for (int g = 0; g < groups; ++g) {
    double rows = 0, mean = 0, squares = 0;
    const A* part = parts + g * size;
    for (int p = 0; p < processes; ++p) {
      const double own = part[p * step + 2 * channels];
      rows += own;
      mean += own * part[p * step + c];
    }
    mean /= rows;
    for (int p = 0; p < processes; ++p) {
      const double distance = part[p * step + c] - mean;
      squares += part[p * step + channels + c] + part[p * step + 2 * channels] * distance * distance;
    }
    A* to = statistics + g * size;
    to[c] = static_cast<A>(mean);
    to[channels + c] = static_cast<A>(1 / std::sqrt(squares / rows + eps));
    if (c == 0) to[2 * channels] = static_cast<A>(rows);
    if (running_mean == nullptr) continue;
    const double share = tracking.share(g);
    running_mean[c] = static_cast<A>((1 - share) * running_mean[c] + share * mean);
    running_var[c] = static_cast<A>((1 - share) * running_var[c] + share * (squares / (rows - 1)));
  }
}

}  // namespace mcl
