// The gradients of W' = gamma * n + beta, n = (W - mean) / deviation, on CUDA; formulas in modulate_normalized.h. All
// sums have one order; each filter is summed by one thread, each output channel by one block.
//
// Instances: the five pairs of types that networks use (with_pair), eight pairs at a time; all others, other layouts
// and unaligned memory share Any<float>, and Any<double> for float64 weights, pair by pair.
#include "adafm/modulate_normalized.h"
#include "normalized.cuh"

namespace adafm {
namespace cuda {

// Null outputs are not computed.
template <class grad_t, class weight_t>
struct NormalizedBackwardProblem {
  using acc_t = computing_type<weight_t>;
  Source<grad_t> grad;
  Source<weight_t> weight;
  ParameterView<acc_t> gamma;
  Target<weight_t> grad_weight;
  acc_t* grad_gamma;
  acc_t* grad_beta;
  int64_t out_channels;
  int64_t in_channels;
  int64_t taps;
  Strides from;
  Strides to;
  acc_t eps;
};

// What one unit of pairs gives: sums over its taps of dn, dn * n, G * n and G, with dn = gamma * G.
template <class acc_t, int width>
struct UnitSums {
  acc_t dn[width] = {}, dn_n[width] = {}, gamma[width] = {}, beta[width] = {};

