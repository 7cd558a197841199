// dW = gamma * G, dgamma = sum_k G * W, dbeta = sum_k G on CUDA. Every pair is summed by one thread, tap after tap:
// no atomics, one order, the same bits each time and the same as on the CPU.
//
// Instances: rows and flat kernels (flat for 3x3 and 4x4 filters) for the 9 pairs of {float32, float16, bfloat16};
// the strided kernel for all 16 pairs, as the only one for float64, for differing layouts and for unaligned memory.
#include "adafm/modulate_backward.h"
#include "parameter.cuh"

namespace adafm {
namespace cuda {

// Null outputs are not computed.
template <class grad_t, class weight_t>
struct BackwardProblem {
  using acc_t = acc_type<weight_t>;
  const grad_t* __restrict__ grad;
  const weight_t* __restrict__ weight;
  ParameterView<acc_t> gamma;
  weight_t* __restrict__ grad_weight;
  acc_t* __restrict__ grad_gamma;
  acc_t* __restrict__ grad_beta;
  int64_t pairs;
  int64_t in_channels;
  int64_t taps;
  Strides from;
  Strides to;
};

// Any memory orders, any alignment: one thread for each pair.
template <class grad_t, class weight_t>
__global__ void __launch_bounds__(kThreads)
    modulate_backward_strided_kernel(const BackwardProblem<grad_t, weight_t> p) {
  using acc_t = acc_type<weight_t>;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t pair = int64_t{blockIdx.x} * kThreads + threadIdx.x; pair < p.pairs; pair += step) {
    const int64_t o = pair / p.in_channels;
    const int64_t i = pair - o * p.in_channels;
    const acc_t gamma = p.grad_weight != nullptr ? p.gamma.at(o, i) : acc_t(0);
    const grad_t* g = p.grad + o * p.from.filter + i * p.from.pair;
    const int64_t base = o * p.to.filter + i * p.to.pair;
    acc_t sum_gamma = 0, sum_beta = 0;
    for (int64_t t = 0; t < p.taps; ++t) {
      const acc_t grad = load<acc_t>(__ldg(g + t * p.from.tap));
      if (p.grad_gamma != nullptr) {
        sum_gamma = fma(grad, load<acc_t>(__ldg(p.weight + base + t * p.to.tap)), sum_gamma);
      }
      sum_beta += grad;
      if (p.grad_weight != nullptr) {
        p.grad_weight[base + t * p.to.tap] = store<weight_t>(gamma * grad);
      }
    }
    if (p.grad_gamma != nullptr) {
      p.grad_gamma[pair] = sum_gamma;
    }
    if (p.grad_beta != nullptr) {
      p.grad_beta[pair] = sum_beta;
    }
  }
}

// [O, taps, I], I a multiple of 8: one thread for eight neighbouring pairs and all their taps.
template <class grad_t, class weight_t>
__global__ void __launch_bounds__(kThreads, 6)
    modulate_backward_rows_kernel(const BackwardProblem<grad_t, weight_t> p) {
  const uint32_t vectors = static_cast<uint32_t>(p.pairs / kVector);
  const uint32_t row = static_cast<uint32_t>(p.in_channels / kVector);
  const uint32_t vector = blockIdx.x * kThreads + threadIdx.x;
  if (vector >= vectors) {
    return;
  }
  const uint32_t o = vector / row;
  const uint32_t i = (vector - o * row) * kVector;
  float gamma[kVector] = {}, sum_gamma[kVector] = {}, sum_beta[kVector] = {};
  if (p.grad_weight != nullptr) {
    p.gamma.load_row(o, i, gamma);
  }
  const int64_t base = int64_t{o} * p.from.filter + i;
#pragma unroll 3
  for (int64_t t = 0; t < p.taps; ++t) {
    const int64_t offset = base + t * p.in_channels;
    float grad[kVector], weight[kVector];
    load_vector(p.grad + offset, grad);
    if (p.grad_gamma != nullptr) {
      load_vector(p.weight + offset, weight);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        sum_gamma[j] = fmaf(grad[j], weight[j], sum_gamma[j]);
      }
    }
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      sum_beta[j] += grad[j];
    }
    if (p.grad_weight != nullptr) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        grad[j] *= gamma[j];
      }
      store_vector(p.grad_weight + offset, grad);
    }
  }
  if (p.grad_gamma != nullptr) {
    store_vector(p.grad_gamma + int64_t{vector} * kVector, sum_gamma);
  }
  if (p.grad_beta != nullptr) {
    store_vector(p.grad_beta + int64_t{vector} * kVector, sum_beta);
  }
}

