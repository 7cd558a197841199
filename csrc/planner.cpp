#include "planner.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace adafm {
namespace {

constexpr int64_t kUnit = 8;  // elements that tiles count in
constexpr int64_t kLargest = 65535;
constexpr int64_t kArenaEnd = int64_t{1} << 35;
// Pairs that a scalar tile takes where filters are small: eight for each thread.
constexpr int64_t kScalarPairs = 1024;

[[noreturn]] void refuse(size_t number, const std::string& what) {
  throw std::invalid_argument("layer " + std::to_string(number) + ": " + what);
}

// a * b * c, or kArenaEnd + 1 where that is larger; none is negative.
int64_t size_of(int64_t a, int64_t b, int64_t c) {
  if (a == 0 || b == 0 || c == 0) {
    return 0;
  }
  int64_t size = a;
  for (const int64_t factor : {b, c}) {
    if (size > kArenaEnd / factor) {
      return kArenaEnd + 1;
    }
    size *= factor;
  }
  return size;
}

void check_offset(size_t number, const char* name, int64_t offset, int64_t size) {
  const std::string value = std::string(name) + " offset " + std::to_string(offset);
  if (offset < 0 || offset % kUnit != 0) {
    refuse(number, value + " is not a multiple of 8; expected offsets of 0, 8, 16 and so on, in elements");
  }
  if (offset > kArenaEnd - size) {
    refuse(number, value + " and the layer's size go beyond 2^35 elements, the largest arena; divide the network");
  }
}

// False for a layer that has nothing to do.
bool check(size_t number, const ArenaLayer& layer) {
  const auto size = [&](const char* name, int64_t value) {
    if (value < 0) {
      refuse(number, std::string(name) + " is " + std::to_string(value) + "; expected 0 or more");
    }
  };
  size("O", layer.out_channels);
  size("I", layer.in_channels);
  size("taps", layer.taps);
  if (layer.flags & ~(kFixedGamma | kFixedBeta)) {
    refuse(number, "flags are " + std::to_string(layer.flags) + "; expected a sum of 1 (fixed gamma), 2 (fixed beta)");
  }
  const int64_t pairs = size_of(layer.out_channels, layer.in_channels, 1);
  const int64_t weights = size_of(layer.out_channels, layer.in_channels, layer.taps);
  check_offset(number, "weight", layer.weight, std::min(weights, kArenaEnd));
  check_offset(number, "pair", layer.pair, std::min(pairs, kArenaEnd));
  if (pairs == 0 || layer.taps == 0) {
    return false;
  }
  if (weights > kArenaEnd) {
    refuse(number, "O * I * taps is more than 2^35 elements, the largest arena; divide the network");
  }
  if (layer.taps > kLargest) {
    refuse(number, "taps are " + std::to_string(layer.taps) + "; expected at most 65535");
  }
  const bool vector = layer.in_channels % kUnit == 0;
  if (layer.in_channels / (vector ? kUnit : 1) > kLargest) {
    refuse(number, "I is " + std::to_string(layer.in_channels) +
                       "; expected at most 65535, or 524280 where it is a multiple of 8");
  }
  return true;
}

void plan_layer(const ArenaLayer& layer, std::vector<Tile>& tiles) {
  const bool vector = layer.in_channels % kUnit == 0;
  const int64_t row = vector ? layer.in_channels / kUnit : layer.in_channels;
  uint32_t kind = vector ? 0 : kTileScalar;
  kind |= layer.flags & kFixedGamma ? kTileFixedGamma : 0;
  kind |= layer.flags & kFixedBeta ? kTileFixedBeta : 0;
  const uint32_t shape = static_cast<uint32_t>(layer.taps << 16 | row);
  const int64_t vectors = kTileVectors;
  // A tile's filters; a scalar tile begins at a multiple of 8 of them, where all offsets are multiples of 8.
  const int64_t filters =
      vector ? std::max<int64_t>(vectors / row, 1) : std::max<int64_t>(kScalarPairs / row / 8 * 8, 8);
  const int64_t piece = vector ? std::min(row, vectors) : row;
  const int64_t unit = vector ? kUnit : 1;
  for (int64_t o = 0; o < layer.out_channels; o += filters) {
    const int64_t whole = std::min(filters, layer.out_channels - o);
    for (int64_t i = 0; i < row; i += piece) {
      const int64_t weight = layer.weight + (o * layer.taps * row + i) * unit;
      const int64_t pair = layer.pair + (o * row + i) * unit;
      const int64_t count = whole * std::min(piece, row - i);
      tiles.push_back({static_cast<uint32_t>(weight / kUnit), static_cast<uint32_t>(pair / kUnit),
                       static_cast<uint32_t>(count) | kind, shape});
    }
  }
}

}  // namespace

std::vector<Tile> plan_tiles(const std::vector<ArenaLayer>& layers) {
  std::vector<Tile> tiles;
  for (size_t number = 0; number < layers.size(); ++number) {
    if (check(number, layers[number])) {
      plan_layer(layers[number], tiles);
    }
  }
  return tiles;
}

}  // namespace adafm
