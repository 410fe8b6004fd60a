// Compares the emulation with plain loops. If one of FAULT_MISSING_BARRIER, FAULT_SHUFFLE_AS_BARRIER and
// FAULT_OUT_OF_BOUNDS is defined, a kernel has this fault, which a sanitizer must find.
#include <vector>

#include "cuda_emulation.h"

namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kThreads = 256;

// sums[b] = sum of x[b * blockDim.x] .. x[(b + 1) * blockDim.x - 1]. blockDim.x: a power of 2.
__global__ void __launch_bounds__(kThreads) sum_shared(const float* x, float* sums) {
  __shared__ float part[kThreads];
#ifdef FAULT_OUT_OF_BOUNDS
  ++x;
#endif
  part[threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
  for (unsigned distance = blockDim.x / 2; distance > 0; distance /= 2) {
#ifndef FAULT_MISSING_BARRIER
    __syncthreads();
#endif
    if (threadIdx.x < distance) part[threadIdx.x] += part[threadIdx.x + distance];
  }
  if (threadIdx.x == 0) sums[blockIdx.x] = part[0];
}

// The same with shuffles, for any blockDim.x: the last warp may have fewer lanes.
template <typename T>
__global__ void sum_shuffled(const T* x, T* sums) {
  __shared__ T part[32];
  const int lane = threadIdx.x % warpSize, warp = threadIdx.x / warpSize;
  const int lanes = min(warpSize, static_cast<int>(blockDim.x) - warp * warpSize);
  T sum = x[blockIdx.x * blockDim.x + threadIdx.x];
  for (int distance = 16; distance > 0; distance /= 2) {
    const T other = __shfl_down_sync(kAll, sum, distance);
    if (lane + distance < lanes) sum += other;
  }
  if (lane == 0) part[warp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (unsigned w = 1; w < (blockDim.x + warpSize - 1) / warpSize; ++w) sum += part[w];
    sums[blockIdx.x] = sum;
  }
}

// Neighbours exchange values through shared memory.
__global__ void swap_neighbours(const int* x, int* out) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = x[threadIdx.x];
#ifdef FAULT_SHUFFLE_AS_BARRIER
  __shfl_down_sync(kAll, 0, 0);
#else
  __syncthreads();
#endif
  out[threadIdx.x] = values[threadIdx.x ^ 1];
}

// out[0] .. out[*kept - 1] = the odd values among x[0] .. x[count - 1], in order. One block.
__global__ void compact(const int* x, int count, int* out, int* kept) {
  __shared__ int warps[32];
  const int lane = threadIdx.x % warpSize, warp = threadIdx.x / warpSize;
  int done = 0;
  for (int first = 0; first < count; first += blockDim.x) {
    const int i = first + threadIdx.x;
    const bool keep = i < count && x[i] % 2 == 1;
    const unsigned ballot = __ballot_sync(kAll, keep);
    if (lane == 0) warps[warp] = __popc(ballot);
    __syncthreads();
    int rank = done + __popc(ballot & ((1u << lane) - 1u));
    for (int w = 0; w < warp; ++w) rank += warps[w];
    if (keep) out[rank] = x[i];
    for (unsigned w = 0; w < (blockDim.x + warpSize - 1) / warpSize; ++w) done += warps[w];
    __syncthreads();
  }
  if (threadIdx.x == 0) *kept = done;
}

// Threads return at every step, in whole warps and in parts of warps; the others continue to meet.
__global__ void leave_early(int* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = -1;
  if (threadIdx.x % 2 == 1) return;
  __syncthreads();
  if (threadIdx.x >= 64) return;
  const unsigned ballot = __ballot_sync(kAll, 1);
  const unsigned from_odd = __shfl_down_sync(kAll, threadIdx.x, 1);  // this lane has returned: the caller's own value
  __syncthreads();
  if (ballot == 0x55555555u && from_odd == threadIdx.x) out[i] = 1;
}

// Block b shuffles by distances[b].
template <typename T>
__global__ void shuffle(const int* distances, T* out) {
  const T x = T(threadIdx.x) + T(100);
  out[blockIdx.x * blockDim.x + threadIdx.x] = __shfl_down_sync(kAll, x, distances[blockIdx.x]);
}

__global__ void indices(dim3* thread, dim3* block) {
  const unsigned b = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned t = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned i = b * blockDim.x * blockDim.y * blockDim.z + t;
  thread[i] = {threadIdx.x, threadIdx.y, threadIdx.z};
  block[i] = {blockIdx.x, blockIdx.y, blockIdx.z};
}

bool failed = false;

