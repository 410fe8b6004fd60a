// Elements that are read and written as one word.
#pragma once

namespace mcl::cuda {

template <typename T, int VEC>
struct alignas(sizeof(T) * VEC) Pack {
  T value[VEC];
};

}  // namespace mcl::cuda
