// Many tensors in one launch: their addresses travel with the kernel's arguments.
#pragma once

#include <cstdint>

namespace mcl::cuda {

constexpr int kTableThreads = 256;
constexpr int kTableBytes = 4000;  // arguments may take 4 KiB in all
constexpr int kChunk = 1 << 14;    // elements of one block

// DEPTH lists of up to kTensors tensors each; the t-th of all lists have size[t] elements and end before chunk
// first_chunk[t + 1], counted through all tensors of the table. Block b works on chunk b.
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

// Whether an update leaves its tensors as they are; `found_inf` may be null.
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

// Calls body(i) for the elements of the chunk that do not fill words, and words(i) for the first element of every word
// where all lists are aligned.
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
