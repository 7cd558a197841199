// Shared by the CPU kernels that hand parts of their work to modulate and modulate_backward.
#pragma once

#include <algorithm>

#include "adafm/arena.h"
#include "adafm/types.h"
#include "pairs.h"

namespace adafm {

constexpr int64_t element_size(DType type) { return type == DType::kFloat64 ? 8 : type == DType::kFloat32 ? 4 : 2; }

// Element `index` of memory that may be null.
inline const void* element_at(const void* data, DType type, int64_t index) {
  return data == nullptr ? nullptr : static_cast<const char*>(data) + index * element_size(type);
}

inline void* element_at(void* data, DType type, int64_t index) {
  return data == nullptr ? nullptr : static_cast<char*>(data) + index * element_size(type);
}

inline Shape shape_of(const ArenaLayer& layer) { return {layer.out_channels, layer.in_channels, layer.taps}; }

// The address at which a kernel that numbers pairs from 0 finds scratch memory for the pairs from `first` on. The
// kernel must not be given a pair before that.
template <class value_t>
value_t* before(value_t* scratch, int64_t first) {
  return reinterpret_cast<value_t*>(reinterpret_cast<uintptr_t>(scratch) - first * sizeof(value_t));
}

// With the weights of all layers numbered one after the other: calls run(layer, first, last) for the pairs that begin
// inside [begin, end), and stops at an error. Layers without taps, whose sums are zero, go with the first piece.
template <class layer_t, class shape_t, class run_t>
int each_layer(const layer_t* layers, int64_t count, int64_t begin, int64_t end, shape_t&& shape_of, run_t&& run) {
  int64_t base = 0;
  for (int64_t l = 0; l < count; ++l) {
    const Shape shape = shape_of(layers[l]);
    const int64_t weights = shape.pairs() * shape.taps;
    int64_t first = 0, last = begin == 0 ? shape.pairs() : 0;
    if (shape.taps != 0) {
      first = (std::clamp(begin - base, int64_t{0}, weights) + shape.taps - 1) / shape.taps;
      last = (std::clamp(end - base, int64_t{0}, weights) + shape.taps - 1) / shape.taps;
    }
    if (first < last) {
      const int error = run(layers[l], first, last);
      if (error != kOk) {
        return error;
      }
    }
    base += weights;
  }
  return kOk;
}

// Pairs whose weights stay in the second cache while several kernels pass over them: whole filters where they fit.
inline int64_t block_pairs(const Shape& shape) {
  constexpr int64_t kElements = 4 * kTile;
  const int64_t row = std::max<int64_t>(1, shape.in_channels);
  const int64_t wanted = std::clamp(kElements / std::max<int64_t>(1, shape.taps), kLanes, kSpan);
  return row < wanted ? wanted / row * row : wanted;
}

}  // namespace adafm
