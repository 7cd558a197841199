// W' = gamma * n + beta with n = (W - mean) / deviation on the CPU, and its gradients.
//
// Sums have one order whatever the memory orders, the vector width and the threads: a pair adds its taps in order; an
// output channel adds its pairs into kLanes sums, pair i into sum i % kLanes, and these by halves. Element types are
// dealt with where tiles are read and written (tile.h), so that each loop here has one body for float32 and one for
// float64. A weight is read once for each pass, after the first one from the cache.
#include "adafm/modulate_normalized.h"

#include "tile.h"

namespace adafm {
namespace cpu {

template <class acc_t>
using Lanes = acc_t[kLanes];

// Mean and guarded deviation of a segment's pairs.
template <class acc_t>
struct Statistics {
  Lanes<acc_t> mean, deviation;
  Lanes<acc_t> free;  // 0 where the deviation was guarded, else 1
};

// What a segment's pairs give for the gradients: sums over the taps of dn, dn * n, G * n and G, with dn = gamma * G.
template <class acc_t>
struct PairSums {
  Lanes<acc_t> dn, product, gamma, beta;
};

template <class acc_t>
ADAFM_CLONES void add_taps(const acc_t* __restrict__ tile, int64_t width, acc_t* __restrict__ sum) {
  for (int64_t t = 0; t < width; ++t) {
    for (int64_t i = 0; i < kLanes; ++i) {
      sum[i] += tile[t * kLanes + i];
    }
  }
}

template <class acc_t>
ADAFM_CLONES void add_squares(const acc_t* __restrict__ tile, int64_t width, const acc_t* __restrict__ mean,
                              acc_t* __restrict__ sum) {
  for (int64_t t = 0; t < width; ++t) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const acc_t d = tile[t * kLanes + i] - mean[i];
      sum[i] = std::fma(d, d, sum[i]);
    }
  }
}

// Deviations from sums of squares over `count` weights each.
template <class acc_t>
ADAFM_CLONES void guard(const acc_t* __restrict__ squares, acc_t count, acc_t eps, Statistics<acc_t>& of) {
  for (int64_t i = 0; i < kLanes; ++i) {
    const acc_t deviation = std::sqrt(squares[i] / (count - 1));
    of.deviation[i] = deviation < eps ? eps : deviation;
    of.free[i] = deviation < eps ? acc_t(0) : acc_t(1);
  }
}

template <class acc_t>
ADAFM_CLONES void normalize(const Statistics<acc_t>& of, int64_t width, acc_t* __restrict__ tile) {
  for (int64_t t = 0; t < width; ++t) {
    for (int64_t i = 0; i < kLanes; ++i) {
      tile[t * kLanes + i] = (tile[t * kLanes + i] - of.mean[i]) / of.deviation[i];
    }
  }
}

template <class acc_t>
ADAFM_CLONES void scale(const acc_t* __restrict__ gamma, const acc_t* __restrict__ beta, const acc_t* __restrict__ n,
                        int64_t count, int64_t width, acc_t* __restrict__ tile) {
  for (int64_t t = 0; t < width; ++t) {
    for (int64_t i = 0; i < count; ++i) {
      tile[t * kLanes + i] = std::fma(gamma[i], n[t * kLanes + i], beta[i]);
    }
  }
}

template <class acc_t>
ADAFM_CLONES void add_gradients(const acc_t* __restrict__ grad, const acc_t* __restrict__ n,
                                const acc_t* __restrict__ gamma, int64_t width, PairSums<acc_t>& sums) {
  for (int64_t t = 0; t < width; ++t) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const acc_t g = grad[t * kLanes + i], x = n[t * kLanes + i], dn = gamma[i] * g;
      sums.dn[i] += dn;
      sums.product[i] = std::fma(dn, x, sums.product[i]);
      sums.gamma[i] = std::fma(g, x, sums.gamma[i]);
      sums.beta[i] += g;
    }
  }
}

