// Separate layers in one launch: a table of them is the kernel's parameter, and a block finds its layer by the number
// of its first block.
#pragma once

#include "access.cuh"
#include "adafm/modulate_many.h"
#include "parameter.cuh"

namespace adafm {
namespace cuda {

// Bits above the path. "From" is the layout that is read, "to" the one that is written (backward: the gradient's and
// the weight's).
constexpr uint32_t kFromChannelsLast = 1u << 2, kToChannelsLast = 1u << 3, kDenseGamma = 1u << 4,
                   kVectorGamma = 1u << 5, kDenseBeta = 1u << 6, kVectorBeta = 1u << 7;

struct LayerShape {
  uint32_t pairs;
  uint32_t in_channels;
  uint32_t taps;
  uint32_t flags;

  LayerShape() = default;
  LayerShape(const Shape& shape, Path path)
      : pairs(static_cast<uint32_t>(shape.pairs())),
        in_channels(static_cast<uint32_t>(shape.in_channels)),
        taps(static_cast<uint32_t>(shape.taps)),
        flags(static_cast<uint32_t>(path)) {}

  void set(uint32_t flag, bool value) { flags |= value ? flag : 0; }

  __device__ __forceinline__ bool has(uint32_t flag) const { return (flags & flag) != 0; }
  __device__ __forceinline__ Path path() const { return static_cast<Path>(flags & 3u); }
  __device__ __forceinline__ Strides strides(uint32_t channels_last) const {
    const int64_t filter = int64_t{in_channels} * taps;
    return has(channels_last) ? Strides{filter, 1, in_channels} : Strides{filter, taps, 1};
  }
};

// Numbers inside a layer are 32 bits wide, and blocks_for is not to cap its blocks; a larger layer gets a launch of its
// own.
inline bool fits_table(const Shape& shape) { return shape.pairs() * shape.taps < int64_t{1} << 31; }

template <class layer_t, int64_t most = kMostLayers>
struct Table {
  layer_t layers[most];
  uint32_t first_block[most + 1];  // and, last, the number of all blocks
  uint32_t count = 0;

  bool full() const { return count == most; }

  void add(const layer_t& layer, int64_t threads) {
    first_block[0] = count == 0 ? 0 : first_block[0];
    layers[count] = layer;
    first_block[count + 1] = first_block[count] + blocks_for(threads);
    ++count;
  }
};

// The last layer whose first block is not behind this one.
template <class layer_t, int64_t most>
__device__ __forceinline__ uint32_t layer_of_block(const Table<layer_t, most>& table) {
  uint32_t low = 0, high = table.count;
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    if (table.first_block[middle] <= blockIdx.x) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Launches what the table holds and empties it.
template <class problem_t>
int launch_table(void (*kernel)(problem_t), problem_t& problem, cudaStream_t stream) {
  if (problem.table.count == 0) {
    return kOk;
  }
  const int error = launch(kernel, problem.table.first_block[problem.table.count], stream, problem);
  problem.table.count = 0;
  return error;
}

}  // namespace cuda
}  // namespace adafm
