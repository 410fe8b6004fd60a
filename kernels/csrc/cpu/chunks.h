// Divides lists of tensors into chunks, which do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <vector>

#include "access.h"
#include "tensor_lists.h"

namespace mcl::cpu {

constexpr int64_t kChunk = 1 << 15;

struct Chunk {
  size_t tensor;
  int64_t offset, length;
};

// Chunks of tensors first .. last - 1, in order.
inline std::vector<Chunk> chunks_of(const TensorList& list, size_t first, size_t last) {
  std::vector<Chunk> chunks;
  for (size_t t = first; t < last; ++t)
    for (int64_t offset = 0; offset < list[t].numel(); offset += kChunk)
      chunks.push_back({t, offset, std::min(kChunk, list[t].numel() - offset)});
  return chunks;
}

// Calls f(i, chunks[i]) for all chunks, on all threads.
template <typename T, typename F>
void for_each_chunk(const std::vector<T>& chunks, const F& f) {
  torch::stable::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i, chunks[i]);
  });
}

}  // namespace mcl::cpu
