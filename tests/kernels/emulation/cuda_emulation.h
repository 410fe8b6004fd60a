// Runs CUDA kernels on the CPU, for tests: one real thread per CUDA thread, so that AddressSanitizer sees every access
// out of bounds, and ThreadSanitizer every access that no barrier orders. Include this, then files of plain kernels.
//
// As in CUDA:
//   - Blocks run one after another, the threads of a block concurrently. A thread may return before a barrier at which
//     others wait.
//   - __shared__ variables are static: like shared memory, they keep the values of the previous block.
//   - __syncthreads orders memory. Shuffles and ballots do not: ThreadSanitizer reports code that relies on them.
//   - For lanes that have returned or do not exist, a shuffle returns the caller's own value (undefined in CUDA), and a
//     ballot has no bit.
//
// Unlike CUDA:
//   - Blocks never run concurrently: races between blocks are not found, and waiting for another block hangs.
//   - Warp functions need the whole warp: a mask without a running thread is an error.
//   - Threads that wait at different barriers, in different branches, meet as if it were the same barrier.
//   - Shared memory that was never written contains zeros. There is no dynamic shared memory.
//   - There are no streams: a launch returns when it is done. Only one thread of the host may launch.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <thread>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline constinit thread_local uint3 threadIdx{}, blockIdx{};
inline constinit dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

using std::max;
using std::min;

#ifdef __SANITIZE_THREAD__
extern "C" void AnnotateIgnoreSyncBegin(const char* file, int line);
extern "C" void AnnotateIgnoreSyncEnd(const char* file, int line);
#endif

namespace emulation {

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "emulation: %s\n", message);
  std::abort();
}

// During its lifetime, ThreadSanitizer ignores synchronisation by this thread.
struct Unordered {
#ifdef __SANITIZE_THREAD__
  Unordered() { AnnotateIgnoreSyncBegin(__FILE__, __LINE__); }
  ~Unordered() { AnnotateIgnoreSyncEnd(__FILE__, __LINE__); }
#else
  Unordered() {}
#endif
  Unordered(const Unordered&) = delete;
};

// A barrier of `threads` threads, some of which may leave; when all have left, it is reset. All fields are atomic, so
// that it may be used while Unordered.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads), expected_(threads), pending_(threads) {}

  // Returns the sum of the values that all threads pass.
  uint64_t wait(uint64_t brought = 0) {
    const unsigned phase = phase_.load();
    brought_ += brought;
    if (!arrive()) {
      const Unordered hidden;  // the standard library keeps one list of waiting threads for several barriers
      phase_.wait(phase);
    }
    phase_.load();  // orders memory
    return total_;
  }

  void leave() {
    --expected_;
    arrive();
  }

 private:
  bool arrive() {
    if (--pending_ != 0) return false;
    // The last thread: all others wait for the next phase, or have left.
    if (expected_ == 0) expected_ = threads_;
    pending_ = expected_.load();
    total_ = brought_.exchange(0);
    ++phase_;
    phase_.notify_all();
    return true;
  }

  const int threads_;
  std::atomic<int> expected_, pending_;
  std::atomic<unsigned> phase_{0};
  std::atomic<uint64_t> brought_{0}, total_{0};
};

struct Warp {
  explicit Warp(int threads) : barrier(threads) {}
  Barrier barrier;
  std::atomic<uint64_t> slots[2][32] =
      {};  // alternate, so that a shuffle need not wait for readers of the previous one
};

// Position of the calling thread.
struct Place {
  Barrier* block;
  Warp* warp;
  unsigned lane;
  unsigned turn;
};
inline constinit thread_local Place here{};

struct Lanes {
  unsigned present, voting;  // one bit per lane
};

// Waits for the other lanes of the warp.
inline Lanes meet(unsigned mask, bool vote) {
  const uint64_t sum = here.warp->barrier.wait((uint64_t(vote) << 32 | 1u) << here.lane);
  const Lanes lanes{static_cast<unsigned>(sum), static_cast<unsigned>(sum >> 32)};
  if (lanes.present & ~mask) fail("the mask of a warp function leaves out a running thread");
  return lanes;
}