// dW in place of G. `mean` is that of dn, `slope` the factor of n.
template <class acc_t>
ADAFM_CLONES void descend(const acc_t* __restrict__ n, const acc_t* __restrict__ gamma, const acc_t* __restrict__ mean,
                          const acc_t* __restrict__ slope, const Statistics<acc_t>& of, int64_t width,
                          acc_t* __restrict__ grad) {
  for (int64_t t = 0; t < width; ++t) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const acc_t rest = gamma[i] * grad[t * kLanes + i] - mean[i];
      grad[t * kLanes + i] = std::fma(-n[t * kLanes + i], slope[i], rest) / of.deviation[i];
    }
  }
}

// The sum of all lanes, in every lane.
template <class acc_t>
void sum_lanes(acc_t* lanes) {
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) {
      lanes[i] += lanes[i + half];
    }
  }
  std::fill_n(lanes + 1, kLanes - 1, lanes[0]);
}

// One operand of a normalised op, read as tiles.
struct Operand {
  const void* data;
  DType type;
  Strides strides;

  Operand(const void* data, DType type, Layout layout, const Shape& shape)
      : data(data), type(type), strides(effective_layout(layout, shape), shape) {}

  // Lanes behind the segment's last pair keep what they hold.
  template <class acc_t>
  void load(const Segment& segment, int64_t first, int64_t width, acc_t* tile) const {
    load_tile(data, type, strides, segment, first, width, tile);
  }
};

// Calls run(first, width) for parts of the taps that fit into a tile.
template <class run_t>
void each_part(int64_t taps, run_t&& run) {
  for (int64_t first = 0; first < taps; first += kTileTaps) {
    run(first, std::min(kTileTaps, taps - first));
  }
}

// The segments of output channel o.
template <class run_t>
void each_segment(const Shape& shape, int64_t o, run_t&& run) {
  const int64_t begin = o * shape.in_channels, end = begin + shape.in_channels;
  for (int64_t pair = begin; pair < end;) {
    const Segment segment = segment_at(pair, end, shape.in_channels);
    run(segment);
    pair += segment.count;
  }
}

// Adds a segment's numbers to a channel's lanes.
template <class acc_t>
void add_segment(const acc_t* values, const Segment& segment, acc_t* lanes) {
  for (int64_t i = 0; i < segment.count; ++i) {
    lanes[i] += values[i];
  }
}

// Reads a weight tile by tile: its groups' statistics, and n. A tile that is asked for again right away is kept.
template <class acc_t>
class Normalizer {
 public:
  Normalizer(const Operand& weight, const Shape& shape, Group group, double eps)
      : weight_(weight),
        shape_(shape),
        count_(static_cast<acc_t>(group == Group::kChannel ? shape.in_channels * shape.taps : shape.taps)),
        eps_(static_cast<acc_t>(eps)) {
    std::fill_n(tile_, kTile, acc_t(0));
  }

  acc_t count() const { return count_; }

  // Of the segment's filters, each for itself.
  void filters(const Segment& segment, Statistics<acc_t>& of) {
    Lanes<acc_t> squares = {};
    sum(segment, of.mean);
    divide(of.mean);
    sum_squares(segment, of.mean, squares);
    guard(squares, count_, eps_, of);
  }

  // Of output channel o, the same for every pair.
  void channel(int64_t o, Statistics<acc_t>& of) {
    Lanes<acc_t> part, squares = {};
    std::fill_n(of.mean, kLanes, acc_t(0));
    each_segment(shape_, o, [&](const Segment& segment) {
      sum(segment, part);
      add_segment(part, segment, of.mean);
    });
    sum_lanes(of.mean);
    divide(of.mean);
    each_segment(shape_, o, [&](const Segment& segment) {
      sum_squares(segment, of.mean, part);
      add_segment(part, segment, squares);
    });
    sum_lanes(squares);
    guard(squares, count_, eps_, of);
  }

