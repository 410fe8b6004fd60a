// Elements of maps that are computed with in fp32, or as they are; free of torch.
#pragma once

#include <bit>
#include <cstdint>

namespace mcl::cpu {

struct BFloat16 {
  uint16_t bits;
};

template <typename A>
inline A load(const A* x) {
  return *x;
}

inline float load(const BFloat16* x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x->bits) << 16);
}

template <typename A>
inline void store(A* to, A value) {
  *to = value;
}

// To the nearest, ties to even; NaN stays NaN.
inline void store(BFloat16* to, float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  to->bits = static_cast<uint16_t>(value == value ? rounded : 0x7fc0);
}

}  // namespace mcl::cpu
