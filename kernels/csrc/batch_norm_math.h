// Statistics of BatchNorm per channel, which CPU and CUDA kernels share; free of torch.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace mcl {

// Rows, their mean, and the sum of squared distances from it, of one channel.
struct Moments {
  double rows = 0, mean = 0, squares = 0;

  // Chan, Golub and LeVeque's update by other rows.
  MCL_HOST_DEVICE void add(double other_rows, double other_mean, double other_squares) {
    if (other_rows == 0) return;
    const double all = rows + other_rows, distance = other_mean - mean, share = other_rows / all;
    mean += distance * share;
    squares += other_squares + distance * distance * rows * share;
    rows = all;
  }
};

// What becomes of a group's statistics in the running ones.
struct Tracking {
  const int64_t* batches;  // groups before; needed without a momentum
  double momentum;         // share of a group; negative: of the mean of all groups so far

  MCL_HOST_DEVICE double share(int64_t group) const {
    return momentum < 0 ? 1.0 / static_cast<double>(*batches + group + 1) : momentum;
  }
};

// Channel `c` of all groups over all processes, in the order of these: `statistics` from `parts`, as batch_norm.h has
// them. Running statistics, which may be null, take one group after the other.
template <typename A>
MCL_HOST_DEVICE void combine(const A* parts, int64_t processes, int64_t groups, int64_t channels, int64_t c,
                             A* running_mean, A* running_var, const Tracking& tracking, double eps, A* statistics) {
  const int64_t size = 2 * channels + 1;
  for (int64_t g = 0; g < groups; ++g) {
    Moments all;
    for (int64_t p = 0; p < processes; ++p) {
      const A* part = parts + (p * groups + g) * size;
      all.add(part[2 * channels], part[c], part[channels + c]);
    }
    A* to = statistics + g * size;
    to[c] = static_cast<A>(all.mean);
    to[channels + c] = static_cast<A>(1 / std::sqrt(all.squares / all.rows + eps));
    if (c == 0) to[2 * channels] = static_cast<A>(all.rows);
    if (running_mean == nullptr) continue;
    const double share = tracking.share(g);
    running_mean[c] = static_cast<A>((1 - share) * running_mean[c] + share * all.mean);
    running_var[c] = static_cast<A>((1 - share) * running_var[c] + share * (all.squares / (all.rows - 1)));
  }
}

}  // namespace mcl