template <typename T>
void check(const char* what, const T* result, const T* expected, int size) {
  for (int i = 0; i < size; ++i) {
    if (result[i] == expected[i]) continue;
    std::printf("%s: [%d] is %g, not %g\n", what, i, double(result[i]), double(expected[i]));
    failed = true;
    return;
  }
}

template <typename T>
void check_sum(const char* what, void (*kernel)(const T*, T*), int block, int blocks) {
  std::vector<T> x(block * blocks), sums(blocks), expected(blocks);
  for (int i = 0; i < block * blocks; ++i) {
    x[i] = T(i * 37 % 101);  // small integers, whose sum is exact in any order
    expected[i / block] += x[i];
  }
  emulation::launch(blocks, block, kernel, x.data(), sums.data());
  check(what, sums.data(), expected.data(), blocks);
}

void check_swap() {
  std::vector<int> x(kThreads), out(kThreads), expected(kThreads);
  for (int i = 0; i < kThreads; ++i) expected[i ^ 1] = x[i] = 3 * i;
  emulation::launch(1, kThreads, swap_neighbours, x.data(), out.data());
  check("swap", out.data(), expected.data(), kThreads);
}

void check_compact(int block, int count) {
  std::vector<int> x(count), out(count), expected(count);
  int number = 0, kept = 0;
  for (int i = 0; i < count; ++i) {
    x[i] = i * i % 23;
    if (x[i] % 2 == 1) expected[number++] = x[i];
  }
  emulation::launch(1, block, compact, x.data(), count, out.data(), &kept);
  check("compacted number", &kept, &number, 1);
  check("compacted", out.data(), expected.data(), count);
}

void check_leave_early() {
  const int block = 128, blocks = 3;
  std::vector<int> out(block * blocks), expected(block * blocks);
  for (int i = 0; i < block * blocks; ++i) expected[i] = i % 2 == 0 && i % block < 64 ? 1 : -1;
  emulation::launch(blocks, block, leave_early, out.data());
  check("early exit", out.data(), expected.data(), block * blocks);
}

// The rules of CUDA's programming guide and of shfl.sync in PTX. The second warp is half a warp.
template <typename T>
void check_shuffles(const char* what) {
  const std::vector<int> distances{0, 1, 5, 16, 31};
  const int block = 48, number = static_cast<int>(distances.size());
  std::vector<T> out(number * block), expected(number * block);
  for (int i = 0; i < number * block; ++i) {
    const int thread = i % block, by = distances[i / block];
    expected[i] = T((thread % 32 + by < 32 && thread + by < block ? thread + by : thread) + 100);
  }
  emulation::launch(number, block, shuffle<T>, distances.data(), out.data());
  check(what, out.data(), expected.data(), number * block);
}

void check_indices() {
  const dim3 grid(3, 2, 2), block(4, 3, 2);
  const int size = 12 * 24;
  std::vector<dim3> thread(size), in(size);
  emulation::launch(grid, block, indices, thread.data(), in.data());
  std::vector<unsigned> result(6 * size), expected(6 * size);
  for (unsigned i = 0; i < unsigned(size); ++i) {
    const unsigned t = i % 24, b = i / 24;
    const unsigned is[] = {thread[i].x, thread[i].y, thread[i].z, in[i].x, in[i].y, in[i].z};
    const unsigned must[] = {t % 4, t / 4 % 3, t / 12, b % 3, b / 3 % 2, b / 6};
    for (int k = 0; k < 6; ++k) result[6 * i + k] = is[k], expected[6 * i + k] = must[k];
  }
  check("indices", result.data(), expected.data(), 6 * size);
}

void check_functions() {
  const int result[] = {__popc(0xf0f0u), __popc(kAll), min(2, 3)};
  const int expected[] = {8, 32, 2};
  check("functions", result, expected, 3);
}

}  // namespace

int main() {
#if defined(FAULT_MISSING_BARRIER) || defined(FAULT_OUT_OF_BOUNDS)
  check_sum<float>("sum in shared memory", sum_shared, 256, 5);
#elif defined(FAULT_SHUFFLE_AS_BARRIER)
  check_swap();
#else
  check_sum<float>("sum in shared memory", sum_shared, 256, 5);
  check_sum<float>("sum by shuffles, float", sum_shuffled, 80, 3);
  check_sum<double>("sum by shuffles, double", sum_shuffled, 64, 2);
  check_swap();
  check_compact(96, 250);
  check_compact(40, 33);
  check_leave_early();
  check_shuffles<int>("shuffles, int");
  check_shuffles<unsigned>("shuffles, unsigned");
  check_shuffles<float>("shuffles, float");
  check_shuffles<double>("shuffles, double");
  check_indices();
  check_functions();
#endif
  if (!failed) std::puts("emulation: as plain loops");
  return failed;
}
