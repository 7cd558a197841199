// Walks over (o, i) pairs, shared by the CPU kernels.
#pragma once

#include <algorithm>

#include "element.h"

namespace adafm {

// Pairs handled at a time, and the elements of a scratch tile: 16 KiB in float32, within the first cache.
constexpr int64_t kLanes = 64;
constexpr int64_t kTile = 4096;

// Pairs of one filter: o and [first, first + count) along I.
struct Segment {
  int64_t o;
  int64_t first;
  int64_t count;
};

// The segment that starts at `pair`, at most kLanes long, within one filter and before `end`.
ADAFM_INLINE Segment segment_at(int64_t pair, int64_t end, int64_t in_channels) {
  const int64_t o = pair / in_channels;
  const int64_t first = pair - o * in_channels;
  return {o, first, std::min({kLanes, in_channels - first, end - pair})};
}

// A segment's gamma or beta: the parameter itself where it is dense along I, else a copy in `scratch`.
template <class acc_t>
ADAFM_INLINE const acc_t* segment_values(const Parameter& parameter, const Segment& segment, acc_t* scratch) {
  const acc_t* row =
      static_cast<const acc_t*>(parameter.data) + segment.o * parameter.stride_o + segment.first * parameter.stride_i;
  if (parameter.stride_i == 1) {
    return row;
  }
  for (int64_t i = 0; i < segment.count; ++i) {
    scratch[i] = row[i * parameter.stride_i];
  }
  return scratch;
}

// With one tap or one input channel both layouts are the same memory order.
ADAFM_INLINE Layout effective_layout(Layout layout, const Shape& shape) {
  return shape.taps == 1 || shape.in_channels == 1 ? Layout::kContiguous : layout;
}

// Distances between neighbouring pairs and taps of a dense weight, in elements.
struct Strides {
  int64_t filter;
  int64_t pair;
  int64_t tap;

  ADAFM_INLINE Strides(Layout layout, const Shape& shape)
      : filter(shape.in_channels * shape.taps),
        pair(layout == Layout::kContiguous ? shape.taps : 1),
        tap(layout == Layout::kContiguous ? 1 : shape.in_channels) {}

  ADAFM_INLINE int64_t offset(const Segment& segment) const { return segment.o * filter + segment.first * pair; }
};

}  // namespace adafm
