// Builds the tables of tensors that kernels take.
#pragma once

#include <array>

#include "access.h"
#include "cuda/tensor_table.cuh"
#include "tensor_lists.h"

namespace mcl::cuda {

// Calls launch(table, its chunks, number of its first tensor) for as many tables as the tensors fill.
template <typename T, int DEPTH, typename F>
void for_each_table(const std::array<const TensorList*, DEPTH>& lists, const F& launch) {
  using Table = TensorTable<T, DEPTH>;
  const size_t number = lists[0]->size();
  for (size_t first = 0; first < number; first += Table::kTensors) {
    Table table{};
    int chunks = 0;
    for (size_t t = first; t < number && table.count < Table::kTensors; ++t, ++table.count) {
      for (int d = 0; d < DEPTH; ++d) table.data[d][table.count] = elements<T>((*lists[d])[t]);
      table.size[table.count] = (*lists[0])[t].numel();
      table.first_chunk[table.count] = chunks;
      chunks += static_cast<int>((table.size[table.count] + kChunk - 1) / kChunk);
    }
    table.first_chunk[table.count] = chunks;
    launch(table, chunks, static_cast<int64_t>(first));
  }
}

}  // namespace mcl::cuda
