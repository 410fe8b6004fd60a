// Builds the tables of tensors that kernels take.
#pragma once

#include <array>
#include <type_traits>

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
      for (int d = 0; d < DEPTH; ++d) {
        const Tensor& tensor = (*lists[d])[t];
        if constexpr (std::is_const_v<T>) {
          table.data[d][table.count] = static_cast<T*>(tensor.const_data_ptr());
        } else {
          table.data[d][table.count] = static_cast<T*>(tensor.mutable_data_ptr());
        }
      }
      table.size[table.count] = (*lists[0])[t].numel();
      table.first_chunk[table.count] = chunks;
      chunks += static_cast<int>((table.size[table.count] + kChunk - 1) / kChunk);
    }
    table.first_chunk[table.count] = chunks;
    launch(table, chunks, static_cast<int64_t>(first));
  }
}

}  // namespace mcl::cuda
