// The vector loops of modulate_backward.cpp, included once for each instruction level (simd.h).

// Pairs summed at a time, and the taps of them that a tile holds.
constexpr int64_t kBlock = 2 * kWidth;
constexpr int64_t kTileTaps = kTile / kBlock;
// Taps read side by side in place. With more, the memory serves too many streams; their sums wait in the outputs.
constexpr int64_t kStreams = 9;

// Element (tap t, pair i) of a block is data[t * stride + i].
template <class value_t>
struct Taps {
  const value_t* data;
  int64_t stride;
};

struct Sums {
  vec gamma[2];
  vec beta[2];
};

// Adds taps to the sums of a block, in order. kTaps is `taps`, or 0 for any number.
template <int kTaps, bool kGamma, class grad_t, class weight_t>
ADAFM_INLINE void add_taps(const Taps<grad_t>& grad, const Taps<weight_t>& weight, int64_t taps, Sums& sums) {
#pragma GCC unroll 9
  for (int64_t t = 0; t < (kTaps ? kTaps : taps); ++t) {
    vec g[2], w[2];
    read_two(grad.data + t * grad.stride, g[0], g[1]);
    if (kGamma) {
      read_two(weight.data + t * weight.stride, w[0], w[1]);
    }
    for (int v = 0; v < 2; ++v) {
      if (kGamma) {
        sums.gamma[v] = fma(g[v], w[v], sums.gamma[v]);
      }
      sums.beta[v] = add(sums.beta[v], g[v]);
    }
  }
}

// tile[t][i] = x[i][t] for `width` taps (kTaps, if not 0) of `count` pairs that lie `taps` apart; pairs up to kBlock
// become zero.
template <int kTaps, class value_t>
ADAFM_INLINE void transpose_block(const value_t* x, int64_t any_taps, int64_t count, int64_t any_width, float* tile) {
  const int64_t taps = kTaps ? kTaps : any_taps, width = kTaps ? kTaps : any_width;
  if (count < kBlock || width < 4) {
    for (int64_t t = 0; t < width; ++t) {
      for (int64_t i = 0; i < kBlock; ++i) {
        tile[t * kBlock + i] = i < count ? load<float>(x[i * taps + t]) : 0.0f;
      }
    }
    return;
  }
  for (int64_t v = 0; v < kBlock; v += kWidth) {
#pragma GCC unroll 3
    for (int64_t t = 0; t < width; t += 4) {
      const int64_t first = std::min(t, width - 4);
      vec x_fours[4];
      for (int64_t j = 0; j < 4; ++j) {
        x_fours[j] = read_fours(x + (v + j) * taps + first, 4 * taps);
      }
      transpose_fours(x_fours);
      for (int64_t j = t - first; j < 4; ++j) {
        write(tile + (first + j) * kBlock + v, x_fours[j]);
      }
    }
  }
}

// `width` taps of `count` pairs as a tile, from either memory order.
template <int kTaps, class value_t>
ADAFM_INLINE Taps<float> tile_of(const value_t* x, const Strides& strides, int64_t width, int64_t count, float* tile) {
  if (strides.pair != 1) {
    transpose_block<kTaps>(x, strides.pair, count, width, tile);
  } else {
    for (int64_t t = 0; t < width; ++t) {
      for (int64_t i = 0; i < kBlock; i += kWidth) {
        const int64_t lanes = count - i;
        const value_t* row = x + t * strides.tap + i;
        write(tile + t * kBlock + i, lanes >= kWidth ? read(row) : lanes > 0 ? read_part(row, lanes) : broadcast(0.0f));
      }
    }
  }
  return {tile, kBlock};
}

// The sums of a block so far, from the outputs.
template <bool kGamma>
ADAFM_INLINE Sums read_sums(const ModulateBackwardArgs& args, int64_t pair) {
  const vec zero = broadcast(0.0f);
  Sums sums{{zero, zero}, {zero, zero}};
  if (kGamma) {
    read_two(static_cast<const float*>(args.grad_gamma) + pair, sums.gamma[0], sums.gamma[1]);
  }
  if (args.grad_beta != nullptr) {
    read_two(static_cast<const float*>(args.grad_beta) + pair, sums.beta[0], sums.beta[1]);
  }
  return sums;
}

