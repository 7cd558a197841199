// Tiles of an arena inside a kernel: one for each block, read as one 16-byte word.
#pragma once

#include "access.cuh"
#include "adafm/arena.h"

namespace adafm {
namespace cuda {

__device__ __forceinline__ Tile load_tile(const Tile* tiles) {
  const uint4 words = __ldg(reinterpret_cast<const uint4*>(tiles) + blockIdx.x);
  return {words.x, words.y, words.z, words.w};
}

// Offsets in elements; up to 2^35 and more, so in 64 bits.
struct Place {
  uint64_t weight;
  uint64_t pair;
};

__device__ __forceinline__ uint32_t row_of(const Tile& tile) { return tile.shape & 0xffffu; }
__device__ __forceinline__ uint32_t taps_of(const Tile& tile) { return tile.shape >> 16; }
__device__ __forceinline__ bool is_scalar(const Tile& tile) { return (tile.count & kTileScalar) != 0; }

// Where vector `v` of a vector tile begins.
__device__ __forceinline__ Place vector_place(const Tile& tile, uint32_t v) {
  const uint32_t row = row_of(tile);
  const uint32_t o = v / row;
  const uint32_t i = v - o * row;
  return {(tile.weight + uint64_t{o} * (taps_of(tile) * row) + i) * kVector, (uint64_t{tile.pair} + v) * kVector};
}

// A tile of either kind seen pair by pair.
struct PairTile {
  uint64_t weight;
  uint64_t pair;
  uint32_t count;
  uint32_t in_channels;
  uint32_t taps;

  __device__ __forceinline__ explicit PairTile(const Tile& tile)
      : weight(uint64_t{tile.weight} * 8), pair(uint64_t{tile.pair} * 8), taps(taps_of(tile)) {
    const uint32_t unit = is_scalar(tile) ? 1 : kVector;
    count = (tile.count & kCountMask) * unit;
    in_channels = row_of(tile) * unit;
  }

  __device__ __forceinline__ Place place(uint32_t v) const {
    const uint32_t o = v / in_channels;
    const uint32_t i = v - o * in_channels;
    return {weight + uint64_t{o} * taps * in_channels + i, pair + v};
  }
};

// ---- host side ----

// Launches one block for each tile.
template <class problem_t>
int launch_tiles(void (*kernel)(problem_t), int64_t tiles, cudaStream_t stream, const problem_t& problem) {
  constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;
  if (tiles > kMostBlocks) {
    return static_cast<int>(cudaErrorInvalidConfiguration);
  }
  return launch(kernel, static_cast<unsigned>(tiles), stream, problem);
}

}  // namespace cuda
}  // namespace adafm