// [O, I, kTaps]: one block for kThreads pairs. Their elements are read side by side, eight at a time, and put into
// shared memory, from which one thread sums one pair. Rows of shared memory have odd length, so that the threads of a
// warp read from different banks.
template <class grad_t, class weight_t, int kTaps>
__global__ void __launch_bounds__(kThreads, 10)
    modulate_backward_flat_kernel(const BackwardProblem<grad_t, weight_t> p) {
  constexpr uint32_t kRow = kTaps | 1;
  constexpr uint32_t kElements = kThreads * kTaps;
  __shared__ float grads[kThreads * kRow], weights[kThreads * kRow];
  const uint32_t in_channels = static_cast<uint32_t>(p.in_channels);
  const uint32_t first_pair = blockIdx.x * kThreads;
  const uint32_t count = min(static_cast<uint32_t>(p.pairs) - first_pair, static_cast<uint32_t>(kThreads));
  const int64_t base = int64_t{first_pair} * kTaps;
  const auto slot = [](uint32_t element) { return element / kTaps * kRow + element % kTaps; };

#pragma unroll
  for (uint32_t begin = 0; begin < kElements; begin += kThreads * kVector) {
    const uint32_t first = begin + threadIdx.x * kVector;
    if (first + kVector <= count * kTaps) {
      float grad[kVector], weight[kVector];
      load_vector(p.grad + base + first, grad);
      if (p.grad_gamma != nullptr) {
        load_vector(p.weight + base + first, weight);
      }
#pragma unroll
      for (uint32_t j = 0; j < kVector; ++j) {
        grads[slot(first + j)] = grad[j];
      }
      if (p.grad_gamma != nullptr) {
#pragma unroll
        for (uint32_t j = 0; j < kVector; ++j) {
          weights[slot(first + j)] = weight[j];
        }
      }
      if (p.grad_weight != nullptr) {
        const uint32_t pair = first / kTaps;
        const uint32_t left = kTaps - first % kTaps;  // elements that belong to `pair`
        const float gamma = p.gamma.at_pair(first_pair + pair, in_channels);
        const float next = p.gamma.at_pair(first_pair + min(pair + 1, count - 1), in_channels);
#pragma unroll
        for (uint32_t j = 0; j < kVector; ++j) {
          grad[j] *= j < left ? gamma : next;
        }
        store_vector(p.grad_weight + base + first, grad);
      }
    } else {
      for (uint32_t element = first; element < count * kTaps; ++element) {
        const float grad = load<float>(__ldg(p.grad + base + element));
        grads[slot(element)] = grad;
        if (p.grad_gamma != nullptr) {
          weights[slot(element)] = load<float>(__ldg(p.weight + base + element));
        }
        if (p.grad_weight != nullptr) {
          p.grad_weight[base + element] =
              store<weight_t>(p.gamma.at_pair(first_pair + element / kTaps, in_channels) * grad);
        }
      }
    }
  }
  __syncthreads();

  if (threadIdx.x >= count || (p.grad_gamma == nullptr && p.grad_beta == nullptr)) {
    return;
  }
  float sum_gamma = 0, sum_beta = 0;
#pragma unroll
  for (uint32_t t = 0; t < kTaps; ++t) {
    const float grad = grads[threadIdx.x * kRow + t];
    sum_beta += grad;
    if (p.grad_gamma != nullptr) {
      sum_gamma = fmaf(grad, weights[threadIdx.x * kRow + t], sum_gamma);
    }
  }
  if (p.grad_gamma != nullptr) {
    p.grad_gamma[first_pair + threadIdx.x] = sum_gamma;
  }
  if (p.grad_beta != nullptr) {
    p.grad_beta[first_pair + threadIdx.x] = sum_beta;
  }
}

template <class grad_t, class weight_t>
int launch_modulate_backward(const ModulateBackwardArgs& args, cudaStream_t stream) {
  using acc_t = acc_type<weight_t>;
  const Shape& shape = args.shape;
  const Layout from = effective_layout(args.grad_layout, shape);
  const Layout to = effective_layout(args.weight_layout, shape);
  BackwardProblem<grad_t, weight_t> problem{static_cast<const grad_t*>(args.grad),
                                            static_cast<const weight_t*>(args.weight),
                                            view_of<acc_t>(args.gamma, shape),
                                            static_cast<weight_t*>(args.grad_weight),
                                            static_cast<acc_t*>(args.grad_gamma),
                                            static_cast<acc_t*>(args.grad_beta),
                                            shape.pairs(),
                                            shape.in_channels,
                                            shape.taps,
                                            strides_of(from, shape),
                                            strides_of(to, shape)};
  if constexpr (!std::is_same_v<grad_t, double> && !std::is_same_v<weight_t, double>) {
    const bool vector = from == to && is_aligned(args.grad) && is_aligned(args.weight) &&
                        is_aligned(args.grad_weight) && is_aligned(args.grad_gamma) && is_aligned(args.grad_beta) &&
                        shape.pairs() * shape.taps < kIndexLimit;
    const bool unit_rows = from == Layout::kChannelsLast || shape.taps == 1;
    if (vector && unit_rows && shape.in_channels % kVector == 0) {
      return launch(modulate_backward_rows_kernel<grad_t, weight_t>, blocks_for(problem.pairs / kVector), stream,
                    problem);
    }
    if (vector && from == Layout::kContiguous && (shape.taps == 9 || shape.taps == 16)) {
      const unsigned blocks = blocks_for(problem.pairs);
      if (shape.taps == 9) {
        return launch(modulate_backward_flat_kernel<grad_t, weight_t, 9>, blocks, stream, problem);
      }
      return launch(modulate_backward_flat_kernel<grad_t, weight_t, 16>, blocks, stream, problem);
    }
  }
  return launch(modulate_backward_strided_kernel<grad_t, weight_t>, blocks_for(problem.pairs), stream, problem);
}

}  // namespace cuda

int modulate_backward_cuda(const ModulateBackwardArgs& args, void* stream) {
  if (args.shape.pairs() == 0) {
    return kOk;
  }
  return cuda::with_type(args.grad_type, [&](auto grad) {
    return cuda::with_type(args.weight_type, [&](auto weight) {
      return cuda::launch_modulate_backward<decltype(grad), decltype(weight)>(args, static_cast<cudaStream_t>(stream));
    });
  });
}

}  // namespace adafm
