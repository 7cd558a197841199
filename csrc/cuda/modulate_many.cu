// W' = gamma * W + beta for all layers of a network in one launch: over arenas, a 16-byte tile for each block; over
// separate weights, a table of layers as the kernel's parameter.
//
// Instances: the five pairs of types that networks use (with_pair), and two for all others and for unaligned arenas,
// which go pair by pair: Any<float>, and Any<double> for float64 weights.
#include "adafm/modulate_many.h"
#include "modulate.cuh"
#include "table.cuh"
#include "tile.cuh"

namespace adafm {
namespace cuda {

template <class src_t, class dst_t>
struct ArenaProblem {
  using acc_t = computing_type<src_t>;
  const Tile* tiles;
  Source<src_t> weight;
  const acc_t* gamma;
  const acc_t* beta;
  Target<dst_t> out;
};

template <class src_t, class dst_t>
__global__ void __launch_bounds__(kThreads, 6) modulate_arena_kernel(const ArenaProblem<src_t, dst_t> p) {
  const Tile tile = load_tile(p.tiles);
  if constexpr (is_typed<src_t>) {
    if (!is_scalar(tile)) {
      if (threadIdx.x >= (tile.count & kCountMask)) {
        return;
      }
      const Place at = vector_place(tile, threadIdx.x);
      float gamma[kVector], beta[kVector];
      load_vector(p.gamma + at.pair, gamma);
      load_vector(p.beta + at.pair, beta);
      modulate_vector(p.weight.data + at.weight, p.out.data + at.weight, taps_of(tile), row_of(tile) * kVector, gamma,
                      beta);
      return;
    }
  }
  const PairTile pairs(tile);
  for (uint32_t v = threadIdx.x; v < pairs.count; v += kThreads) {
    const Place at = pairs.place(v);
    const int64_t base = static_cast<int64_t>(at.weight);
    modulate_taps(p.weight, p.out, __ldg(p.gamma + at.pair), __ldg(p.beta + at.pair), base, pairs.in_channels, base,
                  pairs.in_channels, pairs.taps);
  }
}

// One layer of a table; two parameters' strides, the types are the table's.
template <class acc_t>
struct Layer {
  const void* weight;
  void* out;
  const acc_t* gamma;
  const acc_t* beta;
  int64_t gamma_strides[2];
  int64_t beta_strides[2];
  LayerShape shape;
};

template <class src_t, class dst_t>
struct ManyProblem {
  using acc_t = computing_type<src_t>;
  Table<Layer<acc_t>> table;
  DType weight_type;
  DType out_type;
};

template <class src_t, class dst_t>
__global__ void __launch_bounds__(kThreads, 6)
    modulate_many_kernel(const __grid_constant__ ManyProblem<src_t, dst_t> m) {
  using acc_t = computing_type<src_t>;
  const uint32_t number = layer_of_block(m.table);
  const Layer<acc_t>& layer = m.table.layers[number];
  const LayerShape shape = layer.shape;
  const uint32_t thread = (blockIdx.x - m.table.first_block[number]) * kThreads + threadIdx.x;
  const Problem<src_t, dst_t> p{
      {layer.weight, m.weight_type},
      {layer.out, m.out_type},
      {layer.gamma, layer.gamma_strides[0], layer.gamma_strides[1], shape.has(kDenseGamma), shape.has(kVectorGamma)},
      {layer.beta, layer.beta_strides[0], layer.beta_strides[1], shape.has(kDenseBeta), shape.has(kVectorBeta)},
      shape.pairs,
      shape.in_channels,
      shape.taps,
      shape.strides(kFromChannelsLast),
      shape.strides(kToChannelsLast)};
  if constexpr (is_typed<src_t>) {
    if (shape.path() == Path::kRows) {
      modulate_rows(p, thread);
      return;
    }
    if (shape.path() == Path::kFlat) {
      modulate_flat<0>(p, thread * kVector);
      return;
    }
  }
  if (thread < shape.pairs) {
    modulate_pair(p, thread);
  }
}

template <class acc_t>
Layer<acc_t> layer_of(const ModulateArgs& args, Path path) {
  const Shape& shape = args.shape;
  const ParameterView<acc_t> gamma = view_of<acc_t>(args.gamma, shape), beta = view_of<acc_t>(args.beta, shape);
  LayerShape packed(shape, path);
  packed.set(kFromChannelsLast, effective_layout(args.weight_layout, shape) == Layout::kChannelsLast);
  packed.set(kToChannelsLast, effective_layout(args.out_layout, shape) == Layout::kChannelsLast);
  packed.set(kDenseGamma, gamma.dense), packed.set(kVectorGamma, gamma.vector);
  packed.set(kDenseBeta, beta.dense), packed.set(kVectorBeta, beta.vector);
  return {
      args.weight, args.out, gamma.data, beta.data, {gamma.stride_o, gamma.stride_i}, {beta.stride_o, beta.stride_i},
      packed};
}

template <class src_t, class dst_t>
int launch_modulate_many(const ModulateArgs* layers, int64_t count, cudaStream_t stream) {
  using acc_t = computing_type<src_t>;
  ManyProblem<src_t, dst_t> problem{{}, layers[0].weight_type, layers[0].out_type};
  static_assert(sizeof(problem) <= 4096, "a kernel's parameters");
  const auto flush = [&] { return launch_table(modulate_many_kernel<src_t, dst_t>, problem, stream); };
  for (const ModulateArgs* args = layers; args != layers + count; ++args) {
    if (args->shape.pairs() == 0 || args->shape.taps == 0) {
      continue;
    }
    if (!fits_table(args->shape)) {
      if (const int error = modulate_cuda(*args, stream); error != kOk) {
        return error;
      }
      continue;
    }
    const Path path = is_typed<src_t>
                          ? path_of(args->shape, args->weight_layout, args->out_layout, {args->weight, args->out})
                          : Path::kPairs;
    problem.table.add(layer_of<acc_t>(*args, path), threads_of(path, args->shape));
    if (problem.table.full()) {
      if (const int error = flush(); error != kOk) {
        return error;
      }
    }
  }
  return flush();
}

template <class src_t, class dst_t>
int launch_modulate_arena(const ModulateArenaArgs& args, cudaStream_t stream) {
  using acc_t = computing_type<src_t>;
  const ArenaProblem<src_t, dst_t> problem{args.tiles,
                                           {args.weight, args.weight_type},
                                           static_cast<const acc_t*>(args.gamma),
                                           static_cast<const acc_t*>(args.beta),
                                           {args.out, args.out_type}};
  return launch_tiles(modulate_arena_kernel<src_t, dst_t>, args.tile_count, stream, problem);
}

}  // namespace cuda

int modulate_many_cuda(const ModulateArgs* layers, int64_t count, void* stream) {
  if (count == 0) {
    return kOk;
  }
  return cuda::with_pair(layers[0].weight_type, layers[0].out_type, true, [&](auto src, auto dst) {
    return cuda::launch_modulate_many<decltype(src), decltype(dst)>(layers, count, static_cast<cudaStream_t>(stream));
  });
}

int modulate_arena_cuda(const ModulateArenaArgs& args, void* stream) {
  if (args.tile_count == 0) {
    return kOk;
  }
  const bool vector = cuda::is_aligned(args.weight) && cuda::is_aligned(args.gamma) && cuda::is_aligned(args.beta) &&
                      cuda::is_aligned(args.out);
  return cuda::with_pair(args.weight_type, args.out_type, vector, [&](auto src, auto dst) {
    return cuda::launch_modulate_arena<decltype(src), decltype(dst)>(args, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace adafm
