// Walks over (o, i) pairs, shared by the CPU kernels.
#pragma once

#include <algorithm>

#include "element.h"

namespace adafm {

// Pairs handled at a time, and the elements of a scratch tile: 16 KiB in float32, within the first cache.
constexpr int64_t kLanes = 64;
constexpr int64_t kTile = 4096;

// Pairs handled at a time by loops without a tile.
constexpr int64_t kSpan = 1024;

// Pairs of one filter: o and [first, first + count) along I.
struct Segment {
  int64_t o;
  int64_t first;
  int64_t count;
};

// The segment that starts at `pair`, at most `longest` long, within one filter and before `end`.
ADAFM_INLINE Segment segment_at(int64_t pair, int64_t end, int64_t in_channels, int64_t longest = kLanes) {
  const int64_t o = pair / in_channels;
  const int64_t first = pair - o * in_channels;
  return {o, first, std::min({longest, in_channels - first, end - pair})};
}

// A segment's gamma or beta: the parameter itself where it is dense along I, else a copy in `scratch`.
template <class acc_t>
ADAFM_INLINE const acc_t* segment_values(const Parameter& parameter, const Segment& segment, acc_t* scratch) {
  const acc_t* row =
      static_cast<const acc_t*>(parameter.data) + segment.o * parameter.stride_o + segment.first * parameter.stride_i;
  if (parameter.stride_i == 1) {
    return row;
  }
  if (parameter.stride_i == 0) {
    std::fill_n(scratch, segment.count, *row);
    return scratch;
  }
  for (int64_t i = 0; i < segment.count; ++i) {
    scratch[i] = row[i * parameter.stride_i];
  }
  return scratch;
}

// The gamma or beta of pairs [pair, pair + count), in order: the parameter itself where it is dense, else a copy.
template <class acc_t>
ADAFM_INLINE const acc_t* pair_values(const Parameter& parameter, int64_t in_channels, int64_t pair, int64_t count,
                                      acc_t* scratch) {
  const acc_t* data = static_cast<const acc_t*>(parameter.data);
  if (parameter.stride_i == 1 && parameter.stride_o == in_channels) {
    return data + pair;
  }
  for (int64_t q = 0; q < count;) {
    const Segment segment = segment_at(pair + q, pair + count, in_channels, count);
    const acc_t* row = segment_values(parameter, segment, scratch + q);
    if (row != scratch + q) {
      std::copy_n(row, segment.count, scratch + q);
    }
    q += segment.count;
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
