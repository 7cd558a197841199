// W' = gamma * (W - mean) / deviation + beta on CUDA, over each filter's taps (by one thread) or each output channel
// (by one block).
//
// Instances: the five pairs of types that networks use (with_pair), eight pairs at a time; all others, other layouts
// and unaligned memory share Any<float>, and Any<double> for float64 weights, pair by pair.
#include "adafm/modulate_normalized.h"
#include "normalized.cuh"

namespace adafm {
namespace cuda {

template <class src_t, class dst_t>
struct NormalizedProblem {
  using acc_t = computing_type<src_t>;
  Source<src_t> weight;
  Target<dst_t> out;
  ParameterView<acc_t> gamma;
  ParameterView<acc_t> beta;
  int64_t out_channels;
  int64_t in_channels;
  int64_t taps;
  Strides from;
  Strides to;
  acc_t eps;
};

// One unit of filters. With kTaps the weights stay in registers; 0 stands for any number, read three times.
template <int kTaps, class src_t, class dst_t>
__device__ __forceinline__ void normalize_filters(const NormalizedProblem<src_t, dst_t>& p, int64_t o, int64_t i) {
  using acc_t = computing_type<src_t>;
  constexpr int width = kWidth<src_t>;
  constexpr int kUnroll = kTaps ? kTaps : 1;
  const int64_t taps = kTaps ? kTaps : p.taps;
  const int64_t from = o * p.from.filter + i * p.from.pair;
  const int64_t to = o * p.to.filter + i * p.to.pair;
  acc_t kept[kUnroll][width];
  if constexpr (kTaps != 0) {
#pragma unroll
    for (int t = 0; t < kTaps; ++t) {
      load_unit(p.weight, from + t * p.from.tap, kept[t]);
    }
  }
  const auto tap = [&](int64_t t) -> acc_t(&)[width] {
    if constexpr (kTaps == 0) {
      load_unit(p.weight, from + t * p.from.tap, kept[0]);
      return kept[0];
    }
    return kept[t];
  };
  acc_t mean[width] = {}, squares[width] = {};
#pragma unroll kUnroll
  for (int64_t t = 0; t < taps; ++t) {
    const acc_t(&x)[width] = tap(t);
#pragma unroll
    for (int j = 0; j < width; ++j) {
      mean[j] += x[j];
    }
  }
  const acc_t count = static_cast<acc_t>(taps);
#pragma unroll
  for (int j = 0; j < width; ++j) {
    mean[j] /= count;
  }
#pragma unroll kUnroll
  for (int64_t t = 0; t < taps; ++t) {
    const acc_t(&x)[width] = tap(t);
#pragma unroll
    for (int j = 0; j < width; ++j) {
      const acc_t d = x[j] - mean[j];
      squares[j] = fma(d, d, squares[j]);
    }
  }
  acc_t deviation[width], gamma[width], beta[width];
#pragma unroll
  for (int j = 0; j < width; ++j) {
    deviation[j] = Deviation<acc_t>(squares[j], count, p.eps).value;
  }
  load_parameter(p.gamma, o, i, gamma);
  load_parameter(p.beta, o, i, beta);
#pragma unroll kUnroll
  for (int64_t t = 0; t < taps; ++t) {
    const acc_t(&x)[width] = tap(t);
    acc_t y[width];
#pragma unroll
    for (int j = 0; j < width; ++j) {
      y[j] = fma(gamma[j], (x[j] - mean[j]) / deviation[j], beta[j]);
    }
    store_unit(p.out, to + t * p.to.tap, y);
  }
}

template <class src_t, class dst_t>
__global__ void __launch_bounds__(kThreads, 4)
    modulate_normalized_filter_kernel(const NormalizedProblem<src_t, dst_t> p) {
  constexpr int width = kWidth<src_t>;
  using number_t = UnitNumber<src_t>;
  const number_t row = static_cast<number_t>(p.in_channels / width);
  const int64_t units = p.out_channels * row;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t unit = int64_t{blockIdx.x} * kThreads + threadIdx.x; unit < units; unit += step) {
    const number_t o = static_cast<number_t>(unit) / row;
    const int64_t i = (static_cast<number_t>(unit) - o * row) * width;
    if (is_typed<src_t> && p.taps == 9) {
      normalize_filters<is_typed<src_t> ? 9 : 0>(p, o, i);
    } else {
      normalize_filters<0>(p, o, i);
    }
  }
}

// One block for each output channel: mean, deviation, result; the second and third reading come from L1 or L2.
template <class src_t, class dst_t>
__global__ void __launch_bounds__(kThreads, 6)
    modulate_normalized_channel_kernel(const NormalizedProblem<src_t, dst_t> p) {
  using acc_t = computing_type<src_t>;
  using number_t = UnitNumber<src_t>;
  constexpr int width = kWidth<src_t>;
  __shared__ acc_t shared[kThreads * width];
  const int64_t elements = p.in_channels * p.taps;
  for (int64_t o = blockIdx.x; o < p.out_channels; o += gridDim.x) {
    const Statistics<acc_t> of = channel_statistics(p.weight, p.from, o, p.in_channels, p.taps, p.eps, shared);
    const number_t row = static_cast<number_t>(p.in_channels / width);
    const number_t units = static_cast<number_t>(elements / width);
    for (number_t unit = threadIdx.x; unit < units; unit += kThreads) {
      const number_t t = unit / row;
      const int64_t i = (unit - t * row) * width;
      acc_t gamma[width], beta[width], x[width];
      load_unit(p.weight, o * p.from.filter + i * p.from.pair + t * p.from.tap, x);
      load_parameter(p.gamma, o, i, gamma);
      load_parameter(p.beta, o, i, beta);
#pragma unroll
      for (int j = 0; j < width; ++j) {
        x[j] = fma(gamma[j], (x[j] - of.mean) / of.deviation.value, beta[j]);
      }
      store_unit(p.out, o * p.to.filter + i * p.to.pair + t * p.to.tap, x);
    }
  }
}

template <class src_t, class dst_t>
int launch_modulate_normalized(const ModulateNormalizedArgs& args, cudaStream_t stream) {
  using acc_t = computing_type<src_t>;
  const Shape& shape = args.shape;
  const NormalizedProblem<src_t, dst_t> problem{{args.weight, args.weight_type},
                                                {args.out, args.out_type},
                                                view_of<acc_t>(args.gamma, shape),
                                                view_of<acc_t>(args.beta, shape),
                                                shape.out_channels,
                                                shape.in_channels,
                                                shape.taps,
                                                rows_or_strides<src_t>(args.weight_layout, shape),
                                                rows_or_strides<src_t>(args.out_layout, shape),
                                                static_cast<acc_t>(args.eps)};
  if (args.group == Group::kChannel) {
    return launch(modulate_normalized_channel_kernel<src_t, dst_t>, blocks_for(shape.out_channels * kThreads), stream,
                  problem);
  }
  return launch(modulate_normalized_filter_kernel<src_t, dst_t>, blocks_for(shape.pairs() / kWidth<src_t>), stream,
                problem);
}

}  // namespace cuda

int modulate_normalized_cuda(const ModulateNormalizedArgs& args, void* stream) {
  const Shape& shape = args.shape;
  if (shape.pairs() == 0 || shape.taps == 0) {
    return kOk;
  }
  const bool rows =
      cuda::path_of(shape, args.weight_layout, args.out_layout, {args.weight, args.out}) == cuda::Path::kRows;
  return cuda::with_pair(args.weight_type, args.out_type, rows, [&](auto src, auto dst) {
    return cuda::launch_modulate_normalized<decltype(src), decltype(dst)>(args, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace adafm
