// The one place that launches kernels. Compiled by another compiler than nvcc, launches go to `emulate_launch`, with
// which a test runs the same kernels on a CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace adafm {
namespace cuda {

constexpr int kThreads = 128;

// Blocks for `threads` threads; the strided kernels loop over what is left, so the number is capped inside the limit
// of a grid.
inline unsigned blocks_for(int64_t threads) {
  constexpr int64_t kMost = int64_t{1} << 24;
  const int64_t blocks = (threads + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < kMost ? blocks : kMost);
}

// Returns cudaSuccess (0) or the launch's error.
template <class problem_t>
int launch(void (*kernel)(problem_t), unsigned blocks, cudaStream_t stream, const problem_t& problem) {
#if defined(__CUDACC__)
  kernel<<<blocks, kThreads, 0, stream>>>(problem);
#else
  emulate_launch(kernel, blocks, kThreads, stream, problem);
#endif
  return static_cast<int>(cudaGetLastError());
}

}  // namespace cuda
}  // namespace adafm
