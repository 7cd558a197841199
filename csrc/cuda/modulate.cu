// W' = gamma * W + beta on CUDA.
//
// Instances: rows, flat and pairs kernels for the 9 pairs of {float32, float16, bfloat16}, since networks mix them
// freely (flat twice: for 3x3 filters and for any number of taps from 8). The pairs kernel serves a change of layout,
// few taps and unaligned memory; all pairs of types with float64 share two more instances of it.
#include "adafm/modulate.h"
#include "modulate.cuh"

namespace adafm {
namespace cuda {

template <class src_t, class dst_t>
__global__ void __launch_bounds__(kThreads) modulate_pairs_kernel(const Problem<src_t, dst_t> p) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t pair = int64_t{blockIdx.x} * kThreads + threadIdx.x; pair < p.pairs; pair += step) {
    modulate_pair(p, pair);
  }
}

template <class src_t, class dst_t>
__global__ void __launch_bounds__(kThreads, 6) modulate_rows_kernel(const Problem<src_t, dst_t> p) {
  modulate_rows(p, blockIdx.x * kThreads + threadIdx.x);
}

template <class src_t, class dst_t, int kTaps>
__global__ void __launch_bounds__(kThreads) modulate_flat_kernel(const Problem<src_t, dst_t> p) {
  modulate_flat<kTaps>(p, (blockIdx.x * kThreads + threadIdx.x) * kVector);
}

template <class src_t, class dst_t>
int launch_modulate(const ModulateArgs& args, cudaStream_t stream) {
  using acc_t = computing_type<src_t>;
  const Shape& shape = args.shape;
  const Problem<src_t, dst_t> problem{{args.weight, args.weight_type},
                                      {args.out, args.out_type},
                                      view_of<acc_t>(args.gamma, shape),
                                      view_of<acc_t>(args.beta, shape),
                                      shape.pairs(),
                                      shape.in_channels,
                                      shape.taps,
                                      strides_of(effective_layout(args.weight_layout, shape), shape),
                                      strides_of(effective_layout(args.out_layout, shape), shape)};
  if constexpr (is_typed<src_t>) {
    const Path path = path_of(args.shape, args.weight_layout, args.out_layout, {args.weight, args.out});
    const unsigned blocks = blocks_for(threads_of(path, shape));
    if (path == Path::kRows) {
      return launch(modulate_rows_kernel<src_t, dst_t>, blocks, stream, problem);
    }
    if (path == Path::kFlat && shape.taps == 9) {
      return launch(modulate_flat_kernel<src_t, dst_t, 9>, blocks, stream, problem);
    }
    if (path == Path::kFlat) {
      return launch(modulate_flat_kernel<src_t, dst_t, 0>, blocks, stream, problem);
    }
  }
  return launch(modulate_pairs_kernel<src_t, dst_t>, blocks_for(problem.pairs), stream, problem);
}

}  // namespace cuda

int modulate_cuda(const ModulateArgs& args, void* stream) {
  if (args.shape.pairs() == 0 || args.shape.taps == 0) {
    return kOk;
  }
  return cuda::with_types(args.weight_type, args.out_type, [&](auto src, auto dst) {
    return cuda::launch_modulate<decltype(src), decltype(dst)>(args, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace adafm
