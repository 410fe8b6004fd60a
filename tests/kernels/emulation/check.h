// Shared by the test programs: random numbers, and comparisons that print what differs.
#pragma once

#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

namespace check {

inline int failures = 0;

// Fails if |got - expected| > tolerance * max(1, |expected|), or if only one of them is NaN.
template <typename T, typename U>
void close(const std::string& name, const std::vector<T>& got, const std::vector<U>& expected, double tolerance) {
  if (got.size() != expected.size()) {
    std::printf("%s: %zu elements, expected %zu\n", name.c_str(), got.size(), expected.size());
    ++failures;
    return;
  }
  for (size_t i = 0; i < got.size(); ++i) {
    const double g = static_cast<double>(got[i]), e = static_cast<double>(expected[i]);
    if (g == e || (std::isnan(g) && std::isnan(e))) continue;
    if (std::abs(g - e) <= tolerance * std::max(1.0, std::abs(e))) continue;
    std::printf("%s: element %zu is %.9g, expected %.9g\n", name.c_str(), i, g, e);
    ++failures;
    return;
  }
}

// Numbers in (-1, 1), the same on every machine.
class Random {
 public:
  double operator()() {
    state_ = state_ * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<double>(state_ >> 11) * 0x1p-52 - 1;
  }

 private:
  unsigned long long state_ = 1;
};

inline int report() {
  if (failures == 0) std::puts("ok");
  return failures == 0 ? 0 : 1;
}

}  // namespace check
