// Tiles of the computing type for the kernels that pass over a weight more than once: [taps, kLanes], the pairs of a
// segment side by side, whatever the memory order and the element type. Arithmetic is then written for one form, and
// only reading and writing have a body for each element type.
#pragma once

#include "pairs.h"

namespace adafm {
namespace cpu {

// Taps of a segment that a tile holds.
constexpr int64_t kTileTaps = kTile / kLanes;

// tile[t * kLanes + i] = the segment's pair i at tap first + t, for `width` taps, in acc_t (float or double).
template <class acc_t>
void load_tile(const void* data, DType type, const Strides& strides, const Segment& segment, int64_t first,
               int64_t width, acc_t* tile);

// The other way, rounded once.
template <class acc_t>
void store_tile(const acc_t* tile, void* data, DType type, const Strides& strides, const Segment& segment,
                int64_t first, int64_t width);

}  // namespace cpu
}  // namespace adafm
