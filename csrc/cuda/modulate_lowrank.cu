// W' = gamma * W + beta with gamma = gamma0 + left * right on CUDA; gamma is formed in registers, in the order of r.
//
// Instances: the rows kernel for the five pairs of types that networks use (with_pair); the pairs kernel for all
// others, for [O, I, taps], a change of layout and unaligned memory: Any<float>, and Any<double> for float64 weights.
#include "adafm/modulate_lowrank.h"
#include "modulate.cuh"

namespace adafm {
namespace cuda {

template <class src_t, class dst_t>
struct LowrankProblem {
  using acc_t = computing_type<src_t>;
  Source<src_t> weight;
  Target<dst_t> out;
  ParameterView<acc_t> gamma;
  ParameterView<acc_t> beta;
  const acc_t* left;
  const acc_t* right;
  int64_t rank;
  int64_t pairs;
  int64_t in_channels;
  int64_t taps;
  Strides from;
  Strides to;
};

// [O, taps, I] -> [O, taps, I], I a multiple of 8: one thread for eight neighbouring pairs and all their taps.
template <class src_t, class dst_t>
__global__ void __launch_bounds__(kThreads, 6) modulate_lowrank_rows_kernel(const LowrankProblem<src_t, dst_t> p) {
  const uint32_t vector = blockIdx.x * kThreads + threadIdx.x;
  const uint32_t row = static_cast<uint32_t>(p.in_channels / kVector);
  if (vector >= static_cast<uint32_t>(p.pairs / kVector)) {
    return;
  }
  const uint32_t o = vector / row;
  const uint32_t i = (vector - o * row) * kVector;
  float gamma[kVector], beta[kVector];
  p.gamma.load_row(o, i, gamma);
  const float* left = p.left + o * p.rank;
  const float* right = p.right + i;
#pragma unroll 2
  for (int64_t r = 0; r < p.rank; ++r) {
    float columns[kVector];
    load_vector(right + r * p.in_channels, columns);
    const float factor = __ldg(left + r);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      gamma[j] = fmaf(factor, columns[j], gamma[j]);
    }
  }
  p.beta.load_row(o, i, beta);
  const int64_t base = int64_t{o} * p.from.filter + i;
  modulate_vector(p.weight.data + base, p.out.data + base, static_cast<uint32_t>(p.taps), p.in_channels, gamma, beta);
}

// Any memory orders, any alignment: one thread for each pair.
template <class src_t, class dst_t>
__global__ void __launch_bounds__(kThreads) modulate_lowrank_pairs_kernel(const LowrankProblem<src_t, dst_t> p) {
  using acc_t = computing_type<src_t>;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t pair = int64_t{blockIdx.x} * kThreads + threadIdx.x; pair < p.pairs; pair += step) {
    const int64_t o = pair / p.in_channels;
    const int64_t i = pair - o * p.in_channels;
    acc_t gamma = p.gamma.at(o, i);
    for (int64_t r = 0; r < p.rank; ++r) {
      gamma = fma(__ldg(p.left + o * p.rank + r), __ldg(p.right + r * p.in_channels + i), gamma);
    }
    modulate_taps(p.weight, p.out, gamma, p.beta.at(o, i), o * p.from.filter + i * p.from.pair, p.from.tap,
                  o * p.to.filter + i * p.to.pair, p.to.tap, p.taps);
  }
}

template <class src_t, class dst_t>
int launch_modulate_lowrank(const ModulateLowrankArgs& args, cudaStream_t stream) {
  using acc_t = computing_type<src_t>;
  const Shape& shape = args.shape;
  const LowrankProblem<src_t, dst_t> problem{{args.weight, args.weight_type},
                                             {args.out, args.out_type},
                                             view_of<acc_t>(args.gamma, shape),
                                             view_of<acc_t>(args.beta, shape),
                                             static_cast<const acc_t*>(args.left),
                                             static_cast<const acc_t*>(args.right),
                                             args.rank,
                                             shape.pairs(),
                                             shape.in_channels,
                                             shape.taps,
                                             strides_of(effective_layout(args.weight_layout, shape), shape),
                                             strides_of(effective_layout(args.out_layout, shape), shape)};
  if constexpr (is_typed<src_t>) {
    return launch(modulate_lowrank_rows_kernel<src_t, dst_t>, blocks_for(threads_of(Path::kRows, shape)), stream,
                  problem);
  } else {
    return launch(modulate_lowrank_pairs_kernel<src_t, dst_t>, blocks_for(shape.pairs()), stream, problem);
  }
}

}  // namespace cuda

int modulate_lowrank_cuda(const ModulateLowrankArgs& args, void* stream) {
  const Shape& shape = args.shape;
  if (shape.pairs() == 0 || shape.taps == 0) {
    return kOk;
  }
  const bool rows = cuda::path_of(shape, args.weight_layout, args.out_layout, {args.weight, args.out, args.right}) ==
                    cuda::Path::kRows;
  return cuda::with_pair(args.weight_type, args.out_type, rows, [&](auto src, auto dst) {
    return cuda::launch_modulate_lowrank<decltype(src), decltype(dst)>(args, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace adafm