// Writes the sums of the first `count` pairs of a block; a null output is not wanted.
template <bool kGamma>
ADAFM_INLINE void write_sums(const ModulateBackwardArgs& args, const Sums& sums, int64_t pair, int64_t count) {
  float* outputs[2] = {static_cast<float*>(kGamma ? args.grad_gamma : nullptr), static_cast<float*>(args.grad_beta)};
  for (int which = kGamma ? 0 : 1; which < 2; ++which) {
    const vec(&values)[2] = which == 0 ? sums.gamma : sums.beta;
    if (outputs[which] == nullptr) {
      continue;
    }
    float* out = outputs[which] + pair;
    if (count == kBlock) {
      write_two(out, values[0], values[1]);
    } else {
      write_part(out, values[0], std::min(kWidth, count));
      if (count > kWidth) {
        write_part(out + kWidth, values[1], count - kWidth);
      }
    }
  }
}

template <int kTaps, bool kGamma, class grad_t, class weight_t>
ADAFM_INLINE void sum_pairs(const ModulateBackwardArgs& args, int64_t begin, int64_t end) {
  const Shape& shape = args.shape;
  const int64_t taps = kTaps ? kTaps : shape.taps;
  const Strides grad_strides(effective_layout(args.grad_layout, shape), shape);
  const Strides weight_strides(effective_layout(args.weight_layout, shape), shape);
  // Pairs of neighbouring filters follow each other where no order is channels-last.
  const bool linear = grad_strides.tap == 1 && weight_strides.tap == 1;
  const bool in_place = grad_strides.pair == 1 && weight_strides.pair == 1;
  const vec zero = broadcast(0.0f);
  float grad_tile[kTile], weight_tile[kTile];
  for (int64_t pair = begin; pair < end;) {
    const Segment segment = segment_at(pair, end, linear ? shape.pairs() : shape.in_channels, kSpan);
    const grad_t* grad = static_cast<const grad_t*>(args.grad) + grad_strides.offset(segment);
    // Where dgamma is not wanted the weight may be null, and is not read.
    const weight_t* weight = static_cast<const weight_t*>(args.weight) + (kGamma ? weight_strides.offset(segment) : 0);
    int64_t i = 0;
    if (in_place) {
      const int64_t whole = segment.count - segment.count % kBlock;
      for (int64_t first = 0; first < taps; first += kStreams) {
        const int64_t width = kTaps ? kTaps : std::min(kStreams, taps - first);
        const Taps<grad_t> g{grad + first * grad_strides.tap, grad_strides.tap};
        const Taps<weight_t> w{weight + first * weight_strides.tap, weight_strides.tap};
        for (i = 0; i < whole; i += kBlock) {
          Sums sums = first == 0 ? Sums{{zero, zero}, {zero, zero}} : read_sums<kGamma>(args, pair + i);
          add_taps<kTaps, kGamma>(Taps<grad_t>{g.data + i, g.stride}, Taps<weight_t>{w.data + i, w.stride}, width,
                                  sums);
          write_sums<kGamma>(args, sums, pair + i, kBlock);
        }
      }
    }
    for (; i < segment.count; i += kBlock) {
      const int64_t count = std::min(kBlock, segment.count - i);
      Sums sums{{zero, zero}, {zero, zero}};
      for (int64_t first = 0; first < taps; first += kTileTaps) {
        const int64_t width = std::min(kTileTaps, taps - first);
        const grad_t* x = grad + i * grad_strides.pair + first * grad_strides.tap;
        const weight_t* w = kGamma ? weight + i * weight_strides.pair + first * weight_strides.tap : nullptr;
        Taps<float> weight_taps{nullptr, 0};
        if (kGamma) {
          weight_taps = tile_of<kTaps>(w, weight_strides, width, count, weight_tile);
        }
        // A whole block of a channels-last gradient is read where it lies.
        if (count == kBlock && grad_strides.pair == 1) {
          add_taps<kTaps, kGamma>(Taps<grad_t>{x, grad_strides.tap}, weight_taps, width, sums);
        } else {
          add_taps<kTaps, kGamma>(tile_of<kTaps>(x, grad_strides, width, count, grad_tile), weight_taps, width, sums);
        }
      }
      write_sums<kGamma>(args, sums, pair + i, count);
    }
    pair += segment.count;
  }
}

template <class grad_t, class weight_t>
void sum_taps(const ModulateBackwardArgs& args, int64_t begin, int64_t end) {
  if (args.grad_gamma == nullptr) {
    sum_pairs<0, false, grad_t, weight_t>(args, begin, end);
  } else if (args.shape.taps == 9) {
    sum_pairs<9, true, grad_t, weight_t>(args, begin, end);
  } else {
    sum_pairs<0, true, grad_t, weight_t>(args, begin, end);
  }
}