// The x of lane `source`, or the caller's own x if that lane has returned or does not exist.
template <typename T>
T exchange(unsigned mask, T x, unsigned source) {
  static_assert(std::is_arithmetic_v<T>);
  const Unordered unordered;
  std::atomic<uint64_t>* slots = here.warp->slots[here.turn ^= 1];
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof(T));
  slots[here.lane] = bits;
  if (!(meet(mask, false).present >> source & 1u)) return x;
  bits = slots[source];
  std::memcpy(&x, &bits, sizeof(T));
  return x;
}

// A reference to a callable.
class Body {
 public:
  template <typename F>
  explicit Body(const F& f) : f_(&f), call_([](const void* f, unsigned t) { (*static_cast<const F*>(f))(t); }) {}
  void operator()(unsigned t) const { call_(f_, t); }

 private:
  const void* f_;
  void (*call_)(const void*, unsigned);
};

// Threads that are kept between launches, since starting them takes longer than running a small kernel.
class Team {
 public:
  ~Team() { wake(0, nullptr); }

  // Calls body(0) .. body(number - 1), each in its own thread, and waits for all.
  void run(unsigned number, const Body& body) {
    while (threads_.size() < number) threads_.emplace_back(&Team::work, this, threads_.size(), turn_.load());
    wake(number, &body);
    while (const unsigned busy = busy_) busy_.wait(busy);
  }

 private:
  void wake(unsigned number, const Body* body) {
    number_ = number;
    body_ = body;
    busy_ = static_cast<unsigned>(threads_.size());
    ++turn_;
    turn_.notify_all();
  }

  void work(unsigned t, unsigned turn) {
    while (true) {
      turn_.wait(turn++);
      if (body_ == nullptr) return;
      if (t < number_) (*body_)(t);
      if (--busy_ == 0) busy_.notify_one();
    }
  }

  unsigned number_ = 0;
  const Body* body_ = nullptr;  // if null, the threads end
  std::atomic<unsigned> turn_{0}, busy_{0};
  std::deque<std::jthread> threads_;  // the last member, so that threads are joined first
};
inline Team team;

// Calls `body` as every thread of the grid.
inline void run(dim3 grid, dim3 block, const Body& body) {
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z, threads = uint64_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64) fail("a block must have 1 to 1024 threads, up to 64 along z");
  if (blocks == 0 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535) fail("CUDA has no such grid");
  gridDim = grid;
  blockDim = block;
  const int number = static_cast<int>(threads);
  Barrier inside(number), between(number);
  std::deque<Warp> warps;
  for (int t = 0; t < number; t += 32) warps.emplace_back(min(32, number - t));
  const auto walk = [&](unsigned t) {
    threadIdx = {t % block.x, t / block.x % block.y, t / block.x / block.y};
    for (uint64_t b = 0; b < blocks; ++b) {
      blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                  static_cast<unsigned>(b / grid.x / grid.y)};
      here = {&inside, &warps[t / 32], t % 32, 0};
      body(t);
      here.warp->barrier.leave();
      inside.leave();
      between.wait();
    }
  };
  team.run(number, Body(walk));
}

// Runs kernel<<<grid, block>>>(arguments...), and waits for it.
template <typename... Parameters>
void launch(dim3 grid, dim3 block, void (*kernel)(Parameters...), std::type_identity_t<Parameters>... arguments) {
  run(grid, block, Body([&](unsigned) { kernel(arguments...); }));
}

}  // namespace emulation

inline void __syncthreads() {
  emulation::here.block->wait();
}

inline unsigned __ballot_sync(unsigned mask, int x) {
  const emulation::Unordered unordered;
  return emulation::meet(mask, x != 0).voting;
}

template <typename T>
T __shfl_down_sync(unsigned mask, T x, unsigned delta) {
  const unsigned lane = emulation::here.lane;
  return emulation::exchange(mask, x, lane + delta < 32 ? lane + delta : lane);
}

inline int __popc(unsigned x) {
  return std::popcount(x);
}
