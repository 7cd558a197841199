// W' = gamma * W + beta on the CPU with gamma = gamma0 + U diag(s) V^T, formed for so few pairs at a time that it stays
// in the first cache.
#include "adafm/modulate_lowrank.h"

#include "adafm/modulate.h"
#include "blocks.h"

namespace adafm {
namespace cpu {

// Adds left[r] * right[r, i] for every r, in order, to the gamma of `count` pairs of one filter.
template <class acc_t>
ADAFM_CLONES void add_products(const acc_t* __restrict__ left, const acc_t* __restrict__ right, int64_t rank,
                               int64_t in_channels, int64_t count, acc_t* __restrict__ gamma) {
  int64_t first = 0;
  for (; first + kLanes <= count; first += kLanes) {
    acc_t sums[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      sums[i] = gamma[first + i];
    }
    for (int64_t r = 0; r < rank; ++r) {
      const acc_t factor = left[r];
      const acc_t* __restrict__ row = right + r * in_channels + first;
      for (int64_t i = 0; i < kLanes; ++i) {
        sums[i] = std::fma(factor, row[i], sums[i]);
      }
    }
    for (int64_t i = 0; i < kLanes; ++i) {
      gamma[first + i] = sums[i];
    }
  }
  for (int64_t r = 0; r < rank; ++r) {
    for (int64_t i = first; i < count; ++i) {
      gamma[i] = std::fma(left[r], right[r * in_channels + i], gamma[i]);
    }
  }
}

template <class acc_t>
int lowrank_pairs(const ModulateLowrankArgs& args, int64_t begin, int64_t end) {
  const Shape& shape = args.shape;
  const int64_t block = block_pairs(shape);
  acc_t gamma[kSpan];
  for (int64_t first = begin; first < end; first += block) {
    const int64_t last = std::min(first + block, end);
    const acc_t* values = pair_values(args.gamma, shape.in_channels, first, last - first, gamma);
    if (values != gamma) {
      std::copy_n(values, last - first, gamma);
    }
    for (int64_t pair = first; pair < last;) {
      const Segment segment = segment_at(pair, last, shape.in_channels, kSpan);
      add_products(static_cast<const acc_t*>(args.left) + segment.o * args.rank,
                   static_cast<const acc_t*>(args.right) + segment.first, args.rank, shape.in_channels, segment.count,
                   gamma + (pair - first));
      pair += segment.count;
    }
    const int error = modulate_cpu({shape,
                                    args.weight,
                                    args.weight_type,
                                    args.weight_layout,
                                    {before(gamma, first), shape.in_channels, 1},
                                    args.beta,
                                    args.out,
                                    args.out_type,
                                    args.out_layout},
                                   first, last);
    if (error != kOk) {
      return error;
    }
  }
  return kOk;
}

}  // namespace cpu

int modulate_lowrank_cpu(const ModulateLowrankArgs& args, int64_t begin, int64_t end) {
  return args.weight_type == DType::kFloat64 ? cpu::lowrank_pairs<double>(args, begin, end)
                                             : cpu::lowrank_pairs<float>(args, begin, end);
}

}  // namespace adafm
