// W'[n] = gamma[n] * W + beta[n] on CUDA; a thread keeps its weights in registers for all samples that it computes.
//
// Instances: rows and flat kernels for the five pairs of types that networks use (with_pair); the pairs kernel for all
// others, for a change of layout, for few taps in [O, I, taps] and for unaligned memory: Any<float>, and Any<double>
// for float64 weights.
#include "access.cuh"
#include "adafm/modulate_per_sample.h"
#include "samples.cuh"

namespace adafm {
namespace cuda {

template <class src_t, class dst_t>
struct SampleProblem {
  using acc_t = computing_type<src_t>;
  Source<src_t> weight;
  Target<dst_t> out;
  SampleView<acc_t> gamma;
  SampleView<acc_t> beta;
  int64_t samples;
  int64_t pairs;
  int64_t in_channels;
  int64_t taps;
  Strides from;
  Strides to;
  unsigned weight_blocks;  // block b computes part b % weight_blocks of the weight, for every groups-th sample
  unsigned groups;

  __device__ __forceinline__ int64_t out_of_sample(int64_t n) const { return n * pairs * taps; }
};

// [O, taps, I] -> [O, taps, I], I a multiple of 8: one thread for eight neighbouring pairs, nine taps at a time.
template <class src_t, class dst_t>
__global__ void __launch_bounds__(kThreads, 4) modulate_per_sample_rows_kernel(const SampleProblem<src_t, dst_t> p) {
  constexpr int kBatch = 9;
  const uint32_t group = blockIdx.x / p.weight_blocks;
  const uint32_t vector = (blockIdx.x - group * p.weight_blocks) * kThreads + threadIdx.x;
  const uint32_t row = static_cast<uint32_t>(p.in_channels / kVector);
  if (vector >= static_cast<uint32_t>(p.pairs / kVector)) {
    return;
  }
  const uint32_t o = vector / row;
  const uint32_t i = (vector - o * row) * kVector;
  const uint32_t taps = static_cast<uint32_t>(p.taps);
  const int64_t step = p.in_channels;
  int64_t offset = int64_t{o} * p.from.filter + i;
  for (uint32_t t = 0; t < taps; t += kBatch, offset += kBatch * step) {
    float values[kBatch][kVector];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (t + b < taps) {
        load_vector(p.weight.data + offset + b * step, values[b]);
      }
    }
    for (int64_t n = group; n < p.samples; n += p.groups) {
      float gamma[kVector], beta[kVector];
      p.gamma.load_row(n, o, i, gamma);
      p.beta.load_row(n, o, i, beta);
      dst_t* y = p.out.data + p.out_of_sample(n) + offset;
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (t + b < taps) {
          float results[kVector];
#pragma unroll
          for (int j = 0; j < kVector; ++j) {
            results[j] = fmaf(gamma[j], values[b][j], beta[j]);
          }
          store_vector(y + b * step, results);
        }
      }
    }
  }
}

// [O, I, taps] -> [O, I, taps], taps >= 8, a multiple of 8 elements in all: one thread for eight neighbouring
// elements, which belong to at most two pairs.
template <class src_t, class dst_t>
__global__ void __launch_bounds__(kThreads, 6) modulate_per_sample_flat_kernel(const SampleProblem<src_t, dst_t> p) {
  const uint32_t group = blockIdx.x / p.weight_blocks;
  const uint32_t taps = static_cast<uint32_t>(p.taps);
  const uint32_t pairs = static_cast<uint32_t>(p.pairs);
  const uint32_t in_channels = static_cast<uint32_t>(p.in_channels);
  const uint32_t first = ((blockIdx.x - group * p.weight_blocks) * kThreads + threadIdx.x) * kVector;
  if (first >= pairs * taps) {
    return;
  }
  const uint32_t pair = first / taps;
  const uint32_t left = taps - (first - pair * taps);  // elements that belong to `pair`
  const uint32_t next_pair = pair + 1 < pairs ? pair + 1 : pair;
  const uint32_t o = pair / in_channels, i = pair - o * in_channels;
  const uint32_t next_o = next_pair / in_channels, next_i = next_pair - next_o * in_channels;
  float values[kVector];
  load_vector(p.weight.data + first, values);
#pragma unroll 2
  for (int64_t n = group; n < p.samples; n += p.groups) {
    const float gamma = p.gamma.at(n, o, i), next_gamma = p.gamma.at(n, next_o, next_i);
    const float beta = p.beta.at(n, o, i), next_beta = p.beta.at(n, next_o, next_i);
    float results[kVector];
#pragma unroll
    for (uint32_t j = 0; j < kVector; ++j) {
      results[j] = fmaf(j < left ? gamma : next_gamma, values[j], j < left ? beta : next_beta);
    }
    store_vector(p.out.data + p.out_of_sample(n) + first, results);
  }
}

