// The vector loops of modulate.cpp, included once for each instruction level (simd.h).

// [O, taps, I] -> [O, taps, I]. Row by row, as the memory lies: gamma and beta are read again for each tap, from the
// first cache, which costs less than many streams through memory.
template <class src_t, class dst_t>
ADAFM_INLINE void channels_last(const ModulateArgs& args, int64_t begin, int64_t end) {
  const int64_t taps = args.shape.taps, row = args.shape.in_channels;
  float gamma_scratch[kSpan], beta_scratch[kSpan];
  for (int64_t pair = begin; pair < end;) {
    const Segment segment = segment_at(pair, end, row, kSpan);
    const float* gamma = segment_values(args.gamma, segment, gamma_scratch);
    const float* beta = segment_values(args.beta, segment, beta_scratch);
    const int64_t base = segment.o * taps * row + segment.first;
    const src_t* x = static_cast<const src_t*>(args.weight) + base;
    dst_t* y = static_cast<dst_t*>(args.out) + base;
    const int64_t whole = segment.count - segment.count % (2 * kWidth);
    for (int64_t t = 0; t < taps; ++t) {
      for (int64_t i = 0; i < whole; i += 2 * kWidth) {
        vec first, second;
        read_two(x + t * row + i, first, second);
        first = fma(read(gamma + i), first, read(beta + i));
        second = fma(read(gamma + i + kWidth), second, read(beta + i + kWidth));
        write_two(y + t * row + i, first, second);
      }
    }
    for (int64_t i = whole; i < segment.count; i += kWidth) {
      const int64_t lanes = std::min(kWidth, segment.count - i);
      const vec g = read_part(gamma + i, lanes), b = read_part(beta + i, lanes);
      for (int64_t t = 0; t < taps; ++t) {
        write_part(y + t * row + i, fma(g, read_part(x + t * row + i, lanes), b), lanes);
      }
    }
    pair += segment.count;
  }
}

// [O, I, taps] -> [O, I, taps]: the elements of kWidth pairs are `taps` whole vectors, and each takes its gamma and
// beta from those of the pairs by a shuffle. kTaps is taps, or 0 for any number below kWidth.
template <int kTaps, class src_t, class dst_t>
ADAFM_INLINE void contiguous(const ModulateArgs& args, int64_t begin, int64_t end) {
  const int taps = kTaps ? kTaps : int(args.shape.taps);
  int32_t lane[kWidth * (kTaps ? kTaps : kWidth)];
  for (int e = 0; e < kWidth * taps; ++e) {
    lane[e] = e / taps;
  }
  float gamma_scratch[kSpan], beta_scratch[kSpan];
  for (int64_t pair = begin; pair < end;) {
    const int64_t count = std::min(kSpan, end - pair);
    const float* gamma = pair_values(args.gamma, args.shape.in_channels, pair, count, gamma_scratch);
    const float* beta = pair_values(args.beta, args.shape.in_channels, pair, count, beta_scratch);
    const src_t* x = static_cast<const src_t*>(args.weight) + pair * taps;
    dst_t* y = static_cast<dst_t*>(args.out) + pair * taps;
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) {
      const vec g = read(gamma + i), b = read(beta + i);
#pragma GCC unroll 5
      for (int j = 0; j + 1 < taps; j += 2) {
        const int64_t at = i * taps + j * kWidth;
        const lane_index low = read_index(lane + j * kWidth), high = read_index(lane + (j + 1) * kWidth);
        vec first, second;
        read_two(x + at, first, second);
        write_two(y + at, fma(permute(g, low), first, permute(b, low)),
                  fma(permute(g, high), second, permute(b, high)));
      }
      if (taps % 2 != 0) {
        const int64_t at = i * taps + (taps - 1) * kWidth;
        const lane_index last = read_index(lane + (taps - 1) * kWidth);
        write(y + at, fma(permute(g, last), read(x + at), permute(b, last)));
      }
    }
    for (; i < count; ++i) {
      for (int64_t e = i * taps; e < (i + 1) * taps; ++e) {
        y[e] = store<dst_t>(std::fma(gamma[i], load<float>(x[e]), beta[i]));
      }
    }
    pair += count;
  }
}

