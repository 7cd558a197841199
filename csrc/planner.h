// Divides the layers of an arena into tiles, one for each CUDA block or Triton program.
#pragma once

#include <cstdint>
#include <vector>

#include "adafm/arena.h"

namespace adafm {

// The tiles in the order of the layers and of their filters; a layer without weights has none.
// Throws std::invalid_argument, which names the layer and what is wrong, for what a tile cannot express: a negative
// size, an offset that is negative or no multiple of 8, a layer that ends behind element 2^35, more than 65535 taps, or
// an I that is too large (65535 where it is no multiple of 8, else 8 * 65535); and for flags that are not known.
std::vector<Tile> plan_tiles(const std::vector<ArenaLayer>& layers);

}  // namespace adafm
