// Stands in for the CUDA toolkit where kernels are compiled as plain C++: each block runs its threads one after the
// other as fibres, which meet at __syncthreads. Word loads check their alignment as a GPU would.
#pragma once

#include <math.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

using cudaStream_t = struct EmulatedStream*;
using cudaError_t = int;

constexpr cudaError_t cudaErrorInvalidConfiguration = 9;
inline cudaError_t cudaGetLastError() { return 0; }
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }

struct EmulatedIndex {
  unsigned x = 0;
};
inline EmulatedIndex threadIdx, blockIdx, gridDim;

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

template <class word_t>
word_t __ldg(const word_t* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(word_t) != 0) {
    std::printf("FAILED: misaligned load of %zu bytes\n", sizeof(word_t));
    std::exit(1);
  }
  word_t word;
  std::memcpy(&word, address, sizeof(word));
  return word;
}

inline float __uint_as_float(unsigned u) {
  float x;
  std::memcpy(&x, &u, sizeof(x));
  return x;
}

inline unsigned __float_as_uint(float x) {
  unsigned u;
  std::memcpy(&u, &x, sizeof(u));
  return u;
}

using std::min;

namespace emulation {

struct Fibre {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(64 * 1024);
  bool finished = false;
};

// The blocks that a launch runs, negative ones counted from the last; empty for all. With chosen blocks, kernels can be
// run on weights that no memory would hold.
inline std::vector<int64_t> chosen_blocks;
inline int64_t launches = 0;

inline ucontext_t scheduler;
inline Fibre* current = nullptr;
inline const void* job = nullptr;
inline void (*run_job)(const void*) = nullptr;

inline void fibre_main() {
  run_job(job);
  current->finished = true;
  swapcontext(&current->context, &scheduler);
}

}  // namespace emulation

inline void __syncthreads() { swapcontext(&emulation::current->context, &emulation::scheduler); }

template <class problem_t>
void emulate_launch(void (*kernel)(problem_t), unsigned blocks, int threads, cudaStream_t, const problem_t& problem) {
  using namespace emulation;
  struct Job {
    void (*kernel)(problem_t);
    const problem_t* problem;
  };
  const Job this_job{kernel, &problem};
  job = &this_job;
  run_job = [](const void* pointer) {
    const Job* j = static_cast<const Job*>(pointer);
    j->kernel(*j->problem);
  };
  static std::vector<std::unique_ptr<Fibre>> fibres;
  while (fibres.size() < static_cast<size_t>(threads)) {
    fibres.push_back(std::make_unique<Fibre>());
  }
  gridDim.x = blocks;
  ++launches;
  for (int64_t k = 0; k < static_cast<int64_t>(chosen_blocks.empty() ? blocks : chosen_blocks.size()); ++k) {
    const int64_t chosen = chosen_blocks.empty() ? k : chosen_blocks[k];
    blockIdx.x = static_cast<unsigned>(chosen < 0 ? blocks + chosen : chosen);
    for (int t = 0; t < threads; ++t) {
      Fibre& fibre = *fibres[t];
      getcontext(&fibre.context);
      fibre.context.uc_stack.ss_sp = fibre.stack.data();
      fibre.context.uc_stack.ss_size = fibre.stack.size();
      fibre.context.uc_link = nullptr;
      fibre.finished = false;
      makecontext(&fibre.context, &fibre_main, 0);
    }
    // One pass runs every thread to its next barrier or its end.
    for (bool running = true; running;) {
      running = false;
      for (int t = 0; t < threads; ++t) {
        if (!fibres[t]->finished) {
          current = fibres[t].get();
          threadIdx.x = static_cast<unsigned>(t);
          swapcontext(&scheduler, &current->context);
          running = running || !current->finished;
        }
      }
    }
  }
}