  __device__ __forceinline__ void add(int j, acc_t grad, acc_t d, acc_t n) {
    dn[j] += d;
    dn_n[j] = fma(d, n, dn_n[j]);
    gamma[j] = fma(grad, n, gamma[j]);
    beta[j] += grad;
  }
};

template <class grad_t, class weight_t, class acc_t, int width>
__device__ __forceinline__ void store_unit_sums(const NormalizedBackwardProblem<grad_t, weight_t>& p, int64_t pair,
                                                const UnitSums<acc_t, width>& sums) {
  if (p.grad_gamma != nullptr) {
    store_sums(p.grad_gamma + pair, sums.gamma);
  }
  if (p.grad_beta != nullptr) {
    store_sums(p.grad_beta + pair, sums.beta);
  }
}

// One unit of filters. With kTaps the weights stay in registers; 0 stands for any number, read again for each pass.
template <int kTaps, class grad_t, class weight_t>
__device__ __forceinline__ void normalize_filters_backward(const NormalizedBackwardProblem<grad_t, weight_t>& p,
                                                           int64_t o, int64_t i) {
  using acc_t = computing_type<weight_t>;
  constexpr int width = kWidth<weight_t>;
  constexpr int kUnroll = kTaps ? kTaps : 1;
  const int64_t taps = kTaps ? kTaps : p.taps;
  const int64_t from = o * p.from.filter + i * p.from.pair;
  const int64_t to = o * p.to.filter + i * p.to.pair;
  acc_t kept[kUnroll][width];
  if constexpr (kTaps != 0) {
#pragma unroll
    for (int t = 0; t < kTaps; ++t) {
      load_unit(p.weight, to + t * p.to.tap, kept[t]);
    }
  }
  const auto tap = [&](int64_t t) -> acc_t(&)[width] {
    if constexpr (kTaps == 0) {
      load_unit(p.weight, to + t * p.to.tap, kept[0]);
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
  Deviation<acc_t> deviation[width];
#pragma unroll
  for (int j = 0; j < width; ++j) {
    deviation[j] = Deviation<acc_t>(squares[j], count, p.eps);
  }
  acc_t gamma[width] = {};
  if (p.grad_weight.data != nullptr) {
    load_parameter(p.gamma, o, i, gamma);
  }
  UnitSums<acc_t, width> sums;
#pragma unroll kUnroll
  for (int64_t t = 0; t < taps; ++t) {
    acc_t(&x)[width] = tap(t);
    acc_t grad[width];
    load_unit(p.grad, from + t * p.from.tap, grad);
#pragma unroll
    for (int j = 0; j < width; ++j) {
      x[j] = (x[j] - mean[j]) / deviation[j].value;  // with kTaps, n takes the weight's place
      sums.add(j, grad[j], gamma[j] * grad[j], x[j]);
    }
  }
  store_unit_sums(p, o * p.in_channels + i, sums);
  if (p.grad_weight.data == nullptr) {
    return;
  }
#pragma unroll
  for (int j = 0; j < width; ++j) {
    sums.dn[j] /= count;
    sums.dn_n[j] = deviation[j].guarded ? acc_t(0) : sums.dn_n[j] / (count - 1);
  }
#pragma unroll kUnroll
  for (int64_t t = 0; t < taps; ++t) {
    acc_t(&x)[width] = tap(t);
    acc_t grad[width];
    load_unit(p.grad, from + t * p.from.tap, grad);
#pragma unroll
    for (int j = 0; j < width; ++j) {
      const acc_t n = kTaps ? x[j] : (x[j] - mean[j]) / deviation[j].value;
      grad[j] = fma(-n, sums.dn_n[j], gamma[j] * grad[j] - sums.dn[j]) / deviation[j].value;
    }
    store_unit(p.grad_weight, to + t * p.to.tap, grad);
  }
}

// Two float32 operands of nine taps need more registers than a third block on a multiprocessor would leave.
template <class grad_t, class weight_t>
__global__ void __launch_bounds__(kThreads, sizeof(grad_t) == sizeof(float) ? 2 : 3)
    modulate_normalized_backward_filter_kernel(const NormalizedBackwardProblem<grad_t, weight_t> p) {
  constexpr int width = kWidth<weight_t>;
  using number_t = UnitNumber<weight_t>;
  const number_t row = static_cast<number_t>(p.in_channels / width);
  const int64_t units = p.out_channels * row;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t unit = int64_t{blockIdx.x} * kThreads + threadIdx.x; unit < units; unit += step) {
    const number_t o = static_cast<number_t>(unit) / row;
    const int64_t i = (static_cast<number_t>(unit) - o * row) * width;
    if (is_typed<weight_t> && p.taps == 9) {
      normalize_filters_backward<is_typed<weight_t> ? 9 : 0>(p, o, i);
    } else {
      normalize_filters_backward<0>(p, o, i);
    }
  }
}

// One block for each output channel. Pairs are summed by one thread, tap after tap, then by LaneSum; what is read again
// comes from L1 or L2.
template <class grad_t, class weight_t>
__global__ void __launch_bounds__(kThreads, 4)
    modulate_normalized_backward_channel_kernel(const NormalizedBackwardProblem<grad_t, weight_t> p) {
  using acc_t = computing_type<weight_t>;
  using number_t = UnitNumber<weight_t>;
  constexpr int width = kWidth<weight_t>;
  using sum_t = LaneSum<acc_t, width>;
  __shared__ acc_t shared[kThreads * width];
  const int64_t elements = p.in_channels * p.taps;
  const number_t row = static_cast<number_t>(p.in_channels / width);
  for (int64_t o = blockIdx.x; o < p.out_channels; o += gridDim.x) {
    const Statistics<acc_t> of = channel_statistics(p.weight, p.to, o, p.in_channels, p.taps, p.eps, shared);
    sum_t sum_dn{shared}, sum_dn_n{shared};
    for (int64_t first = 0; first < p.in_channels; first += sum_t::kPairs) {
      UnitSums<acc_t, width> sums;
      const int64_t i = first + threadIdx.x * width;
      if (i < p.in_channels) {
        acc_t gamma[width] = {};
        if (p.grad_weight.data != nullptr) {
          load_parameter(p.gamma, o, i, gamma);
        }
        for (int64_t t = 0; t < p.taps; ++t) {
          acc_t x[width], grad[width];
          load_unit(p.weight, o * p.to.filter + i * p.to.pair + t * p.to.tap, x);
          load_unit(p.grad, o * p.from.filter + i * p.from.pair + t * p.from.tap, grad);
#pragma unroll
          for (int j = 0; j < width; ++j) {
            sums.add(j, grad[j], gamma[j] * grad[j], (x[j] - of.mean) / of.deviation.value);
          }
        }
        store_unit_sums(p, o * p.in_channels + i, sums);
      }
      if (p.grad_weight.data != nullptr) {
        sum_dn.add(sums.dn, p.in_channels - first);
        sum_dn_n.add(sums.dn_n, p.in_channels - first);
      }
    }
    if (p.grad_weight.data == nullptr) {
      continue;
    }
    const acc_t count = static_cast<acc_t>(elements);
    const acc_t mean_dn = sum_dn.total() / count;
    const acc_t total_dn_n = sum_dn_n.total();
    const acc_t slope = of.deviation.guarded ? acc_t(0) : total_dn_n / (count - 1);
    const number_t units = static_cast<number_t>(elements / width);
    for (number_t unit = threadIdx.x; unit < units; unit += kThreads) {
      const number_t t = unit / row;
      const int64_t i = (unit - t * row) * width;
      const int64_t to = o * p.to.filter + i * p.to.pair + t * p.to.tap;
      acc_t gamma[width], x[width], grad[width];
      load_unit(p.weight, to, x);
      load_unit(p.grad, o * p.from.filter + i * p.from.pair + t * p.from.tap, grad);
      load_parameter(p.gamma, o, i, gamma);
#pragma unroll
      for (int j = 0; j < width; ++j) {
        const acc_t n = (x[j] - of.mean) / of.deviation.value;
        grad[j] = fma(-n, slope, gamma[j] * grad[j] - mean_dn) / of.deviation.value;
      }
      store_unit(p.grad_weight, to, grad);
    }
  }
}

template <class grad_t, class weight_t>
int launch_modulate_normalized_backward(const ModulateNormalizedBackwardArgs& args, cudaStream_t stream) {
  using acc_t = computing_type<weight_t>;
  const Shape& shape = args.shape;
  const NormalizedBackwardProblem<grad_t, weight_t> problem{{args.grad, args.grad_type},
                                                            {args.weight, args.weight_type},
                                                            view_of<acc_t>(args.gamma, shape),
                                                            {args.grad_weight, args.weight_type},
                                                            static_cast<acc_t*>(args.grad_gamma),
                                                            static_cast<acc_t*>(args.grad_beta),
                                                            shape.out_channels,
                                                            shape.in_channels,
                                                            shape.taps,
                                                            rows_or_strides<weight_t>(args.grad_layout, shape),
                                                            rows_or_strides<weight_t>(args.weight_layout, shape),
                                                            static_cast<acc_t>(args.eps)};
  if (args.group == Group::kChannel) {
    return launch(modulate_normalized_backward_channel_kernel<grad_t, weight_t>,
                  blocks_for(shape.out_channels * kThreads), stream, problem);
  }
  return launch(modulate_normalized_backward_filter_kernel<grad_t, weight_t>,
                blocks_for(shape.pairs() / kWidth<weight_t>), stream, problem);
}

}  // namespace cuda

int modulate_normalized_backward_cuda(const ModulateNormalizedBackwardArgs& args, void* stream) {
  const Shape& shape = args.shape;
  if (shape.pairs() == 0) {
    return kOk;
  }
  const bool rows =
      cuda::path_of(shape, args.grad_layout, args.weight_layout,
                    {args.grad, args.weight, args.grad_weight, args.grad_gamma, args.grad_beta}) == cuda::Path::kRows;
  return cuda::with_pair(args.weight_type, args.grad_type, rows, [&](auto weight, auto grad) {
    return cuda::launch_modulate_normalized_backward<decltype(grad), decltype(weight)>(
        args, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace adafm