// [O, I, taps] -> [O, I, taps] for any number of taps, filter positions one after the other.
template <class src_t, class dst_t>
ADAFM_INLINE void contiguous_rows(const ModulateArgs& args, int64_t begin, int64_t end) {
  const int64_t taps = args.shape.taps;
  float gamma_scratch[kSpan], beta_scratch[kSpan];
  for (int64_t pair = begin; pair < end;) {
    const int64_t count = std::min(kSpan, end - pair);
    const float* gamma = pair_values(args.gamma, args.shape.in_channels, pair, count, gamma_scratch);
    const float* beta = pair_values(args.beta, args.shape.in_channels, pair, count, beta_scratch);
    for (int64_t i = 0; i < count; ++i) {
      const vec g = broadcast(gamma[i]), b = broadcast(beta[i]);
      const src_t* x = static_cast<const src_t*>(args.weight) + (pair + i) * taps;
      dst_t* y = static_cast<dst_t*>(args.out) + (pair + i) * taps;
      int64_t t = 0;
      for (; t + kWidth <= taps; t += kWidth) {
        write(y + t, fma(g, read(x + t), b));
      }
      if (t < taps) {
        write_part(y + t, fma(g, read_part(x + t, taps - t), b), taps - t);
      }
    }
    pair += count;
  }
}

// [O, I, taps] -> [O, taps, I] for two vectors of pairs, four taps at a time; the last four may overlap those before.
// kTaps is taps, or 0 for any number from 4 on.
template <int kTaps, class src_t, class dst_t>
ADAFM_INLINE void transpose_pairs(const float* gamma, const float* beta, const src_t* x, dst_t* y, int64_t any_taps,
                                  int64_t row) {
  const int64_t taps = kTaps ? kTaps : any_taps;
  const vec g0 = read(gamma), g1 = read(gamma + kWidth), b0 = read(beta), b1 = read(beta + kWidth);
#pragma GCC unroll 3
  for (int64_t t = 0; t < taps; t += 4) {
    const int64_t first = std::min(t, taps - 4);
    vec low[4], high[4];
    for (int64_t j = 0; j < 4; ++j) {
      low[j] = read_fours(x + j * taps + first, 4 * taps);
      high[j] = read_fours(x + (kWidth + j) * taps + first, 4 * taps);
    }
    transpose_fours(low);
    transpose_fours(high);
    for (int64_t j = t - first; j < 4; ++j) {
      write_two(y + (first + j) * row, fma(g0, low[j], b0), fma(g1, high[j], b1));
    }
  }
}

template <int kTaps, class src_t, class dst_t>
ADAFM_INLINE void to_channels_last(const ModulateArgs& args, int64_t begin, int64_t end) {
  const int64_t taps = kTaps ? kTaps : args.shape.taps, row = args.shape.in_channels;
  float gamma_scratch[kSpan], beta_scratch[kSpan];
  for (int64_t pair = begin; pair < end;) {
    const Segment segment = segment_at(pair, end, row, kSpan);
    const float* gamma = segment_values(args.gamma, segment, gamma_scratch);
    const float* beta = segment_values(args.beta, segment, beta_scratch);
    const src_t* x = static_cast<const src_t*>(args.weight) + pair * taps;
    dst_t* y = static_cast<dst_t*>(args.out) + segment.o * taps * row + segment.first;
    int64_t i = 0;
    for (; i + 2 * kWidth <= segment.count; i += 2 * kWidth) {
      transpose_pairs<kTaps>(gamma + i, beta + i, x + i * taps, y + i, taps, row);
    }
    for (; i < segment.count; ++i) {
      for (int64_t t = 0; t < taps; ++t) {
        y[i + t * row] = store<dst_t>(std::fma(gamma[i], load<float>(x[i * taps + t]), beta[i]));
      }
    }
    pair += segment.count;
  }
}

