// One training step of a whole network's gamma and beta on CUDA: reduce, Adam, average, next modulate; formulas in
// step_many.h. A thread's weights are read a second time for the new W', from L1 or L2.
//
// Instances, for (gradient, weight, W'): W' of the gradient's type, for the five pairs of types that networks use
// (with_pair); all other combinations and unaligned arenas share Any<float>, and Any<double> for float64 weights, pair
// by pair.
#include "adafm/step_many.h"
#include "adam.cuh"
#include "modulate.cuh"
#include "modulate_backward.cuh"
#include "tile.cuh"

namespace adafm {
namespace cuda {

// Null `average` and `out` are left out. Parameters and moments are read and written: never through __ldg.
template <class grad_t, class weight_t>
struct StepProblem {
  using acc_t = computing_type<weight_t>;
  const Tile* tiles;
  Source<grad_t> grad;
  Source<weight_t> weight;
  const acc_t* hyper;
  acc_t* parameters;
  acc_t* exp_avg;
  acc_t* exp_avg_sq;
  acc_t* average;
  int64_t stride;
  Target<grad_t> out;
};

// step_many.h says what the numbers are.
template <class acc_t>
struct Hyper {
  AdamNumbers<acc_t> adam;
  acc_t decay;

  __device__ __forceinline__ explicit Hyper(const acc_t* h)
      : adam{__ldg(h),     __ldg(h + 1), acc_t(1) - __ldg(h + 1), __ldg(h + 2), acc_t(1) - __ldg(h + 2), __ldg(h + 3),
             __ldg(h + 4), __ldg(h + 5)},
        decay(__ldg(h + 6)) {}
};

// Neighbouring values of gamma or beta from element `at` on: `gradient` goes in, the new values come out in its place.
template <class grad_t, class weight_t, class acc_t, int width>
__device__ __forceinline__ void update(const StepProblem<grad_t, weight_t>& p, const Hyper<acc_t>& h, int64_t at,
                                       bool fixed, acc_t (&gradient)[width]) {
  acc_t values[width];
  read_vector(p.parameters + at, values);
  if (!fixed) {
    acc_t m[width], v[width];
    read_vector(p.exp_avg + at, m);
    read_vector(p.exp_avg_sq + at, v);
#pragma unroll
    for (int j = 0; j < width; ++j) {
      adam(h.adam, gradient[j], values[j], m[j], v[j]);
    }
    write_vector(p.exp_avg + at, m);
    write_vector(p.exp_avg_sq + at, v);
    write_vector(p.parameters + at, values);
  }
  if (p.average != nullptr) {
    acc_t average[width];
    read_vector(p.average + at, average);
#pragma unroll
    for (int j = 0; j < width; ++j) {
      average[j] = fma(acc_t(1) - h.decay, values[j] - average[j], average[j]);
    }
    write_vector(p.average + at, average);
  }
#pragma unroll
  for (int j = 0; j < width; ++j) {
    gradient[j] = values[j];
  }
}

template <class grad_t, class weight_t>
__global__ void __launch_bounds__(kThreads, 4) step_many_kernel(const StepProblem<grad_t, weight_t> p) {
  using acc_t = computing_type<weight_t>;
  const Tile tile = load_tile(p.tiles);
  const bool fixed_gamma = (tile.count & kTileFixedGamma) != 0, fixed_beta = (tile.count & kTileFixedBeta) != 0;
  if constexpr (is_typed<weight_t>) {
    if (!is_scalar(tile)) {
      if (threadIdx.x >= (tile.count & kCountMask)) {
        return;
      }
      const Place at = vector_place(tile, threadIdx.x);
      const uint32_t taps = taps_of(tile), step = row_of(tile) * kVector;
      const weight_t* weight = p.weight.data + at.weight;
      float gamma[kVector] = {}, beta[kVector] = {};
      if (!fixed_gamma || !fixed_beta) {
        sum_vector(p.grad.data + at.weight, weight, taps, step, gamma, beta);
      }
      const Hyper<float> hyper(p.hyper);
      update(p, hyper, at.pair, fixed_gamma, gamma);
      update(p, hyper, p.stride + at.pair, fixed_beta, beta);
      if (p.out.data != nullptr) {
        modulate_vector(weight, p.out.data + at.weight, taps, step, gamma, beta);
      }
      return;
    }
  }
  const PairTile pairs(tile);
  const Hyper<acc_t> hyper(p.hyper);
  for (uint32_t v = threadIdx.x; v < pairs.count; v += kThreads) {
    const Place at = pairs.place(v);
    const int64_t base = static_cast<int64_t>(at.weight);
    acc_t gamma[1] = {}, beta[1] = {};
    const Target<weight_t> nothing{nullptr, DType::kFloat32};
    backward_pair(p.grad, p.weight, nothing, gamma, beta, acc_t(0), base, pairs.in_channels, base, pairs.in_channels,
                  pairs.taps);
    update(p, hyper, at.pair, fixed_gamma, gamma);
    update(p, hyper, p.stride + at.pair, fixed_beta, beta);
    if (p.out.data != nullptr) {
      modulate_taps(p.weight, p.out, gamma[0], beta[0], base, pairs.in_channels, base, pairs.in_channels, pairs.taps);
    }
  }
}

template <class grad_t, class weight_t>
int launch_step_many(const StepManyArgs& args, cudaStream_t stream) {
  using acc_t = computing_type<weight_t>;
  const StepProblem<grad_t, weight_t> problem{args.tiles,
                                              {args.grad, args.grad_type},
                                              {args.weight, args.weight_type},
                                              static_cast<const acc_t*>(args.hyper),
                                              static_cast<acc_t*>(args.parameters),
                                              static_cast<acc_t*>(args.exp_avg),
                                              static_cast<acc_t*>(args.exp_avg_sq),
                                              static_cast<acc_t*>(args.average),
                                              args.stride,
                                              {args.out, args.out_type}};
  return launch_tiles(step_many_kernel<grad_t, weight_t>, args.tile_count, stream, problem);
}

}  // namespace cuda

int step_many_cuda(const StepManyArgs& args, void* stream) {
  if (args.tile_count == 0) {
    return kOk;
  }
  if (args.out != nullptr && !cuda::known(args.out_type)) {
    return kUnsupportedDType;
  }
  const bool vector =
      cuda::is_aligned(args.grad) && cuda::is_aligned(args.weight) && cuda::is_aligned(args.parameters) &&
      cuda::is_aligned(args.exp_avg) && cuda::is_aligned(args.exp_avg_sq) && cuda::is_aligned(args.average) &&
      cuda::is_aligned(args.out) && args.stride % 4 == 0 && (args.out == nullptr || args.out_type == args.grad_type);
  return cuda::with_pair(args.weight_type, args.grad_type, vector, [&](auto weight, auto grad) {
    return cuda::launch_step_many<decltype(grad), decltype(weight)>(args, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace adafm
