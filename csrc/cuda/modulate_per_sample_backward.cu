// dW = sum_n gamma[n] * G[n], dgamma[n] = sum_k G[n] * W, dbeta[n] = sum_k G[n] on CUDA, summed by one thread in the
// order of samples and taps.
//
// Instances: the rows kernel for the five pairs of types that networks use (with_pair); the pairs kernel for all
// others, for [O, I, taps], differing layouts and unaligned memory: Any<float>, and Any<double> for float64 weights.
#include "adafm/modulate_per_sample.h"
#include "modulate_backward.cuh"
#include "samples.cuh"

namespace adafm {
namespace cuda {

// Null outputs are not computed.
template <class grad_t, class weight_t>
struct SampleBackwardProblem {
  using acc_t = computing_type<weight_t>;
  Source<grad_t> grad;
  Source<weight_t> weight;
  SampleView<acc_t> gamma;
  Target<weight_t> grad_weight;
  acc_t* grad_gamma;
  acc_t* grad_beta;
  int64_t samples;
  int64_t pairs;
  int64_t in_channels;
  int64_t taps;
  Strides from;
  Strides to;
  unsigned weight_blocks;  // block b computes part b % weight_blocks of the weight, for every groups-th sample
  unsigned groups;         // 1 where dW is asked for

  __device__ __forceinline__ int64_t grad_of_sample(int64_t n) const { return n * pairs * taps; }
};

// Where a thread's eight neighbouring pairs lie.
struct SamplePlace {
  uint32_t o;
  uint32_t i;
  int64_t pair;
  int64_t weight;
};

// Nine taps of eight neighbouring pairs from `first` on: dW grows in registers over all samples. With kSums these are
// all taps, and dgamma and dbeta of every sample are summed on the way; the weight is then read from L1.
template <bool kSums, class grad_t, class weight_t>
__device__ __forceinline__ void batch_over_samples(const SampleBackwardProblem<grad_t, weight_t>& p,
                                                   const SamplePlace& at, uint32_t first) {
  constexpr int kBatch = 9;
  const uint32_t taps = static_cast<uint32_t>(p.taps);
  const int64_t step = p.in_channels;
  const int64_t offset = at.weight + first * step;
  float sums[kBatch][kVector] = {};
  for (int64_t n = 0; n < p.samples; ++n) {
    float gamma[kVector], sum_gamma[kVector] = {}, sum_beta[kVector] = {};
    p.gamma.load_row(n, at.o, at.i, gamma);
    const grad_t* g = p.grad.data + p.grad_of_sample(n) + offset;
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (first + b < taps) {
        float grad[kVector];
        load_vector(g + b * step, grad);
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          sums[b][j] = fmaf(gamma[j], grad[j], sums[b][j]);
        }
        if constexpr (kSums) {
          float weight[kVector];
          load_vector(p.weight.data + offset + b * step, weight);
#pragma unroll
          for (int j = 0; j < kVector; ++j) {
            sum_gamma[j] = fmaf(grad[j], weight[j], sum_gamma[j]);
            sum_beta[j] += grad[j];
          }
        }
      }
    }
    if constexpr (kSums) {
      const int64_t pair = n * p.pairs + at.pair;
      if (p.grad_gamma != nullptr) {
        store_vector(p.grad_gamma + pair, sum_gamma);
      }
      if (p.grad_beta != nullptr) {
        store_vector(p.grad_beta + pair, sum_beta);
      }
    }
  }
#pragma unroll
  for (int b = 0; b < kBatch; ++b) {
    if (first + b < taps) {
      store_vector(p.grad_weight.data + offset + b * step, sums[b]);
    }
  }
}

// [O, taps, I], I a multiple of 8: one thread for eight neighbouring pairs. A gradient is read once, but twice where dW
// and sums over more than nine taps are asked for together.
template <class grad_t, class weight_t>
__global__ void __launch_bounds__(kThreads, 3)
    modulate_per_sample_backward_rows_kernel(const SampleBackwardProblem<grad_t, weight_t> p) {
  constexpr uint32_t kBatch = 9;
  const uint32_t group = blockIdx.x / p.weight_blocks;
  const uint32_t vector = (blockIdx.x - group * p.weight_blocks) * kThreads + threadIdx.x;
  const uint32_t row = static_cast<uint32_t>(p.in_channels / kVector);
  if (vector >= static_cast<uint32_t>(p.pairs / kVector)) {
    return;
  }
  const uint32_t o = vector / row;
  const uint32_t i = (vector - o * row) * kVector;
  const SamplePlace at{o, i, int64_t{vector} * kVector, int64_t{o} * p.from.filter + i};
  const uint32_t taps = static_cast<uint32_t>(p.taps);
  if (p.grad_weight.data != nullptr && p.grad_gamma != nullptr && taps <= kBatch) {
    batch_over_samples<true>(p, at, 0);
    return;
  }
  if (p.grad_gamma != nullptr || p.grad_beta != nullptr) {
    for (int64_t n = group; n < p.samples; n += p.groups) {
      const int64_t pair = n * p.pairs + at.pair;
      backward_vector(p.grad.data + p.grad_of_sample(n) + at.weight, p.weight.data + at.weight,
                      static_cast<weight_t*>(nullptr), at_or_null(p.grad_gamma, pair), at_or_null(p.grad_beta, pair),
                      taps, p.in_channels, [](float (&)[kVector]) {});
    }
  }
  if (p.grad_weight.data != nullptr) {
    for (uint32_t t = 0; t < taps; t += kBatch) {
      batch_over_samples<false>(p, at, t);
    }
  }
}