// [O, taps, I] -> [O, I, taps] for two vectors of pairs, as above the other way round.
template <int kTaps, class src_t, class dst_t>
ADAFM_INLINE void transpose_rows(const float* gamma, const float* beta, const src_t* x, dst_t* y, int64_t any_taps,
                                 int64_t row) {
  const int64_t taps = kTaps ? kTaps : any_taps;
  const vec g0 = read(gamma), g1 = read(gamma + kWidth), b0 = read(beta), b1 = read(beta + kWidth);
#pragma GCC unroll 3
  for (int64_t t = 0; t < taps; t += 4) {
    const int64_t first = std::min(t, taps - 4);
    vec low[4], high[4];
    for (int64_t j = 0; j < 4; ++j) {
      read_two(x + (first + j) * row, low[j], high[j]);
      low[j] = fma(g0, low[j], b0);
      high[j] = fma(g1, high[j], b1);
    }
    transpose_fours(low);
    transpose_fours(high);
    for (int64_t j = 0; j < 4; ++j) {
      write_fours(y + j * taps + first, 4 * taps, low[j]);
      write_fours(y + (kWidth + j) * taps + first, 4 * taps, high[j]);
    }
  }
}

template <int kTaps, class src_t, class dst_t>
ADAFM_INLINE void to_contiguous(const ModulateArgs& args, int64_t begin, int64_t end) {
  const int64_t taps = kTaps ? kTaps : args.shape.taps, row = args.shape.in_channels;
  float gamma_scratch[kSpan], beta_scratch[kSpan];
  for (int64_t pair = begin; pair < end;) {
    const Segment segment = segment_at(pair, end, row, kSpan);
    const float* gamma = segment_values(args.gamma, segment, gamma_scratch);
    const float* beta = segment_values(args.beta, segment, beta_scratch);
    const src_t* x = static_cast<const src_t*>(args.weight) + segment.o * taps * row + segment.first;
    dst_t* y = static_cast<dst_t*>(args.out) + pair * taps;
    int64_t i = 0;
    for (; i + 2 * kWidth <= segment.count; i += 2 * kWidth) {
      transpose_rows<kTaps>(gamma + i, beta + i, x + i, y + i * taps, taps, row);
    }
    for (; i < segment.count; ++i) {
      for (int64_t t = 0; t < taps; ++t) {
        y[i * taps + t] = store<dst_t>(std::fma(gamma[i], load<float>(x[i + t * row]), beta[i]));
      }
    }
    pair += segment.count;
  }
}

// False where there is no loop for it: memory orders that differ, with two or three taps.
template <class src_t, class dst_t>
bool modulate(const ModulateArgs& args, int64_t begin, int64_t end) {
  const int64_t taps = args.shape.taps;
  const Layout from = effective_layout(args.weight_layout, args.shape);
  const Layout to = effective_layout(args.out_layout, args.shape);
  if (from == to) {
    if (from == Layout::kChannelsLast || (taps == 1 && args.shape.in_channels >= kWidth)) {
      channels_last<src_t, dst_t>(args, begin, end);
    } else if (taps == 9) {
      contiguous<9, src_t, dst_t>(args, begin, end);
    } else if (taps < kWidth) {
      contiguous<0, src_t, dst_t>(args, begin, end);
    } else {
      contiguous_rows<src_t, dst_t>(args, begin, end);
    }
  } else if (taps < 4) {
    return false;
  } else if (to == Layout::kChannelsLast) {
    if (taps == 9) {
      to_channels_last<9, src_t, dst_t>(args, begin, end);
    } else {
      to_channels_last<0, src_t, dst_t>(args, begin, end);
    }
  } else if (taps == 9) {
    to_contiguous<9, src_t, dst_t>(args, begin, end);
  } else {
    to_contiguous<0, src_t, dst_t>(args, begin, end);
  }
  return true;
}
