// The arenas of a whole network: every layer's weights in one buffer, every layer's (o, i) pairs in another.
#pragma once

#include <cstdint>

namespace adafm {

// One layer. Weights lie as [O, taps, I] (channels-last) from `weight` on, pairs as [O, I] from `pair` on; both offsets
// are counted in elements and are multiples of 8. Six int64 in a row, so that a table of layers is an int64 tensor
// [L, 6].
struct ArenaLayer {
  int64_t weight;
  int64_t pair;
  int64_t out_channels;
  int64_t in_channels;
  int64_t taps;
  int64_t flags;  // kFixedGamma, kFixedBeta: the optimizer step leaves these parameters as they are
};

constexpr int64_t kFixedGamma = 1, kFixedBeta = 2;

// The work of one CUDA block (or Triton program), 16 bytes. Two kinds:
//   vector tile (I a multiple of 8): `count` vectors of eight neighbouring pairs, at most kTileVectors. It begins at
//     the start of a filter and spans whole filters, or is a piece of one filter.
//   scalar tile (any other I): `count` pairs, whole filters, beginning at a filter whose number is a multiple of 8.
// With v the number inside the tile and row = I / 8 (vector) or I (scalar): o = v / row, i = v % row, in filters and
// vectors or pairs from the tile's beginning.
struct Tile {
  uint32_t weight;  // offset of the first weight, in units of 8 elements
  uint32_t pair;    // offset of the first pair, in units of 8 elements
  uint32_t count;   // low 24 bits: vectors or pairs; bit 24: kFixedGamma, bit 25: kFixedBeta, bit 31: scalar tile
  uint32_t shape;   // low 16 bits: row; high 16 bits: taps
};

constexpr uint32_t kTileVectors = 128, kCountMask = 0xffffffu, kTileFixedGamma = 1u << 24, kTileFixedBeta = 1u << 25,
                   kTileScalar = 1u << 31;

static_assert(sizeof(ArenaLayer) == 48 && sizeof(Tile) == 16, "both are read as tensors");

}  // namespace adafm