  // n of a segment's part, until the next call.
  const acc_t* normalized(const Segment& segment, const Statistics<acc_t>& of, int64_t first, int64_t width) {
    const Place place{segment.o, segment.first, first, true};
    if (!(place == held_)) {
      hold(segment, first, width);
      normalize(of, width, tile_);
      held_ = place;
    }
    return tile_;
  }

 private:
  // What the tile holds.
  struct Place {
    int64_t o, pair, tap;
    bool normalized;

    bool operator==(const Place& other) const {
      return o == other.o && pair == other.pair && tap == other.tap && normalized == other.normalized;
    }
  };

  void hold(const Segment& segment, int64_t first, int64_t width) {
    const Place place{segment.o, segment.first, first, false};
    if (!(place == held_)) {
      weight_.load(segment, first, width, tile_);
      held_ = place;
    }
  }

  void sum(const Segment& segment, acc_t* sums) {
    std::fill_n(sums, kLanes, acc_t(0));
    each_part(shape_.taps, [&](int64_t first, int64_t width) {
      hold(segment, first, width);
      add_taps(tile_, width, sums);
    });
  }

  void sum_squares(const Segment& segment, const acc_t* mean, acc_t* sums) {
    std::fill_n(sums, kLanes, acc_t(0));
    each_part(shape_.taps, [&](int64_t first, int64_t width) {
      hold(segment, first, width);
      add_squares(tile_, width, mean, sums);
    });
  }

  void divide(acc_t* sums) const {
    for (int64_t i = 0; i < kLanes; ++i) {
      sums[i] /= count_;
    }
  }

  const Operand weight_;
  const Shape shape_;
  const acc_t count_, eps_;
  Place held_{-1, 0, 0, false};
  acc_t tile_[kTile];
};

template <class acc_t>
void normalized_forward(const ModulateNormalizedArgs& args, int64_t begin, int64_t end) {
  const Shape& shape = args.shape;
  const Strides to(effective_layout(args.out_layout, shape), shape);
  Normalizer<acc_t> weight({args.weight, args.weight_type, args.weight_layout, shape}, shape, args.group, args.eps);
  Statistics<acc_t> of;
  Lanes<acc_t> gamma_scratch, beta_scratch;
  acc_t tile[kTile];
  for (int64_t o = begin; o < end; ++o) {
    if (args.group == Group::kChannel) {
      weight.channel(o, of);
    }
    each_segment(shape, o, [&](const Segment& segment) {
      if (args.group == Group::kFilter) {
        weight.filters(segment, of);
      }
      const acc_t* gamma = segment_values(args.gamma, segment, gamma_scratch);
      const acc_t* beta = segment_values(args.beta, segment, beta_scratch);
      each_part(shape.taps, [&](int64_t first, int64_t width) {
        scale(gamma, beta, weight.normalized(segment, of, first, width), segment.count, width, tile);
        store_tile(tile, args.out, args.out_type, to, segment, first, width);
      });
    });
  }
}

template <class acc_t>
class NormalizedBackward {
 public:
  explicit NormalizedBackward(const ModulateNormalizedBackwardArgs& args)
      : args_(args),
        shape_(args.shape),
        to_(effective_layout(args.weight_layout, shape_), shape_),
        grad_(args.grad, args.grad_type, args.grad_layout, shape_),
        weight_({args.weight, args.weight_type, args.weight_layout, shape_}, shape_, args.group, args.eps) {
    std::fill_n(tile_, kTile, acc_t(0));
    std::fill_n(gamma_, kLanes, acc_t(0));
  }

