// modulate and modulate_backward for all layers of a network: one numbering of the work over all layers, so that
// threads get equal parts however large the layers are, each part handed to the kernels of one layer.
#include "adafm/modulate_many.h"

#include "blocks.h"

namespace adafm {

int modulate_many_cpu(const ModulateArgs* layers, int64_t count, int64_t begin, int64_t end) {
  return each_layer(layers, count, begin, end, [](const ModulateArgs& layer) { return layer.shape; }, &modulate_cpu);
}

int modulate_many_backward_cpu(const ModulateBackwardArgs* layers, int64_t count, int64_t begin, int64_t end) {
  return each_layer(
      layers, count, begin, end, [](const ModulateBackwardArgs& layer) { return layer.shape; }, &modulate_backward_cpu);
}

int modulate_arena_cpu(const ModulateArenaArgs& args, int64_t begin, int64_t end) {
  const DType type = compute_type(args.weight_type);
  return each_layer(args.layers, args.layer_count, begin, end, &shape_of,
                    [&](const ArenaLayer& layer, int64_t first, int64_t last) {
                      return modulate_cpu({shape_of(layer),
                                           element_at(args.weight, args.weight_type, layer.weight),
                                           args.weight_type,
                                           Layout::kChannelsLast,
                                           {element_at(args.gamma, type, layer.pair), layer.in_channels, 1},
                                           {element_at(args.beta, type, layer.pair), layer.in_channels, 1},
                                           element_at(args.out, args.out_type, layer.weight),
                                           args.out_type,
                                           Layout::kChannelsLast},
                                          first, last);
                    });
}

int modulate_backward_arena_cpu(const ModulateBackwardArenaArgs& args, int64_t begin, int64_t end) {
  const DType type = compute_type(args.weight_type);
  return each_layer(args.layers, args.layer_count, begin, end, &shape_of,
                    [&](const ArenaLayer& layer, int64_t first, int64_t last) {
                      return modulate_backward_cpu({shape_of(layer),
                                                    element_at(args.grad, args.grad_type, layer.weight),
                                                    args.grad_type,
                                                    Layout::kChannelsLast,
                                                    element_at(args.weight, args.weight_type, layer.weight),
                                                    args.weight_type,
                                                    Layout::kChannelsLast,
                                                    {element_at(args.gamma, type, layer.pair), layer.in_channels, 1},
                                                    element_at(args.grad_weight, args.weight_type, layer.weight),
                                                    element_at(args.grad_gamma, type, layer.pair),
                                                    element_at(args.grad_beta, type, layer.pair)},
                                                   first, last);
                    });
}

}  // namespace adafm
