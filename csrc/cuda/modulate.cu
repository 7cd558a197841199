// W' = gamma * W + beta on CUDA.
//
// Instances: rows and flat kernels for the 9 pairs of {float32, float16, bfloat16}, since networks mix them freely
// (flat twice: for 3x3 filters and for any number of taps from 8); the strided kernel for all 16 pairs, as the only one
// for float64, for a change of layout, for few taps and for unaligned memory.
#include "adafm/modulate.h"
#include "parameter.cuh"

namespace adafm {
namespace cuda {

template <class src_t, class dst_t>
struct Problem {
  using acc_t = acc_type<src_t>;
  const src_t* __restrict__ weight;
  dst_t* __restrict__ out;
  ParameterView<acc_t> gamma;
  ParameterView<acc_t> beta;
  int64_t pairs;
  int64_t in_channels;
  int64_t taps;
  Strides from;
  Strides to;
};

// Any memory orders, any alignment: one thread for each pair.
template <class src_t, class dst_t>
__global__ void __launch_bounds__(kThreads) modulate_strided_kernel(const Problem<src_t, dst_t> p) {
  using acc_t = acc_type<src_t>;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t pair = int64_t{blockIdx.x} * kThreads + threadIdx.x; pair < p.pairs; pair += step) {
    const int64_t o = pair / p.in_channels;
    const int64_t i = pair - o * p.in_channels;
    const acc_t gamma = p.gamma.at(o, i);
    const acc_t beta = p.beta.at(o, i);
    const src_t* x = p.weight + o * p.from.filter + i * p.from.pair;
    dst_t* y = p.out + o * p.to.filter + i * p.to.pair;
    for (int64_t t = 0; t < p.taps; ++t) {
      y[t * p.to.tap] = store<dst_t>(fma(gamma, load<acc_t>(__ldg(x + t * p.from.tap)), beta));
    }
  }
}

// [O, taps, I] -> [O, taps, I], I a multiple of 8: one thread for eight neighbouring pairs and all their taps.
// Three taps are read before the first is written, to have more reads under way.
template <class src_t, class dst_t>
__global__ void __launch_bounds__(kThreads, 6) modulate_rows_kernel(const Problem<src_t, dst_t> p) {
  constexpr int kBatch = 3;
  const uint32_t vectors = static_cast<uint32_t>(p.pairs / kVector);
  const uint32_t row = static_cast<uint32_t>(p.in_channels / kVector);
  const uint32_t vector = blockIdx.x * kThreads + threadIdx.x;
  if (vector >= vectors) {
    return;
  }
  const uint32_t o = vector / row;
  const uint32_t i = (vector - o * row) * kVector;
  float gamma[kVector], beta[kVector];
  p.gamma.load_row(o, i, gamma);
  p.beta.load_row(o, i, beta);
  const int64_t base = int64_t{o} * p.from.filter + i;
  const src_t* x = p.weight + base;
  dst_t* y = p.out + base;
  int64_t t = 0;
  for (; t + kBatch <= p.taps; t += kBatch) {
    float values[kBatch][kVector];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      load_vector(x + (t + b) * p.in_channels, values[b]);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        values[b][j] = fmaf(gamma[j], values[b][j], beta[j]);
      }
      store_vector(y + (t + b) * p.in_channels, values[b]);
    }
  }
  for (; t < p.taps; ++t) {
    float values[kVector];
    load_vector(x + t * p.in_channels, values);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      values[j] = fmaf(gamma[j], values[j], beta[j]);
    }
    store_vector(y + t * p.in_channels, values);
  }
}

