// One training step of a whole network's gamma and beta on the CPU: reduce, Adam, average, next modulate, for so few
// pairs at a time that the weight is still in the cache when it is read again.
#include "adafm/step_many.h"

#include "adafm/modulate.h"
#include "adafm/modulate_backward.h"
#include "adam.h"
#include "blocks.h"

namespace adafm {
namespace cpu {

template <class acc_t>
ADAFM_CLONES void follow(acc_t decay, const acc_t* __restrict__ p, int64_t count, acc_t* __restrict__ average) {
  const acc_t rest = 1 - decay;
  for (int64_t q = 0; q < count; ++q) {
    average[q] = std::fma(rest, p[q] - average[q], average[q]);
  }
}

// Pairs [first, last) of a layer, at most kSpan.
template <class acc_t>
int step_pairs(const StepManyArgs& args, const ArenaLayer& layer, int64_t first, int64_t last) {
  const Shape shape = shape_of(layer);
  const Strides strides(Layout::kChannelsLast, shape);
  const acc_t* numbers = static_cast<const acc_t*>(args.hyper);
  const AdamNumbers<acc_t> hyper{numbers[0],     numbers[1], 1 - numbers[1], numbers[2],
                                 1 - numbers[2], numbers[3], numbers[4],     numbers[5]};
  const void* weight = element_at(args.weight, args.weight_type, layer.weight);
  acc_t sums[2][kSpan];
  const bool fixed[2] = {(layer.flags & kFixedGamma) != 0, (layer.flags & kFixedBeta) != 0};
  if (!fixed[0] || !fixed[1]) {
    const int error = modulate_backward_cpu({shape,
                                             element_at(args.grad, args.grad_type, layer.weight),
                                             args.grad_type,
                                             Layout::kChannelsLast,
                                             weight,
                                             args.weight_type,
                                             Layout::kChannelsLast,
                                             {nullptr, 0, 0},
                                             nullptr,
                                             fixed[0] ? nullptr : before(sums[0], first),
                                             fixed[1] ? nullptr : before(sums[1], first)},
                                            first, last);
    if (error != kOk) {
      return error;
    }
  }
  acc_t* rows[2];
  for (int part = 0; part < 2; ++part) {
    const int64_t at = part * args.stride + layer.pair;
    rows[part] = static_cast<acc_t*>(args.parameters) + at;
    if (!fixed[part]) {
      adam(hyper, sums[part], last - first, rows[part] + first, static_cast<acc_t*>(args.exp_avg) + at + first,
           static_cast<acc_t*>(args.exp_avg_sq) + at + first);
    }
    if (args.average != nullptr) {
      follow(numbers[6], rows[part] + first, last - first, static_cast<acc_t*>(args.average) + at + first);
    }
  }
  if (args.out == nullptr) {
    return kOk;
  }
  return modulate_cpu({shape,
                       weight,
                       args.weight_type,
                       Layout::kChannelsLast,
                       {rows[0], shape.in_channels, 1},
                       {rows[1], shape.in_channels, 1},
                       element_at(args.out, args.out_type, layer.weight),
                       args.out_type,
                       Layout::kChannelsLast},
                      first, last);
}

}  // namespace cpu

int step_many_cpu(const StepManyArgs& args, int64_t begin, int64_t end) {
  const auto step = args.weight_type == DType::kFloat64 ? &cpu::step_pairs<double> : &cpu::step_pairs<float>;
  return each_layer(args.layers, args.layer_count, begin, end, &shape_of,
                    [&](const ArenaLayer& layer, int64_t first, int64_t last) {
                      const int64_t block = block_pairs(shape_of(layer));
                      for (int64_t pair = first; pair < last; pair += block) {
                        const int error = step(args, layer, pair, std::min(pair + block, last));
                        if (error != kOk) {
                          return error;
                        }
                      }
                      return int(kOk);
                    });
}

}  // namespace adafm
