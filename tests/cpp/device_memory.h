// Memory that a test and the CUDA kernels under test share: plain memory where the kernels are emulated, managed memory
// on a GPU (ADAFM_GPU), so that a test is the same program on both.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <vector>

#if ADAFM_GPU
#include <cuda_runtime_api.h>
#endif

namespace device {

#if ADAFM_GPU

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    std::printf("FAILED %s: %s\n", what, cudaGetErrorString(error));
    std::exit(1);
  }
}

// Until every launched kernel has finished.
inline void wait() { check(cudaDeviceSynchronize(), "a kernel"); }

// Blocks that are free, by their exact size: compute-sanitizer sees where each ends, and few need the driver.
inline std::map<int64_t, std::vector<void*>> free_blocks;

inline void* allocate(int64_t bytes) {
  std::vector<void*>& blocks = free_blocks[bytes];
  if (!blocks.empty()) {
    void* memory = blocks.back();
    blocks.pop_back();
    return memory;
  }
  void* memory = nullptr;
  check(cudaMallocManaged(&memory, bytes), "cudaMallocManaged");
  return memory;
}

inline void release(void* memory, int64_t bytes) {
  wait();
  free_blocks[bytes].push_back(memory);
}

#else

inline void wait() {}
// `bytes` is a multiple of 64.
inline void* allocate(int64_t bytes) { return std::aligned_alloc(64, bytes); }
inline void release(void* memory, int64_t) { std::free(memory); }

#endif

// For vectors that kernels read.
template <class value_t>
struct Allocator {
  using value_type = value_t;
  Allocator() = default;
  template <class other_t>
  Allocator(const Allocator<other_t>&) {}
  value_t* allocate(size_t n) { return static_cast<value_t*>(device::allocate(bytes(n))); }
  void deallocate(value_t* memory, size_t n) { device::release(memory, bytes(n)); }
  friend bool operator==(const Allocator&, const Allocator&) { return true; }
  friend bool operator!=(const Allocator&, const Allocator&) { return false; }

 private:
  static int64_t bytes(size_t n) { return static_cast<int64_t>((n * sizeof(value_t) + 63) / 64 * 64); }
};

template <class value_t>
using Vector = std::vector<value_t, Allocator<value_t>>;

}  // namespace device
