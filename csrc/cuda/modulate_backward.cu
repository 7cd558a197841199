// dW = gamma * G, dgamma = sum_k G * W, dbeta = sum_k G on CUDA.
//
// Instances: rows, flat (for 3x3 and 4x4 filters) and pairs kernels for the 9 pairs of {float32, float16, bfloat16};
// the pairs kernel serves differing layouts and unaligned memory, and has two more instances for all pairs of types
// with float64.
#include "adafm/modulate_backward.h"
#include "modulate_backward.cuh"

namespace adafm {
namespace cuda {

template <class grad_t, class weight_t>
__global__ void __launch_bounds__(kThreads) modulate_backward_pairs_kernel(const BackwardProblem<grad_t, weight_t> p) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t pair = int64_t{blockIdx.x} * kThreads + threadIdx.x; pair < p.pairs; pair += step) {
    modulate_backward_pair(p, pair);
  }
}

template <class grad_t, class weight_t>
__global__ void __launch_bounds__(kThreads, 6)
    modulate_backward_rows_kernel(const BackwardProblem<grad_t, weight_t> p) {
  modulate_backward_rows(p, blockIdx.x * kThreads + threadIdx.x);
}

template <class grad_t, class weight_t, int kTaps>
__global__ void __launch_bounds__(kThreads, 10)
    modulate_backward_flat_kernel(const BackwardProblem<grad_t, weight_t> p) {
  modulate_backward_flat<kTaps>(p, blockIdx.x);
}

template <class grad_t, class weight_t>
int launch_modulate_backward(const ModulateBackwardArgs& args, cudaStream_t stream) {
  using acc_t = computing_type<weight_t>;
  const Shape& shape = args.shape;
  const BackwardProblem<grad_t, weight_t> problem{{args.grad, args.grad_type},
                                                  {args.weight, args.weight_type},
                                                  view_of<acc_t>(args.gamma, shape),
                                                  {args.grad_weight, args.weight_type},
                                                  static_cast<acc_t*>(args.grad_gamma),
                                                  static_cast<acc_t*>(args.grad_beta),
                                                  shape.pairs(),
                                                  shape.in_channels,
                                                  shape.taps,
                                                  strides_of(effective_layout(args.grad_layout, shape), shape),
                                                  strides_of(effective_layout(args.weight_layout, shape), shape)};
  if constexpr (is_typed<weight_t>) {
    const Path path = path_of(args);
    const unsigned blocks = blocks_for(backward_threads(path, shape));
    if (path == Path::kRows) {
      return launch(modulate_backward_rows_kernel<grad_t, weight_t>, blocks, stream, problem);
    }
    if (path == Path::kFlat && shape.taps == 9) {
      return launch(modulate_backward_flat_kernel<grad_t, weight_t, 9>, blocks, stream, problem);
    }
    if (path == Path::kFlat) {
      return launch(modulate_backward_flat_kernel<grad_t, weight_t, 16>, blocks, stream, problem);
    }
  }
  return launch(modulate_backward_pairs_kernel<grad_t, weight_t>, blocks_for(problem.pairs), stream, problem);
}

}  // namespace cuda

int modulate_backward_cuda(const ModulateBackwardArgs& args, void* stream) {
  if (args.shape.pairs() == 0) {
    return kOk;
  }
  return cuda::with_types(args.weight_type, args.grad_type, [&](auto weight, auto grad) {
    return cuda::launch_modulate_backward<decltype(grad), decltype(weight)>(args, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace adafm
