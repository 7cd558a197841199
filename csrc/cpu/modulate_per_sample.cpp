// N modulations of one weight on the CPU: a block of it passes through modulate and modulate_backward once for each
// sample, from the cache after the first. dW adds the samples up in a tile of the computing type.
#include "adafm/modulate_per_sample.h"

#include "adafm/modulate.h"
#include "adafm/modulate_backward.h"
#include "blocks.h"
#include "tile.h"

namespace adafm {
namespace cpu {

Parameter of_sample(const SampleParameter& parameter, DType type, int64_t n) {
  return {element_at(parameter.data, type, n * parameter.stride_n), parameter.stride_o, parameter.stride_i};
}

template <class acc_t>
ADAFM_CLONES void add_scaled(const acc_t* __restrict__ gamma, const acc_t* __restrict__ grad, int64_t count,
                             int64_t width, acc_t* __restrict__ sum) {
  for (int64_t t = 0; t < width; ++t) {
    for (int64_t i = 0; i < count; ++i) {
      sum[t * kLanes + i] = std::fma(gamma[i], grad[t * kLanes + i], sum[t * kLanes + i]);
    }
  }
}

// dW of pairs [begin, end).
template <class acc_t>
void sum_samples(const ModulatePerSampleBackwardArgs& args, int64_t begin, int64_t end) {
  const Shape& shape = args.shape;
  const DType type = compute_type(args.weight_type);
  const Strides from(effective_layout(args.grad_layout, shape), shape);
  const Strides to(effective_layout(args.weight_layout, shape), shape);
  acc_t scratch[kLanes], grad[kTile], sum[kTile];
  for (int64_t pair = begin; pair < end;) {
    const Segment segment = segment_at(pair, end, shape.in_channels);
    for (int64_t first = 0; first < shape.taps; first += kTileTaps) {
      const int64_t width = std::min(kTileTaps, shape.taps - first);
      std::fill_n(sum, width * kLanes, acc_t(0));
      for (int64_t n = 0; n < args.samples; ++n) {
        const void* sample = element_at(args.grad, args.grad_type, n * shape.pairs() * shape.taps);
        load_tile(sample, args.grad_type, from, segment, first, width, grad);
        add_scaled(segment_values(of_sample(args.gamma, type, n), segment, scratch), grad, segment.count, width, sum);
      }
      store_tile(sum, args.grad_weight, args.weight_type, to, segment, first, width);
    }
    pair += segment.count;
  }
}

}  // namespace cpu

int modulate_per_sample_cpu(const ModulatePerSampleArgs& args, int64_t begin, int64_t end) {
  const DType type = compute_type(args.weight_type);
  const int64_t block = block_pairs(args.shape), size = args.shape.pairs() * args.shape.taps;
  for (int64_t first = begin; first < end; first += block) {
    for (int64_t n = 0; n < args.samples; ++n) {
      const int error = modulate_cpu({args.shape, args.weight, args.weight_type, args.weight_layout,
                                      cpu::of_sample(args.gamma, type, n), cpu::of_sample(args.beta, type, n),
                                      element_at(args.out, args.out_type, n * size), args.out_type, args.out_layout},
                                     first, std::min(first + block, end));
      if (error != kOk) {
        return error;
      }
    }
  }
  return kOk;
}

int modulate_per_sample_backward_cpu(const ModulatePerSampleBackwardArgs& args, int64_t begin, int64_t end) {
  const DType type = compute_type(args.weight_type);
  const int64_t block = block_pairs(args.shape), size = args.shape.pairs() * args.shape.taps;
  const bool reduce = args.grad_gamma != nullptr || args.grad_beta != nullptr;
  for (int64_t first = begin; first < end; first += block) {
    const int64_t last = std::min(first + block, end);
    for (int64_t n = 0; reduce && n < args.samples; ++n) {
      const int error = modulate_backward_cpu(
          {args.shape, element_at(args.grad, args.grad_type, n * size), args.grad_type, args.grad_layout, args.weight,
           args.weight_type, args.weight_layout, cpu::of_sample(args.gamma, type, n), nullptr,
           element_at(args.grad_gamma, type, n * args.shape.pairs()),
           element_at(args.grad_beta, type, n * args.shape.pairs())},
          first, last);
      if (error != kOk) {
        return error;
      }
    }
    if (args.grad_weight != nullptr) {
      if (type == DType::kFloat64) {
        cpu::sum_samples<double>(args, first, last);
      } else {
        cpu::sum_samples<float>(args, first, last);
      }
    }
  }
  return kOk;
}

}  // namespace adafm
