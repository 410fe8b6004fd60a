// Many tensors in one launch: their addresses are part of the kernel's arguments.
#pragma once

#include <cstdint>

namespace mcl::cuda {

constexpr int kTableThreads = 256;
constexpr int kTableBytes = 4000;  // all arguments together may take 4 KiB
constexpr int kChunk = 1 << 14;    // elements per block

// DEPTH lists of up to kTensors tensors each. The t-th tensor of every list has size[t] elements, in chunks
// first_chunk[t] .. first_chunk[t + 1] - 1; chunks are numbered through all tensors of the table. Block b processes
// chunk b.
template <typename T, int DEPTH>
struct TensorTable {
  static constexpr int kTensors = (kTableBytes - 8) / (8 * DEPTH + 8 + 4);
  T* data[DEPTH][kTensors];
  int64_t size[kTensors];
  int first_chunk[kTensors + 1];
  int count;
};

struct Chunk {
  int tensor;
  int64_t begin, end;
};

template <typename T, int DEPTH>
__device__ __forceinline__ Chunk find_chunk(const TensorTable<T, DEPTH>& table, int chunk) {
  int low = 0, high = table.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.first_chunk[middle] <= chunk) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const int64_t begin = int64_t(chunk - table.first_chunk[low]) * kChunk;
  const int64_t end = begin + kChunk < table.size[low] ? begin + kChunk : table.size[low];
  return {low, begin, end};
}

// Whether an update must leave its tensors unchanged; `found_inf` may be null.
__device__ __forceinline__ bool skipped(const float* found_inf) {
  return found_inf != nullptr && *found_inf != 0;
}

// A word of 16 bytes.
template <typename T>
struct alignas(16) Word {
  static constexpr int kLength = 16 / sizeof(T);
  T value[kLength];
};

template <typename T>
__device__ __forceinline__ bool aligned(const T* p) {
  return reinterpret_cast<uint64_t>(p) % 16 == 0;
}

// If all lists are aligned, calls words(i) with the first element of every word of the chunk. Calls body(i) for all
// other elements.
template <typename T, int DEPTH, typename Words, typename Body>
__device__ __forceinline__ void for_each_element(const TensorTable<T, DEPTH>& table, const Chunk& chunk,
                                                 const Words& words, const Body& body) {
  bool whole = true;
  for (int d = 0; d < DEPTH; ++d) whole = whole && aligned(table.data[d][chunk.tensor]);
  int64_t begin = chunk.begin;
  if (whole) {
    const int64_t length = (chunk.end - begin) / Word<T>::kLength;
    for (int64_t i = threadIdx.x; i < length; i += kTableThreads) words(begin + i * Word<T>::kLength);
    begin += length * Word<T>::kLength;
  }
  for (int64_t i = begin + threadIdx.x; i < chunk.end; i += kTableThreads) body(i);
}

template <typename T>
__device__ __forceinline__ Word<T>& word(T* p) {
  return *reinterpret_cast<Word<T>*>(p);
}

template <typename T>
__device__ __forceinline__ const Word<T>& word(const T* p) {
  return *reinterpret_cast<const Word<T>*>(p);
}

}  // namespace mcl::cuda