// [O, I, taps] -> [O, I, taps], taps >= 8: one thread for eight neighbouring elements, which belong to at most two
// pairs; the last thread takes the tail. kTaps is taps, or 0 for any number.
template <class src_t, class dst_t, int kTaps>
__global__ void __launch_bounds__(kThreads) modulate_flat_kernel(const Problem<src_t, dst_t> p) {
  const uint32_t taps = kTaps ? kTaps : static_cast<uint32_t>(p.taps);
  const uint32_t in_channels = static_cast<uint32_t>(p.in_channels);
  const uint32_t pairs = static_cast<uint32_t>(p.pairs);
  const uint32_t first = (blockIdx.x * kThreads + threadIdx.x) * kVector;
  if (first >= pairs * taps) {
    return;
  }
  const uint32_t pair = first / taps;
  const uint32_t next_pair = pair + 1 < pairs ? pair + 1 : pair;
  const uint32_t left = taps - (first - pair * taps);  // elements that belong to `pair`
  const float gamma = p.gamma.at_pair(pair, in_channels), next_gamma = p.gamma.at_pair(next_pair, in_channels);
  const float beta = p.beta.at_pair(pair, in_channels), next_beta = p.beta.at_pair(next_pair, in_channels);
  const src_t* x = p.weight + first;
  dst_t* y = p.out + first;
  const uint32_t count = pairs * taps - first;
  if (count < kVector) {
    for (uint32_t j = 0; j < count; ++j) {
      y[j] = store<dst_t>(fmaf(j < left ? gamma : next_gamma, load<float>(__ldg(x + j)), j < left ? beta : next_beta));
    }
    return;
  }
  float values[kVector];
  load_vector(x, values);
#pragma unroll
  for (uint32_t j = 0; j < kVector; ++j) {
    values[j] = fmaf(j < left ? gamma : next_gamma, values[j], j < left ? beta : next_beta);
  }
  store_vector(y, values);
}

template <class src_t, class dst_t>
int launch_modulate(const ModulateArgs& args, cudaStream_t stream) {
  using acc_t = acc_type<src_t>;
  const Shape& shape = args.shape;
  const Layout from = effective_layout(args.weight_layout, shape);
  const Layout to = effective_layout(args.out_layout, shape);
  Problem<src_t, dst_t> problem{static_cast<const src_t*>(args.weight),
                                static_cast<dst_t*>(args.out),
                                view_of<acc_t>(args.gamma, shape),
                                view_of<acc_t>(args.beta, shape),
                                shape.pairs(),
                                shape.in_channels,
                                shape.taps,
                                strides_of(from, shape),
                                strides_of(to, shape)};
  if constexpr (!std::is_same_v<src_t, double> && !std::is_same_v<dst_t, double>) {
    const bool vector =
        from == to && is_aligned(args.weight) && is_aligned(args.out) && shape.pairs() * shape.taps < kIndexLimit;
    const bool unit_rows = from == Layout::kChannelsLast || shape.taps == 1;
    if (vector && unit_rows && shape.in_channels % kVector == 0) {
      return launch(modulate_rows_kernel<src_t, dst_t>, blocks_for(problem.pairs / kVector), stream, problem);
    }
    if (vector && from == Layout::kContiguous && shape.taps >= kVector) {
      const unsigned blocks = blocks_for((problem.pairs * shape.taps + kVector - 1) / kVector);
      if (shape.taps == 9) {
        return launch(modulate_flat_kernel<src_t, dst_t, 9>, blocks, stream, problem);
      }
      return launch(modulate_flat_kernel<src_t, dst_t, 0>, blocks, stream, problem);
    }
  }
  return launch(modulate_strided_kernel<src_t, dst_t>, blocks_for(problem.pairs), stream, problem);
}

}  // namespace cuda

int modulate_cuda(const ModulateArgs& args, void* stream) {
  if (args.shape.pairs() == 0 || args.shape.taps == 0) {
    return kOk;
  }
  return cuda::with_type(args.weight_type, [&](auto src) {
    return cuda::with_type(args.out_type, [&](auto dst) {
      return cuda::launch_modulate<decltype(src), decltype(dst)>(args, static_cast<cudaStream_t>(stream));
    });
  });
}

}  // namespace adafm