// Any memory orders, any alignment: one thread for each pair.
template <class grad_t, class weight_t>
__global__ void __launch_bounds__(kThreads)
    modulate_per_sample_backward_pairs_kernel(const SampleBackwardProblem<grad_t, weight_t> p) {
  using acc_t = computing_type<weight_t>;
  const uint32_t group = blockIdx.x / p.weight_blocks;
  const int64_t step = int64_t{p.weight_blocks} * kThreads;
  const int64_t first = int64_t{blockIdx.x - group * p.weight_blocks} * kThreads + threadIdx.x;
  for (int64_t pair = first; pair < p.pairs; pair += step) {
    const int64_t o = pair / p.in_channels;
    const int64_t i = pair - o * p.in_channels;
    const int64_t from = o * p.from.filter + i * p.from.pair;
    const int64_t to = o * p.to.filter + i * p.to.pair;
    if (p.grad_gamma != nullptr || p.grad_beta != nullptr) {
      const Target<weight_t> nothing{nullptr, DType::kFloat32};
      for (int64_t n = group; n < p.samples; n += p.groups) {
        backward_pair(p.grad, p.weight, nothing, at_or_null(p.grad_gamma, n * p.pairs + pair),
                      at_or_null(p.grad_beta, n * p.pairs + pair), acc_t(0), p.grad_of_sample(n) + from, p.from.tap, to,
                      p.to.tap, p.taps);
      }
    }
    if (p.grad_weight.data != nullptr) {
      for (int64_t t = 0; t < p.taps; ++t) {
        acc_t sum = 0;
        for (int64_t n = 0; n < p.samples; ++n) {
          sum = fma(p.gamma.at(n, o, i), p.grad.template at<acc_t>(p.grad_of_sample(n) + from + t * p.from.tap), sum);
        }
        p.grad_weight.put(to + t * p.to.tap, sum);
      }
    }
  }
}

template <class grad_t, class weight_t>
int launch_modulate_per_sample_backward(const ModulatePerSampleBackwardArgs& args, cudaStream_t stream) {
  using acc_t = computing_type<weight_t>;
  const Shape& shape = args.shape;
  const Path path = is_typed<weight_t> ? Path::kRows : Path::kPairs;
  SampleBlocks blocks(threads_of(path, shape), args.samples);
  if (args.grad_weight != nullptr) {
    blocks.groups = 1;
  }
  const SampleBackwardProblem<grad_t, weight_t> problem{{args.grad, args.grad_type},
                                                        {args.weight, args.weight_type},
                                                        view_of<acc_t>(args.gamma),
                                                        {args.grad_weight, args.weight_type},
                                                        static_cast<acc_t*>(args.grad_gamma),
                                                        static_cast<acc_t*>(args.grad_beta),
                                                        args.samples,
                                                        shape.pairs(),
                                                        shape.in_channels,
                                                        shape.taps,
                                                        strides_of(effective_layout(args.grad_layout, shape), shape),
                                                        strides_of(effective_layout(args.weight_layout, shape), shape),
                                                        blocks.weight,
                                                        blocks.groups};
  const unsigned all = blocks.weight * blocks.groups;
  if constexpr (is_typed<weight_t>) {
    return launch(modulate_per_sample_backward_rows_kernel<grad_t, weight_t>, all, stream, problem);
  } else {
    return launch(modulate_per_sample_backward_pairs_kernel<grad_t, weight_t>, all, stream, problem);
  }
}

}  // namespace cuda

int modulate_per_sample_backward_cuda(const ModulatePerSampleBackwardArgs& args, void* stream) {
  const Shape& shape = args.shape;
  if (shape.pairs() == 0) {
    return kOk;
  }
  const cuda::Path path = cuda::path_of(shape, args.grad_layout, args.weight_layout,
                                        {args.grad, args.weight, args.grad_weight, args.grad_gamma, args.grad_beta});
  return cuda::with_pair(args.weight_type, args.grad_type, path == cuda::Path::kRows, [&](auto weight, auto grad) {
    return cuda::launch_modulate_per_sample_backward<decltype(grad), decltype(weight)>(
        args, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace adafm
