// dW = gamma * G, dgamma = sum_k G * W, dbeta = sum_k G for all layers of a network in one launch: over arenas, a
// 16-byte tile for each block; over separate weights, a table of layers as the kernel's parameter.
//
// Instances: the five pairs of types that networks use (with_pair), and two for all others and for unaligned arenas,
// which go pair by pair: Any<float>, and Any<double> for float64 weights.
#include "adafm/modulate_many.h"
#include "modulate_backward.cuh"
#include "table.cuh"
#include "tile.cuh"

namespace adafm {
namespace cuda {

// Null outputs are not computed.
template <class grad_t, class weight_t>
struct BackwardArenaProblem {
  using acc_t = computing_type<weight_t>;
  const Tile* tiles;
  Source<grad_t> grad;
  Source<weight_t> weight;
  const acc_t* gamma;
  Target<weight_t> grad_weight;
  acc_t* grad_gamma;
  acc_t* grad_beta;
};

template <class grad_t, class weight_t>
__global__ void __launch_bounds__(kThreads, 6)
    modulate_backward_arena_kernel(const BackwardArenaProblem<grad_t, weight_t> p) {
  using acc_t = computing_type<weight_t>;
  const Tile tile = load_tile(p.tiles);
  if constexpr (is_typed<weight_t>) {
    if (!is_scalar(tile)) {
      if (threadIdx.x >= (tile.count & kCountMask)) {
        return;
      }
      const Place at = vector_place(tile, threadIdx.x);
      backward_vector(p.grad.data + at.weight, p.weight.data + at.weight, at_or_null(p.grad_weight.data, at.weight),
                      at_or_null(p.grad_gamma, at.pair), at_or_null(p.grad_beta, at.pair), taps_of(tile),
                      row_of(tile) * kVector, [&](float (&gamma)[kVector]) { load_vector(p.gamma + at.pair, gamma); });
      return;
    }
  }
  const PairTile pairs(tile);
  for (uint32_t v = threadIdx.x; v < pairs.count; v += kThreads) {
    const Place at = pairs.place(v);
    const int64_t base = static_cast<int64_t>(at.weight);
    const acc_t gamma = p.grad_weight.data != nullptr ? __ldg(p.gamma + at.pair) : acc_t(0);
    backward_pair(p.grad, p.weight, p.grad_weight, at_or_null(p.grad_gamma, at.pair), at_or_null(p.grad_beta, at.pair),
                  gamma, base, pairs.in_channels, base, pairs.in_channels, pairs.taps);
  }
}

// One layer of a table; the types are the table's.
template <class acc_t>
struct BackwardLayer {
  const void* grad;
  const void* weight;
  const acc_t* gamma;
  void* grad_weight;
  acc_t* grad_gamma;
  acc_t* grad_beta;
  int64_t gamma_strides[2];
  LayerShape shape;
};

template <class grad_t, class weight_t>
struct ManyBackwardProblem {
  using acc_t = computing_type<weight_t>;
  Table<BackwardLayer<acc_t>> table;
  DType grad_type;
  DType weight_type;
};

template <class grad_t, class weight_t>
__global__ void __launch_bounds__(kThreads, 6)
    modulate_many_backward_kernel(const __grid_constant__ ManyBackwardProblem<grad_t, weight_t> m) {
  using acc_t = computing_type<weight_t>;
  const uint32_t number = layer_of_block(m.table);
  const BackwardLayer<acc_t>& layer = m.table.layers[number];
  const LayerShape shape = layer.shape;
  const uint32_t block = blockIdx.x - m.table.first_block[number];
  const uint32_t thread = block * kThreads + threadIdx.x;
  const BackwardProblem<grad_t, weight_t> p{
      {layer.grad, m.grad_type},
      {layer.weight, m.weight_type},
      {layer.gamma, layer.gamma_strides[0], layer.gamma_strides[1], shape.has(kDenseGamma), shape.has(kVectorGamma)},
      {layer.grad_weight, m.weight_type},
      layer.grad_gamma,
      layer.grad_beta,
      shape.pairs,
      shape.in_channels,
      shape.taps,
      shape.strides(kFromChannelsLast),
      shape.strides(kToChannelsLast)};
  if constexpr (is_typed<weight_t>) {
    if (shape.path() == Path::kRows) {
      modulate_backward_rows(p, thread);
      return;
    }
    if (shape.path() == Path::kFlat) {
      modulate_backward_flat<9>(p, block);
      return;
    }
  }
  if (thread < shape.pairs) {
    modulate_backward_pair(p, thread);
  }
}

template <class acc_t>
BackwardLayer<acc_t> layer_of(const ModulateBackwardArgs& args, Path path) {
  const Shape& shape = args.shape;
  const ParameterView<acc_t> gamma = view_of<acc_t>(args.gamma, shape);
  LayerShape packed(shape, path);
  packed.set(kFromChannelsLast, effective_layout(args.grad_layout, shape) == Layout::kChannelsLast);
  packed.set(kToChannelsLast, effective_layout(args.weight_layout, shape) == Layout::kChannelsLast);
  packed.set(kDenseGamma, gamma.dense), packed.set(kVectorGamma, gamma.vector);
  return {args.grad,
          args.weight,
          gamma.data,
          args.grad_weight,
          static_cast<acc_t*>(args.grad_gamma),
          static_cast<acc_t*>(args.grad_beta),
          {gamma.stride_o, gamma.stride_i},
          packed};
}

// The table's kernel has the flat way for 3x3 filters only.
inline Path many_path(const ModulateBackwardArgs& args) {
  const Path path = path_of(args);
  return path == Path::kFlat && args.shape.taps != 9 ? Path::kPairs : path;
}

template <class grad_t, class weight_t>
int launch_modulate_many_backward(const ModulateBackwardArgs* layers, int64_t count, cudaStream_t stream) {
  using acc_t = computing_type<weight_t>;
  ManyBackwardProblem<grad_t, weight_t> problem{{}, layers[0].grad_type, layers[0].weight_type};
  static_assert(sizeof(problem) <= 4096, "a kernel's parameters");
  const auto flush = [&] { return launch_table(modulate_many_backward_kernel<grad_t, weight_t>, problem, stream); };
  for (const ModulateBackwardArgs* args = layers; args != layers + count; ++args) {
    if (args->shape.pairs() == 0) {
      continue;
    }
    if (!fits_table(args->shape)) {
      if (const int error = modulate_backward_cuda(*args, stream); error != kOk) {
        return error;
      }
      continue;
    }
    const Path path = is_typed<weight_t> ? many_path(*args) : Path::kPairs;
    problem.table.add(layer_of<acc_t>(*args, path), backward_threads(path, args->shape));
    if (problem.table.full()) {
      if (const int error = flush(); error != kOk) {
        return error;
      }
    }
  }
  return flush();
}

template <class grad_t, class weight_t>
int launch_modulate_backward_arena(const ModulateBackwardArenaArgs& args, cudaStream_t stream) {
  using acc_t = computing_type<weight_t>;
  const BackwardArenaProblem<grad_t, weight_t> problem{args.tiles,
                                                       {args.grad, args.grad_type},
                                                       {args.weight, args.weight_type},
                                                       static_cast<const acc_t*>(args.gamma),
                                                       {args.grad_weight, args.weight_type},
                                                       static_cast<acc_t*>(args.grad_gamma),
                                                       static_cast<acc_t*>(args.grad_beta)};
  return launch_tiles(modulate_backward_arena_kernel<grad_t, weight_t>, args.tile_count, stream, problem);
}

}  // namespace cuda

int modulate_many_backward_cuda(const ModulateBackwardArgs* layers, int64_t count, void* stream) {
  if (count == 0) {
    return kOk;
  }
  return cuda::with_pair(layers[0].weight_type, layers[0].grad_type, true, [&](auto weight, auto grad) {
    return cuda::launch_modulate_many_backward<decltype(grad), decltype(weight)>(layers, count,
                                                                                 static_cast<cudaStream_t>(stream));
  });
}

int modulate_backward_arena_cuda(const ModulateBackwardArenaArgs& args, void* stream) {
  if (args.tile_count == 0) {
    return kOk;
  }
  const bool vector = cuda::is_aligned(args.grad) && cuda::is_aligned(args.weight) && cuda::is_aligned(args.gamma) &&
                      cuda::is_aligned(args.grad_weight) && cuda::is_aligned(args.grad_gamma) &&
                      cuda::is_aligned(args.grad_beta);
  return cuda::with_pair(args.weight_type, args.grad_type, vector, [&](auto weight, auto grad) {
    return cuda::launch_modulate_backward_arena<decltype(grad), decltype(weight)>(args,
                                                                                  static_cast<cudaStream_t>(stream));
  });
}

}  // namespace adafm
