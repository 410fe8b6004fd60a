// Compares the CUDA kernels of norms, LARS and EMA, emulated on the CPU, with the CPU kernels.
#include "cuda_emulation.h"

#include "check.h"
#include "cpu/ema_kernel.h"
#include "cpu/lars_kernel.h"
#include "cuda/ema.cuh"
#include "cuda/lars.cuh"

namespace {

using namespace mcl;

// A list of tensors, in memory of exactly their size; every other tensor is not aligned to 16 bytes.
template <typename T>
struct List {
  std::vector<std::vector<T>> memory;

  explicit List(unsigned seed) {
    check::Random draw;
    for (unsigned i = 0; i < seed; ++i) draw();
    for (const int64_t size : {int64_t(1), int64_t(5), cuda::kChunk + 3L, int64_t(0), 2L * cuda::kChunk, int64_t(31)}) {
      memory.emplace_back(size + offset());
      for (T& x : memory.back()) x = static_cast<T>(draw());
    }
  }
  int offset() const { return static_cast<int>(memory.size() % 2); }
  int number() const { return static_cast<int>(memory.size()); }
  T* data(int t) { return memory[t].data() + t % 2; }
  int64_t size(int t) const { return static_cast<int64_t>(memory[t].size()) - t % 2; }
};

template <typename T, typename U, int DEPTH>
int fill(cuda::TensorTable<T, DEPTH>* table, List<U>* const (&lists)[DEPTH]) {
  int chunks = 0;
  for (int t = 0; t < lists[0]->number(); ++t) {
    for (int d = 0; d < DEPTH; ++d) table->data[d][t] = lists[d]->data(t);
    table->size[t] = lists[0]->size(t);
    table->first_chunk[t] = chunks;
    chunks += static_cast<int>((table->size[t] + cuda::kChunk - 1) / cuda::kChunk);
  }
  table->count = lists[0]->number();
  table->first_chunk[table->count] = chunks;
  return chunks;
}

template <typename T>
std::vector<T> norms_of(List<T>& list) {
  cuda::TensorTable<const T, 1> table{};
  const int chunks = fill(&table, {&list});
  std::vector<T> partial(chunks), norms(list.number());
  emulation::launch(chunks, cuda::kTableThreads, cuda::partial_squares<T>, table, partial.data());
  emulation::launch(list.number(), cuda::kTableThreads, cuda::finish_norms<T>, table, partial.data(), norms.data());
  return norms;
}

template <typename T>
void same(const std::string& name, const List<T>& got, const List<T>& expected, double tolerance) {
  for (size_t t = 0; t < got.memory.size(); ++t) check::close(name, got.memory[t], expected.memory[t], tolerance);
}

template <typename T>
void compare(const std::string& name, double tolerance) {
  const T lr = T(0.3), momentum = T(0.9), decay = T(0.01), coefficient = T(0.5);
  const float found = 1, not_found = 0;
  for (const bool adapt : {true, false}) {
    List<T> w(1), g(2), buffer(3);
    for (T& x : w.memory[0]) x = 0;  // weight and gradient are 0, so the trust ratio is 0 / 0
    for (T& x : g.memory[0]) x = 0;
    List<T> w_cpu = w, buffer_cpu = buffer;
    const std::vector<T> weight_norms = norms_of(w), grad_norms = norms_of(g);
    cuda::TensorTable<T, 3> table{};
    const int chunks = fill(&table, {&w, &g, &buffer});
    const auto update = [&](const float* found_inf) {
      emulation::launch(chunks, cuda::kTableThreads, cuda::lars_update<T>, table, adapt ? weight_norms.data() : nullptr,
                        adapt ? grad_norms.data() : nullptr, lr, momentum, decay, coefficient, found_inf);
    };
    update(&found);
    same(name + " weights of a skipped step", w, w_cpu, 0);
    same(name + " momenta of a skipped step", buffer, buffer_cpu, 0);
    for (int t = 0; t < w.number(); ++t) {
      const double norm = std::sqrt(cpu::sum_of_squares(w.data(t), w.size(t)));
      check::close(name + " norm", std::vector<T>{weight_norms[t]}, std::vector<double>{norm}, tolerance);
      const T rate = lr * (adapt ? cpu::trust_ratio<T>(weight_norms[t], grad_norms[t], decay, coefficient) : T(1));
      cpu::lars_update(w_cpu.data(t), g.data(t), buffer_cpu.data(t), w.size(t), rate, momentum, decay);
    }
    update(adapt ? nullptr : &not_found);
    same(name + " weights", w, w_cpu, tolerance);
    same(name + " momenta", buffer, buffer_cpu, tolerance);
  }

  List<T> target(4), online(5);
  List<T> target_cpu = target;
  cuda::TensorTable<T, 2> table{};
  const int chunks = fill(&table, {&target, &online});
  const auto update = [&](const float* found_inf) {
    emulation::launch(chunks, cuda::kTableThreads, cuda::ema_update<T>, table, momentum, 1 - momentum, found_inf);
  };
  update(&found);
  same(name + " momentum network of a skipped step", target, target_cpu, 0);
  for (const float* found_inf : {&not_found, static_cast<const float*>(nullptr)}) {
    update(found_inf);
    for (int t = 0; t < target.number(); ++t)
      cpu::ema_update(target_cpu.data(t), online.data(t), target.size(t), momentum, 1 - momentum);
    same(name + " momentum network", target, target_cpu, tolerance);
  }
}

}  // namespace

int main() {
  compare<float>("fp32", 2e-6);
#ifndef __SANITIZE_THREAD__  // slow, and races do not depend on precision
  compare<double>("fp64", 1e-14);
#endif
  return check::report();
}
