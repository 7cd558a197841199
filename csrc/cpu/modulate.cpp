// W' = gamma * W + beta on the CPU.
//
// The pairs of element types that networks use (float32 to any type but float64, a half type to itself or to float32)
// have loops in AVX-512 and AVX2 registers (modulate_loops.h) for each memory order, and loops in plain C++ for other
// machines. The other pairs share one strided loop, which is compiled three times (clones.h).
#include "adafm/modulate.h"

#include "pairs.h"
#include "simd.h"

namespace adafm {
namespace cpu {

#if ADAFM_HAS_V4
ADAFM_BEGIN_V4
#include "modulate_loops.h"
ADAFM_END_V4
#endif
#if ADAFM_HAS_V3
ADAFM_BEGIN_V3
#include "modulate_loops.h"
ADAFM_END_V3
#endif

// [O, I, taps] -> [O, I, taps]. A row of taps is short, so gamma and beta are first written out element by element;
// the loop over the elements of many pairs is then one long vector loop. kTaps is taps, or 0 for any number.
template <int kTaps, class src_t, class dst_t>
ADAFM_INLINE void contiguous_short(const ModulateArgs& args, int64_t begin, int64_t end) {
  using acc_t = acc_type<src_t>;
  const int64_t taps = kTaps ? kTaps : args.shape.taps;
  const int64_t step = kSpan / taps;
  acc_t gamma[kSpan], beta[kSpan], gamma_wide[kSpan], beta_wide[kSpan];
  for (int64_t pair = begin; pair < end; pair += step) {
    const int64_t count = std::min(step, end - pair);
    const acc_t* gamma_row = pair_values(args.gamma, args.shape.in_channels, pair, count, gamma);
    const acc_t* beta_row = pair_values(args.beta, args.shape.in_channels, pair, count, beta);
    if (kTaps != 1) {
      for (int64_t q = 0; q < count; ++q) {
        for (int64_t t = 0; t < taps; ++t) {
          gamma_wide[q * taps + t] = gamma_row[q];
          beta_wide[q * taps + t] = beta_row[q];
        }
      }
      gamma_row = gamma_wide;
      beta_row = beta_wide;
    }
    const src_t* __restrict__ x = static_cast<const src_t*>(args.weight) + pair * taps;
    dst_t* __restrict__ y = static_cast<dst_t*>(args.out) + pair * taps;
    for (int64_t e = 0; e < count * taps; ++e) {
      y[e] = store<dst_t>(std::fma(gamma_row[e], load<acc_t>(x[e]), beta_row[e]));
    }
  }
}

// [O, I, taps] -> [O, I, taps] where the taps alone fill vectors.
template <class src_t, class dst_t>
ADAFM_INLINE void contiguous_long(const ModulateArgs& args, int64_t begin, int64_t end) {
  using acc_t = acc_type<src_t>;
  const int64_t taps = args.shape.taps;
  acc_t gamma_scratch[kLanes], beta_scratch[kLanes];
  for (int64_t pair = begin; pair < end;) {
    const Segment segment = segment_at(pair, end, args.shape.in_channels);
    const acc_t* gamma = segment_values(args.gamma, segment, gamma_scratch);
    const acc_t* beta = segment_values(args.beta, segment, beta_scratch);
    for (int64_t i = 0; i < segment.count; ++i) {
      const acc_t g = gamma[i], b = beta[i];
      const src_t* __restrict__ x = static_cast<const src_t*>(args.weight) + (pair + i) * taps;
      dst_t* __restrict__ y = static_cast<dst_t*>(args.out) + (pair + i) * taps;
      for (int64_t t = 0; t < taps; ++t) {
        y[t] = store<dst_t>(std::fma(g, load<acc_t>(x[t]), b));
      }
    }
    pair += segment.count;
  }
}

// [O, taps, I] -> [O, taps, I]: everything has unit stride along I.
template <class src_t, class dst_t>
ADAFM_INLINE void channels_last(const ModulateArgs& args, int64_t begin, int64_t end) {
  using acc_t = acc_type<src_t>;
  const int64_t taps = args.shape.taps, in_channels = args.shape.in_channels;
  acc_t gamma_scratch[kLanes], beta_scratch[kLanes];
  for (int64_t pair = begin; pair < end;) {
    const Segment segment = segment_at(pair, end, in_channels);
    const acc_t* __restrict__ gamma = segment_values(args.gamma, segment, gamma_scratch);
    const acc_t* __restrict__ beta = segment_values(args.beta, segment, beta_scratch);
    const int64_t base = segment.o * taps * in_channels + segment.first;
    for (int64_t t = 0; t < taps; ++t) {
      const src_t* __restrict__ x = static_cast<const src_t*>(args.weight) + base + t * in_channels;
      dst_t* __restrict__ y = static_cast<dst_t*>(args.out) + base + t * in_channels;
      for (int64_t i = 0; i < segment.count; ++i) {
        y[i] = store<dst_t>(std::fma(gamma[i], load<acc_t>(x[i]), beta[i]));
      }
    }
    pair += segment.count;
  }
}

// [O, I, taps] -> [O, taps, I], through a tile of the weight in the computing type. kTaps as above.
template <int kTaps, class src_t, class dst_t>
ADAFM_INLINE void to_channels_last(const ModulateArgs& args, int64_t begin, int64_t end) {
  using acc_t = acc_type<src_t>;
  const int64_t taps = kTaps ? kTaps : args.shape.taps, in_channels = args.shape.in_channels;
  const int64_t chunk = kTaps ? kTaps : std::min(taps, kTile / kLanes);
  acc_t gamma_scratch[kLanes], beta_scratch[kLanes], tile[kTile];
  for (int64_t pair = begin; pair < end;) {
    const Segment segment = segment_at(pair, end, in_channels);
    const acc_t* __restrict__ gamma = segment_values(args.gamma, segment, gamma_scratch);
    const acc_t* __restrict__ beta = segment_values(args.beta, segment, beta_scratch);
    for (int64_t first = 0; first < taps; first += chunk) {
      const int64_t width = kTaps ? kTaps : std::min(chunk, taps - first);
      const src_t* __restrict__ x = static_cast<const src_t*>(args.weight) + pair * taps + first;
      if (width == taps) {
        for (int64_t e = 0; e < segment.count * width; ++e) {
          tile[e] = load<acc_t>(x[e]);
        }
      } else {
        for (int64_t i = 0; i < segment.count; ++i) {
          for (int64_t t = 0; t < width; ++t) {
            tile[i * width + t] = load<acc_t>(x[i * taps + t]);
          }
        }
      }
      for (int64_t t = 0; t < width; ++t) {
        dst_t* __restrict__ y =
            static_cast<dst_t*>(args.out) + (segment.o * taps + first + t) * in_channels + segment.first;
        for (int64_t i = 0; i < segment.count; ++i) {
          y[i] = store<dst_t>(std::fma(gamma[i], tile[i * width + t], beta[i]));
        }
      }
    }
    pair += segment.count;
  }
}

// [O, taps, I] -> [O, I, taps], through a tile of the result in the computing type. kTaps as above.
template <int kTaps, class src_t, class dst_t>
ADAFM_INLINE void to_contiguous(const ModulateArgs& args, int64_t begin, int64_t end) {
  using acc_t = acc_type<src_t>;
  const int64_t taps = kTaps ? kTaps : args.shape.taps, in_channels = args.shape.in_channels;
  const int64_t chunk = kTaps ? kTaps : std::min(taps, kTile / kLanes);
  acc_t gamma_scratch[kLanes], beta_scratch[kLanes], tile[kTile];
  for (int64_t pair = begin; pair < end;) {
    const Segment segment = segment_at(pair, end, in_channels);
    const acc_t* __restrict__ gamma = segment_values(args.gamma, segment, gamma_scratch);
    const acc_t* __restrict__ beta = segment_values(args.beta, segment, beta_scratch);
    for (int64_t first = 0; first < taps; first += chunk) {
      const int64_t width = kTaps ? kTaps : std::min(chunk, taps - first);
      for (int64_t t = 0; t < width; ++t) {
        const src_t* __restrict__ x =
            static_cast<const src_t*>(args.weight) + (segment.o * taps + first + t) * in_channels + segment.first;
        for (int64_t i = 0; i < segment.count; ++i) {
          tile[i * width + t] = std::fma(gamma[i], load<acc_t>(x[i]), beta[i]);
        }
      }
      dst_t* __restrict__ y = static_cast<dst_t*>(args.out) + pair * taps + first;
      if (width == taps) {
        for (int64_t e = 0; e < segment.count * width; ++e) {
          y[e] = store<dst_t>(tile[e]);
        }
      } else {
        for (int64_t i = 0; i < segment.count; ++i) {
          for (int64_t t = 0; t < width; ++t) {
            y[i * taps + t] = store<dst_t>(tile[i * width + t]);
          }
        }
      }
    }
    pair += segment.count;
  }
}

// Any memory orders, any element types.
template <class src_t, class dst_t>
ADAFM_CLONES void modulate_strided(const ModulateArgs& args, int64_t begin, int64_t end) {
  using acc_t = acc_type<src_t>;
  const Strides from(args.weight_layout, args.shape), to(args.out_layout, args.shape);
  acc_t gamma_scratch[kLanes], beta_scratch[kLanes];
  for (int64_t pair = begin; pair < end;) {
    const Segment segment = segment_at(pair, end, args.shape.in_channels);
    const acc_t* gamma = segment_values(args.gamma, segment, gamma_scratch);
    const acc_t* beta = segment_values(args.beta, segment, beta_scratch);
    const src_t* x = static_cast<const src_t*>(args.weight) + from.offset(segment);
    dst_t* y = static_cast<dst_t*>(args.out) + to.offset(segment);
    for (int64_t t = 0; t < args.shape.taps; ++t) {
      for (int64_t i = 0; i < segment.count; ++i) {
        y[t * to.tap + i * to.pair] =
            store<dst_t>(std::fma(gamma[i], load<acc_t>(x[t * from.tap + i * from.pair]), beta[i]));
      }
    }
    pair += segment.count;
  }
}

// In plain C++, which compilers vectorise.
template <class src_t, class dst_t>
void modulate_plain(const ModulateArgs& args, int64_t begin, int64_t end) {
  const int64_t taps = args.shape.taps;
  const Layout from = effective_layout(args.weight_layout, args.shape);
  const Layout to = effective_layout(args.out_layout, args.shape);
  if (from == Layout::kChannelsLast) {
    if (to == Layout::kChannelsLast) {
      channels_last<src_t, dst_t>(args, begin, end);
    } else if (taps == 9) {
      to_contiguous<9, src_t, dst_t>(args, begin, end);
    } else {
      to_contiguous<0, src_t, dst_t>(args, begin, end);
    }
  } else if (to == Layout::kChannelsLast) {
    if (taps == 9) {
      to_channels_last<9, src_t, dst_t>(args, begin, end);
    } else {
      to_channels_last<0, src_t, dst_t>(args, begin, end);
    }
  } else if (taps == 1) {
    contiguous_short<1, src_t, dst_t>(args, begin, end);
  } else if (taps == 9) {
    contiguous_short<9, src_t, dst_t>(args, begin, end);
  } else if (taps < 64 && taps % 16 != 0) {
    contiguous_short<0, src_t, dst_t>(args, begin, end);
  } else {
    contiguous_long<src_t, dst_t>(args, begin, end);
  }
}

template <class src_t, class dst_t>
constexpr bool has_plain_body() {
  constexpr bool half = std::is_same_v<src_t, float16> || std::is_same_v<src_t, bfloat16>;
  return (std::is_same_v<src_t, float> && !std::is_same_v<dst_t, double>) || (half && std::is_same_v<src_t, dst_t>);
}

// The backward pass scales half gradients of float32 weights with these.
template <class src_t, class dst_t>
constexpr bool has_vector_loops() {
  return has_plain_body<src_t, dst_t>() || (sizeof(src_t) == 2 && std::is_same_v<dst_t, float>);
}

// Runs the vector loops of this machine's level; false where there is none for it.
template <class src_t, class dst_t>
bool vector_loops([[maybe_unused]] const ModulateArgs& args, [[maybe_unused]] int64_t begin,
                  [[maybe_unused]] int64_t end) {
  switch (vector_level()) {
#if ADAFM_HAS_V4
    case Level::kV4:
      return v4::modulate<src_t, dst_t>(args, begin, end);
#endif
#if ADAFM_HAS_V3
    case Level::kV3:
      return v3::modulate<src_t, dst_t>(args, begin, end);
#endif
    default:
      return false;
  }
}

}  // namespace cpu

int modulate_cpu(const ModulateArgs& args, int64_t begin, int64_t end) {
  if (begin >= end || args.shape.taps == 0) {
    return kOk;
  }
  return with_type(args.weight_type, [&](auto src) {
    return with_type(args.out_type, [&](auto dst) {
      using src_t = decltype(src);
      using dst_t = decltype(dst);
      if constexpr (cpu::has_vector_loops<src_t, dst_t>()) {
        if (cpu::vector_loops<src_t, dst_t>(args, begin, end)) {
          return int(kOk);
        }
      }
      if constexpr (cpu::has_plain_body<src_t, dst_t>()) {
        if (cpu::vector_level() == cpu::Level::kPlain) {
          cpu::modulate_plain<src_t, dst_t>(args, begin, end);
          return int(kOk);
        }
      }
      cpu::modulate_strided<src_t, dst_t>(args, begin, end);
      return int(kOk);
    });
  });
}

}  // namespace adafm