// Any memory orders, any alignment: one thread for each pair.
template <class src_t, class dst_t>
__global__ void __launch_bounds__(kThreads) modulate_per_sample_pairs_kernel(const SampleProblem<src_t, dst_t> p) {
  using acc_t = computing_type<src_t>;
  const uint32_t group = blockIdx.x / p.weight_blocks;
  const int64_t step = int64_t{p.weight_blocks} * kThreads;
  const int64_t first = int64_t{blockIdx.x - group * p.weight_blocks} * kThreads + threadIdx.x;
  for (int64_t pair = first; pair < p.pairs; pair += step) {
    const int64_t o = pair / p.in_channels;
    const int64_t i = pair - o * p.in_channels;
    const int64_t from = o * p.from.filter + i * p.from.pair;
    const int64_t to = o * p.to.filter + i * p.to.pair;
    for (int64_t t = 0; t < p.taps; ++t) {
      const acc_t weight = p.weight.template at<acc_t>(from + t * p.from.tap);
      for (int64_t n = group; n < p.samples; n += p.groups) {
        p.out.put(p.out_of_sample(n) + to + t * p.to.tap, fma(p.gamma.at(n, o, i), weight, p.beta.at(n, o, i)));
      }
    }
  }
}

template <class src_t, class dst_t>
int launch_modulate_per_sample(const ModulatePerSampleArgs& args, Path path, cudaStream_t stream) {
  using acc_t = computing_type<src_t>;
  const Shape& shape = args.shape;
  const SampleBlocks blocks(threads_of(is_typed<src_t> ? path : Path::kPairs, shape), args.samples);
  const SampleProblem<src_t, dst_t> problem{{args.weight, args.weight_type},
                                            {args.out, args.out_type},
                                            view_of<acc_t>(args.gamma),
                                            view_of<acc_t>(args.beta),
                                            args.samples,
                                            shape.pairs(),
                                            shape.in_channels,
                                            shape.taps,
                                            strides_of(effective_layout(args.weight_layout, shape), shape),
                                            strides_of(effective_layout(args.out_layout, shape), shape),
                                            blocks.weight,
                                            blocks.groups};
  const unsigned all = blocks.weight * blocks.groups;
  if constexpr (is_typed<src_t>) {
    return path == Path::kRows ? launch(modulate_per_sample_rows_kernel<src_t, dst_t>, all, stream, problem)
                               : launch(modulate_per_sample_flat_kernel<src_t, dst_t>, all, stream, problem);
  } else {
    return launch(modulate_per_sample_pairs_kernel<src_t, dst_t>, all, stream, problem);
  }
}

}  // namespace cuda

int modulate_per_sample_cuda(const ModulatePerSampleArgs& args, void* stream) {
  const Shape& shape = args.shape;
  if (args.samples == 0 || shape.pairs() == 0 || shape.taps == 0) {
    return kOk;
  }
  cuda::Path path = cuda::path_of(shape, args.weight_layout, args.out_layout, {args.weight, args.out});
  if (path == cuda::Path::kFlat && shape.pairs() * shape.taps % cuda::kVector != 0) {
    path = cuda::Path::kPairs;  // samples begin at any element
  }
  return cuda::with_pair(args.weight_type, args.out_type, path != cuda::Path::kPairs, [&](auto src, auto dst) {
    return cuda::launch_modulate_per_sample<decltype(src), decltype(dst)>(args, path,
                                                                          static_cast<cudaStream_t>(stream));
  });
}

}  // namespace adafm