  void channel(int64_t o) {
    Statistics<acc_t> of;
    PairSums<acc_t> sums;
    if (args_.group == Group::kFilter) {
      each_segment(shape_, o, [&](const Segment& segment) {
        weight_.filters(segment, of);
        sum(segment, of, sums);
        write_gradient(segment, of, sums.dn, sums.product);
      });
      return;
    }
    weight_.channel(o, of);
    Lanes<acc_t> dn = {}, product = {};
    each_segment(shape_, o, [&](const Segment& segment) {
      sum(segment, of, sums);
      add_segment(sums.dn, segment, dn);
      add_segment(sums.product, segment, product);
    });
    sum_lanes(dn);
    sum_lanes(product);
    each_segment(shape_, o, [&](const Segment& segment) { write_gradient(segment, of, dn, product); });
  }

 private:
  // gamma of a segment, or zeros where dW is not wanted.
  void load_gamma(const Segment& segment) {
    if (args_.grad_weight != nullptr) {
      Lanes<acc_t> scratch;
      std::copy_n(segment_values(args_.gamma, segment, scratch), segment.count, gamma_);
    }
  }

  // A pair's sums; writes its dgamma and dbeta.
  void sum(const Segment& segment, const Statistics<acc_t>& of, PairSums<acc_t>& sums) {
    sums = {};
    load_gamma(segment);
    each_part(shape_.taps, [&](int64_t first, int64_t width) {
      grad_.load(segment, first, width, tile_);
      add_gradients(tile_, weight_.normalized(segment, of, first, width), gamma_, width, sums);
    });
    const int64_t pair = segment.o * shape_.in_channels + segment.first;
    if (args_.grad_gamma != nullptr) {
      std::copy_n(sums.gamma, segment.count, static_cast<acc_t*>(args_.grad_gamma) + pair);
    }
    if (args_.grad_beta != nullptr) {
      std::copy_n(sums.beta, segment.count, static_cast<acc_t*>(args_.grad_beta) + pair);
    }
  }

  // dW of a segment, from the group's sums of dn and dn * n.
  void write_gradient(const Segment& segment, const Statistics<acc_t>& of, const acc_t* dn, const acc_t* product) {
    if (args_.grad_weight == nullptr) {
      return;
    }
    Lanes<acc_t> mean, slope;
    for (int64_t i = 0; i < kLanes; ++i) {
      mean[i] = dn[i] / weight_.count();
      slope[i] = of.free[i] == 0 ? acc_t(0) : product[i] / (weight_.count() - 1);
    }
    load_gamma(segment);
    each_part(shape_.taps, [&](int64_t first, int64_t width) {
      grad_.load(segment, first, width, tile_);
      descend(weight_.normalized(segment, of, first, width), gamma_, mean, slope, of, width, tile_);
      store_tile(tile_, args_.grad_weight, args_.weight_type, to_, segment, first, width);
    });
  }

  const ModulateNormalizedBackwardArgs& args_;
  const Shape& shape_;
  const Strides to_;
  const Operand grad_;
  Normalizer<acc_t> weight_;
  acc_t tile_[kTile];
  Lanes<acc_t> gamma_;
};

template <class acc_t>
void normalized_backward(const ModulateNormalizedBackwardArgs& args, int64_t begin, int64_t end) {
  NormalizedBackward<acc_t> backward(args);
  for (int64_t o = begin; o < end; ++o) {
    backward.channel(o);
  }
}

}  // namespace cpu

int modulate_normalized_cpu(const ModulateNormalizedArgs& args, int64_t begin, int64_t end) {
  if (args.weight_type == DType::kFloat64) {
    cpu::normalized_forward<double>(args, begin, end);
  } else {
    cpu::normalized_forward<float>(args, begin, end);
  }
  return kOk;
}

int modulate_normalized_backward_cpu(const ModulateNormalizedBackwardArgs& args, int64_t begin, int64_t end) {
  if (args.weight_type == DType::kFloat64) {
    cpu::normalized_backward<double>(args, begin, end);
  } else {
    cpu::normalized_backward<float>(args, begin, end);
  }
  return kOk;
}

}  // namespace adafm
