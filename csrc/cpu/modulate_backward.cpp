// dW = gamma * G, dgamma = sum_k G * W, dbeta = sum_k G on the CPU.
//
// The pairs of element types that networks use have loops in AVX-512 and AVX2 registers (modulate_backward_loops.h),
// and a body in plain C++ for other machines: gradient and weight are brought into tiles [taps, pairs] of the computing
// type (left in place where they already are), a block of pairs is summed in registers, and every pair adds its taps in
// order. Vectors run across pairs, so the vector width does not change a sum. The other pairs of types share one
// strided loop, which is compiled three times (clones.h).
#include "adafm/modulate_backward.h"

#include "adafm/modulate.h"
#include "pairs.h"
#include "simd.h"

namespace adafm {
namespace cpu {

#if ADAFM_HAS_V4
ADAFM_BEGIN_V4
#include "modulate_backward_loops.h"
ADAFM_END_V4
#endif
#if ADAFM_HAS_V3
ADAFM_BEGIN_V3
#include "modulate_backward_loops.h"
ADAFM_END_V3
#endif

constexpr int64_t kBlock = 16;  // pairs that the plain body sums at a time

// Elements (tap t, pair i) of a segment at data[t * stride + i].
template <class acc_t>
struct TileView {
  const acc_t* data;
  int64_t stride;
};

// tile[t][i] = x[i][t]. kStride is the distance between pairs, or 0 for the one given.
template <int kStride, class src_t, class acc_t>
ADAFM_INLINE void transpose_tile(const src_t* __restrict__ x, int64_t stride, int64_t count, int64_t width,
                                 acc_t* __restrict__ tile) {
  const int64_t step = kStride ? kStride : stride;
  for (int64_t t = 0; t < width; ++t) {
    for (int64_t i = 0; i < count; ++i) {
      tile[t * kLanes + i] = load<acc_t>(x[i * step + t]);
    }
  }
}

// Taps [first, first + width) of a segment. Copies to `tile` unless the memory has this order and type already.
template <class src_t, class acc_t>
ADAFM_INLINE TileView<acc_t> view_tile(const void* base, Layout layout, const Shape& shape, const Segment& segment,
                                       int64_t first, int64_t width, acc_t* tile) {
  const Strides strides(layout, shape);
  const src_t* x = static_cast<const src_t*>(base) + strides.offset(segment) + first * strides.tap;
  if constexpr (std::is_same_v<src_t, acc_t>) {
    if (strides.pair == 1) {
      return {x, strides.tap};
    }
  }
  if (strides.pair == 1) {
    for (int64_t t = 0; t < width; ++t) {
      const src_t* __restrict__ row = x + t * strides.tap;
      for (int64_t i = 0; i < segment.count; ++i) {
        tile[t * kLanes + i] = load<acc_t>(row[i]);
      }
    }
  } else if (shape.taps == 9) {
    transpose_tile<9>(x, 9, segment.count, width, tile);
  } else if (shape.taps == 16) {
    transpose_tile<16>(x, 16, segment.count, width, tile);
  } else {
    transpose_tile<0>(x, strides.pair, segment.count, width, tile);
  }
  return {tile, kLanes};
}

// Adds taps to the running sums of pairs [first, first + kCount).
template <int64_t kCount, class acc_t>
ADAFM_INLINE void add_taps(const TileView<acc_t>& grad, const TileView<acc_t>& weight, int64_t width, int64_t first,
                           acc_t* sum_gamma, acc_t* sum_beta) {
  acc_t gamma[kCount], beta[kCount];
  for (int64_t i = 0; i < kCount; ++i) {
    gamma[i] = sum_gamma[first + i];
    beta[i] = sum_beta[first + i];
  }
  for (int64_t t = 0; t < width; ++t) {
    const acc_t* g = grad.data + t * grad.stride + first;
    const acc_t* w = weight.data + t * weight.stride + first;
    for (int64_t i = 0; i < kCount; ++i) {
      gamma[i] = std::fma(g[i], w[i], gamma[i]);
      beta[i] += g[i];
    }
  }
  for (int64_t i = 0; i < kCount; ++i) {
    sum_gamma[first + i] = gamma[i];
    sum_beta[first + i] = beta[i];
  }
}

// dW of a segment's taps [first, first + width), from the gradient's tile.
template <class weight_t, class acc_t>
ADAFM_INLINE void scale_tile(const TileView<acc_t>& grad, const acc_t* gamma, void* base, Layout layout,
                             const Shape& shape, const Segment& segment, int64_t first, int64_t width) {
  const Strides strides(layout, shape);
  weight_t* y = static_cast<weight_t*>(base) + strides.offset(segment) + first * strides.tap;
  for (int64_t t = 0; t < width; ++t) {
    const acc_t* g = grad.data + t * grad.stride;
    weight_t* row = y + t * strides.tap;
    if (strides.pair == 1) {
      for (int64_t i = 0; i < segment.count; ++i) {
        row[i] = store<weight_t>(gamma[i] * g[i]);
      }
    } else {
      for (int64_t i = 0; i < segment.count; ++i) {
        row[i * strides.pair] = store<weight_t>(gamma[i] * g[i]);
      }
    }
  }
}

template <class grad_t, class weight_t>
void modulate_backward_plain(const ModulateBackwardArgs& args, int64_t begin, int64_t end) {
  using acc_t = acc_type<weight_t>;
  const Shape shape = args.shape;
  const int64_t chunk = std::min(shape.taps, kTile / kLanes);
  const bool reduce = args.grad_gamma != nullptr || args.grad_beta != nullptr;
  acc_t gamma_scratch[kLanes], grad_tile[kTile], weight_tile[kTile];
  for (int64_t pair = begin; pair < end;) {
    const Segment segment = segment_at(pair, end, shape.in_channels);
    acc_t sum_gamma[kLanes] = {}, sum_beta[kLanes] = {};
    for (int64_t first = 0; first < shape.taps; first += chunk) {
      const int64_t width = std::min(chunk, shape.taps - first);
      const TileView<acc_t> grad =
          view_tile<grad_t>(args.grad, args.grad_layout, shape, segment, first, width, grad_tile);
      if (reduce) {
        // Where only dbeta is wanted the weight is not read; the product then goes nowhere.
        const TileView<acc_t> weight =
            args.grad_gamma == nullptr
                ? grad
                : view_tile<weight_t>(args.weight, args.weight_layout, shape, segment, first, width, weight_tile);
        int64_t i = 0;
        for (; i + kBlock <= segment.count; i += kBlock) {
          add_taps<kBlock>(grad, weight, width, i, sum_gamma, sum_beta);
        }
        for (; i < segment.count; ++i) {
          add_taps<1>(grad, weight, width, i, sum_gamma, sum_beta);
        }
      }
      if (args.grad_weight != nullptr) {
        const acc_t* gamma = segment_values(args.gamma, segment, gamma_scratch);
        scale_tile<weight_t>(grad, gamma, args.grad_weight, args.weight_layout, shape, segment, first, width);
      }
    }
    if (args.grad_gamma != nullptr) {
      std::copy_n(sum_gamma, segment.count, static_cast<acc_t*>(args.grad_gamma) + pair);
    }
    if (args.grad_beta != nullptr) {
      std::copy_n(sum_beta, segment.count, static_cast<acc_t*>(args.grad_beta) + pair);
    }
    pair += segment.count;
  }
}

// Any memory orders, any element types.
template <class grad_t, class weight_t>
ADAFM_CLONES void modulate_backward_strided(const ModulateBackwardArgs& args, int64_t begin, int64_t end) {
  using acc_t = acc_type<weight_t>;
  const Shape shape = args.shape;
  const Strides from(args.grad_layout, shape), to(args.weight_layout, shape);
  acc_t gamma_scratch[kLanes];
  for (int64_t pair = begin; pair < end;) {
    const Segment segment = segment_at(pair, end, shape.in_channels);
    const grad_t* grad = static_cast<const grad_t*>(args.grad) + from.offset(segment);
    const int64_t offset = to.offset(segment);
    if (args.grad_weight != nullptr) {
      const acc_t* gamma = segment_values(args.gamma, segment, gamma_scratch);
      weight_t* y = static_cast<weight_t*>(args.grad_weight) + offset;
      for (int64_t i = 0; i < segment.count; ++i) {
        for (int64_t t = 0; t < shape.taps; ++t) {
          y[i * to.pair + t * to.tap] = store<weight_t>(gamma[i] * load<acc_t>(grad[i * from.pair + t * from.tap]));
        }
      }
    }
    if (args.grad_gamma != nullptr) {
      const weight_t* weight = static_cast<const weight_t*>(args.weight) + offset;
      for (int64_t i = 0; i < segment.count; ++i) {
        acc_t sum = 0;
        for (int64_t t = 0; t < shape.taps; ++t) {
          sum = std::fma(load<acc_t>(grad[i * from.pair + t * from.tap]), load<acc_t>(weight[i * to.pair + t * to.tap]),
                         sum);
        }
        static_cast<acc_t*>(args.grad_gamma)[pair + i] = sum;
      }
    }
    if (args.grad_beta != nullptr) {
      for (int64_t i = 0; i < segment.count; ++i) {
        acc_t sum = 0;
        for (int64_t t = 0; t < shape.taps; ++t) {
          sum += load<acc_t>(grad[i * from.pair + t * from.tap]);
        }
        static_cast<acc_t*>(args.grad_beta)[pair + i] = sum;
      }
    }
    pair += segment.count;
  }
}

template <class grad_t, class weight_t>
constexpr bool has_vector_body() {
  constexpr bool half = std::is_same_v<grad_t, float16> || std::is_same_v<grad_t, bfloat16>;
  return (std::is_same_v<weight_t, float> && !std::is_same_v<grad_t, double>) ||
         (half && std::is_same_v<grad_t, weight_t>);
}

// dgamma and dbeta with the vector loops of this machine's level; false where it has none.
template <class grad_t, class weight_t>
bool sum_taps([[maybe_unused]] const ModulateBackwardArgs& args, [[maybe_unused]] int64_t begin,
              [[maybe_unused]] int64_t end) {
  switch (vector_level()) {
#if ADAFM_HAS_V4
    case Level::kV4:
      v4::sum_taps<grad_t, weight_t>(args, begin, end);
      return true;
#endif
#if ADAFM_HAS_V3
    case Level::kV3:
      v3::sum_taps<grad_t, weight_t>(args, begin, end);
      return true;
#endif
    default:
      return false;
  }
}

// dW = gamma * G is the forward on the gradient: with beta = -0 its fused multiply-add is the product, bit for bit.
int scale_grad(const ModulateBackwardArgs& args, int64_t begin, int64_t end) {
  static constexpr float kNothing = -0.0f;
  return modulate_cpu({args.shape,
                       args.grad,
                       args.grad_type,
                       args.grad_layout,
                       args.gamma,
                       {&kNothing, 0, 0},
                       args.grad_weight,
                       args.weight_type,
                       args.weight_layout},
                      begin, end);
}

// Both, for so many pairs at a time that the gradient stays in the cache in between.
template <class grad_t, class weight_t>
bool vector_loops(const ModulateBackwardArgs& args, int64_t begin, int64_t end) {
  if (vector_level() == Level::kPlain) {
    return false;
  }
  const bool reduce = args.grad_gamma != nullptr || args.grad_beta != nullptr;
  if (args.grad_weight == nullptr || !reduce) {
    return reduce ? sum_taps<grad_t, weight_t>(args, begin, end) : scale_grad(args, begin, end) == kOk;
  }
  const int64_t row = args.shape.in_channels,
                wanted = std::max(kLanes, 4 * kTile / std::max<int64_t>(1, args.shape.taps));
  const int64_t step = row < wanted ? wanted / row * row : wanted;
  for (int64_t first = begin; first < end; first += step) {
    const int64_t last = std::min(first + step, end);
    sum_taps<grad_t, weight_t>(args, first, last);
    scale_grad(args, first, last);
  }
  return true;
}

}  // namespace cpu

int modulate_backward_cpu(const ModulateBackwardArgs& args, int64_t begin, int64_t end) {
  if (begin >= end) {
    return kOk;
  }
  return with_type(args.grad_type, [&](auto grad) {
    return with_type(args.weight_type, [&](auto weight) {
      using grad_t = decltype(grad);
      using weight_t = decltype(weight);
      if constexpr (cpu::has_vector_body<grad_t, weight_t>()) {
        if (cpu::vector_loops<grad_t, weight_t>(args, begin, end)) {
          return int(kOk);
        }
        cpu::modulate_backward_plain<grad_t, weight_t>(args, begin, end);
      } else {
        cpu::modulate_backward_strided<grad_t, weight_t>(args, begin, end);
      }
      return int(kOk);
    });
  });
}

}  // namespace adafm
