#include "tile.h"

namespace adafm {
namespace cpu {

// kPair is the distance of neighbouring pairs, or 0 for the one given: loops over known distances vectorise better.
template <int kPair, class src_t, class acc_t>
ADAFM_CLONES void load_elements(const src_t* __restrict__ x, int64_t pair, int64_t tap, int64_t count, int64_t width,
                                acc_t* __restrict__ tile) {
  const int64_t step = kPair ? kPair : pair;
  for (int64_t t = 0; t < width; ++t) {
    for (int64_t i = 0; i < count; ++i) {
      tile[t * kLanes + i] = load<acc_t>(x[t * tap + i * step]);
    }
  }
}

template <class dst_t, class acc_t>
ADAFM_CLONES void store_elements(const acc_t* __restrict__ tile, int64_t pair, int64_t tap, int64_t count,
                                 int64_t width, dst_t* __restrict__ y) {
  if (pair == 1) {
    for (int64_t t = 0; t < width; ++t) {
      for (int64_t i = 0; i < count; ++i) {
        y[t * tap + i] = store<dst_t>(tile[t * kLanes + i]);
      }
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t t = 0; t < width; ++t) {
        y[i * pair + t] = store<dst_t>(tile[t * kLanes + i]);
      }
    }
  }
}

template <class acc_t>
void load_tile(const void* data, DType type, const Strides& strides, const Segment& segment, int64_t first,
               int64_t width, acc_t* tile) {
  with_type(type, [&](auto element) {
    const auto* x = static_cast<const decltype(element)*>(data) + strides.offset(segment) + first * strides.tap;
    using src_t = decltype(element);
    const auto read = strides.pair == 1   ? &load_elements<1, src_t, acc_t>
                      : strides.pair == 9 ? &load_elements<9, src_t, acc_t>
                                          : &load_elements<0, src_t, acc_t>;
    read(x, strides.pair, strides.tap, segment.count, width, tile);
    return int(kOk);
  });
}

template <class acc_t>
void store_tile(const acc_t* tile, void* data, DType type, const Strides& strides, const Segment& segment,
                int64_t first, int64_t width) {
  with_type(type, [&](auto element) {
    auto* y = static_cast<decltype(element)*>(data) + strides.offset(segment) + first * strides.tap;
    store_elements(tile, strides.pair, strides.tap, segment.count, width, y);
    return int(kOk);
  });
}

template void load_tile(const void*, DType, const Strides&, const Segment&, int64_t, int64_t, float*);
template void load_tile(const void*, DType, const Strides&, const Segment&, int64_t, int64_t, double*);
template void store_tile(const float*, void*, DType, const Strides&, const Segment&, int64_t, int64_t);
template void store_tile(const double*, void*, DType, const Strides&, const Segment&, int64_t, int64_t);

}  // namespace cpu
}  // namespace adafm
