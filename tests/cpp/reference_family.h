// The other ops of the family as reference.h has modulate: one element at a time, one rounding where it is written.
#pragma once

#include "adafm/modulate_lowrank.h"
#include "adafm/modulate_many.h"
#include "adafm/modulate_normalized.h"
#include "adafm/modulate_per_sample.h"
#include "adafm/step_many.h"
#include "reference.h"
#include "reference_adam.h"

namespace reference {

inline const void* at(const void* data, adafm::DType type, int64_t index) {
  return data == nullptr ? nullptr : static_cast<const char*>(data) + index * size_of(type);
}

inline void* at(void* data, adafm::DType type, int64_t index) {
  return data == nullptr ? nullptr : static_cast<char*>(data) + index * size_of(type);
}

inline adafm::Shape shape_of(const adafm::ArenaLayer& layer) {
  return {layer.out_channels, layer.in_channels, layer.taps};
}

inline void modulate_arena(const adafm::ModulateArenaArgs& args) {
  const adafm::DType type = adafm::compute_type(args.weight_type);
  for (int64_t l = 0; l < args.layer_count; ++l) {
    const adafm::ArenaLayer& layer = args.layers[l];
    modulate({shape_of(layer),
              at(args.weight, args.weight_type, layer.weight),
              args.weight_type,
              adafm::Layout::kChannelsLast,
              {at(args.gamma, type, layer.pair), layer.in_channels, 1},
              {at(args.beta, type, layer.pair), layer.in_channels, 1},
              at(args.out, args.out_type, layer.weight),
              args.out_type,
              adafm::Layout::kChannelsLast});
  }
}

inline void modulate_backward_arena(const adafm::ModulateBackwardArenaArgs& args) {
  const adafm::DType type = adafm::compute_type(args.weight_type);
  for (int64_t l = 0; l < args.layer_count; ++l) {
    const adafm::ArenaLayer& layer = args.layers[l];
    modulate_backward({shape_of(layer),
                       at(args.grad, args.grad_type, layer.weight),
                       args.grad_type,
                       adafm::Layout::kChannelsLast,
                       at(args.weight, args.weight_type, layer.weight),
                       args.weight_type,
                       adafm::Layout::kChannelsLast,
                       {at(args.gamma, type, layer.pair), layer.in_channels, 1},
                       at(args.grad_weight, args.weight_type, layer.weight),
                       at(args.grad_gamma, type, layer.pair),
                       at(args.grad_beta, type, layer.pair)});
  }
}

inline adafm::Parameter sample(const adafm::SampleParameter& p, adafm::DType type, int64_t n) {
  return {at(p.data, type, n * p.stride_n), p.stride_o, p.stride_i};
}

inline void modulate_per_sample(const adafm::ModulatePerSampleArgs& args) {
  const adafm::DType type = adafm::compute_type(args.weight_type);
  const int64_t size = args.shape.pairs() * args.shape.taps;
  for (int64_t n = 0; n < args.samples; ++n) {
    modulate({args.shape, args.weight, args.weight_type, args.weight_layout, sample(args.gamma, type, n),
              sample(args.beta, type, n), at(args.out, args.out_type, n * size), args.out_type, args.out_layout});
  }
}

inline void modulate_per_sample_backward(const adafm::ModulatePerSampleBackwardArgs& args) {
  const adafm::Shape& shape = args.shape;
  const adafm::DType type = adafm::compute_type(args.weight_type);
  const int64_t size = shape.pairs() * shape.taps;
  for (int64_t n = 0; n < args.samples; ++n) {
    modulate_backward({shape, at(args.grad, args.grad_type, n * size), args.grad_type, args.grad_layout, args.weight,
                       args.weight_type, args.weight_layout, sample(args.gamma, type, n), nullptr,
                       at(args.grad_gamma, type, n * shape.pairs()), at(args.grad_beta, type, n * shape.pairs())});
  }
  if (args.grad_weight == nullptr) {
    return;
  }
  for (int64_t o = 0; o < shape.out_channels; ++o) {
    for (int64_t i = 0; i < shape.in_channels; ++i) {
      for (int64_t t = 0; t < shape.taps; ++t) {
        double sum = 0;
        for (int64_t n = 0; n < args.samples; ++n) {
          const int64_t from = n * size + offset(args.grad_layout, shape, o, i, t);
          const double grad = round_to(type, read(args.grad, args.grad_type, from));
          sum = multiply_add(type, parameter(sample(args.gamma, type, n), type, o, i), grad, sum);
        }
        write(args.grad_weight, args.weight_type, offset(args.weight_layout, shape, o, i, t), sum);
      }
    }
  }
}

inline void modulate_lowrank(const adafm::ModulateLowrankArgs& args) {
  const adafm::Shape& shape = args.shape;
  const adafm::DType type = adafm::compute_type(args.weight_type);
  std::vector<char> memory(shape.pairs() * size_of(type));
  for (int64_t o = 0; o < shape.out_channels; ++o) {
    for (int64_t i = 0; i < shape.in_channels; ++i) {
      double gamma = parameter(args.gamma, type, o, i);
      for (int64_t r = 0; r < args.rank; ++r) {
        gamma = multiply_add(type, read(args.left, type, o * args.rank + r),
                             read(args.right, type, r * shape.in_channels + i), gamma);
      }
      write(memory.data(), type, o * shape.in_channels + i, gamma);
    }
  }
  modulate({shape,
            args.weight,
            args.weight_type,
            args.weight_layout,
            {memory.data(), shape.in_channels, 1},
            args.beta,
            args.out,
            args.out_type,
            args.out_layout});
}

// Adds numbers that belong to pairs, in the order of the CPU: every 64th pair of a filter goes into one of 64 sums, and
// the upper half of them is added to the lower until one is left.
class LaneSum {
 public:
  explicit LaneSum(adafm::DType type) : type_(type), lanes_(64, 0.0) {}

  void add(int64_t i, double x) { lanes_[i % 64] = round_to(type_, lanes_[i % 64] + x); }

  double total() const {
    std::vector<double> lanes = lanes_;
    for (int64_t half = 32; half > 0; half /= 2) {
      for (int64_t j = 0; j < half; ++j) {
        lanes[j] = round_to(type_, lanes[j] + lanes[j + half]);
      }
    }
    return lanes[0];
  }

 private:
  adafm::DType type_;
  std::vector<double> lanes_;
};

// Mean and guarded deviation for each pair of one output channel.
struct Statistics {
  std::vector<double> mean, deviation;
  std::vector<bool> guarded;
  double count;
};

template <class args_t>
Statistics statistics(const args_t& args, int64_t o) {
  const adafm::Shape& shape = args.shape;
  const adafm::DType type = adafm::compute_type(args.weight_type);
  const auto weight = [&](int64_t i, int64_t t) {
    return read(args.weight, args.weight_type, offset(args.weight_layout, shape, o, i, t));
  };
  const bool channel = args.group == adafm::Group::kChannel;
  const double eps = round_to(type, args.eps);
  const int64_t pairs = shape.in_channels;
  Statistics of{std::vector<double>(pairs), std::vector<double>(pairs), std::vector<bool>(pairs),
                double(channel ? pairs * shape.taps : shape.taps)};
  LaneSum all(type);
  for (int64_t i = 0; i < pairs; ++i) {
    double sum = 0;
    for (int64_t t = 0; t < shape.taps; ++t) {
      sum = round_to(type, sum + weight(i, t));
    }
    of.mean[i] = sum;
    all.add(i, sum);
  }
  for (int64_t i = 0; i < pairs; ++i) {
    of.mean[i] = round_to(type, (channel ? all.total() : of.mean[i]) / of.count);
  }
  LaneSum squares(type);
  for (int64_t i = 0; i < pairs; ++i) {
    double sum = 0;
    for (int64_t t = 0; t < shape.taps; ++t) {
      const double d = round_to(type, weight(i, t) - of.mean[i]);
      sum = multiply_add(type, d, d, sum);
    }
    of.deviation[i] = sum;
    squares.add(i, sum);
  }
  for (int64_t i = 0; i < pairs; ++i) {
    const double sum = channel ? squares.total() : of.deviation[i];
    const double deviation = round_to(type, std::sqrt(round_to(type, sum / (of.count - 1))));
    of.guarded[i] = deviation < eps;
    of.deviation[i] = of.guarded[i] ? eps : deviation;
  }
  return of;
}

template <class args_t>
double normalized(const args_t& args, const Statistics& of, int64_t o, int64_t i, int64_t t) {
  const adafm::DType type = adafm::compute_type(args.weight_type);
  const double w = read(args.weight, args.weight_type, offset(args.weight_layout, args.shape, o, i, t));
  return round_to(type, round_to(type, w - of.mean[i]) / of.deviation[i]);
}

inline void modulate_normalized(const adafm::ModulateNormalizedArgs& args) {
  const adafm::Shape& shape = args.shape;
  const adafm::DType type = adafm::compute_type(args.weight_type);
  for (int64_t o = 0; o < shape.out_channels; ++o) {
    const Statistics of = statistics(args, o);
    for (int64_t i = 0; i < shape.in_channels; ++i) {
      for (int64_t t = 0; t < shape.taps; ++t) {
        const double y = multiply_add(type, parameter(args.gamma, type, o, i), normalized(args, of, o, i, t),
                                      parameter(args.beta, type, o, i));
        write(args.out, args.out_type, offset(args.out_layout, shape, o, i, t), y);
      }
    }
  }
}

inline void modulate_normalized_backward(const adafm::ModulateNormalizedBackwardArgs& args) {
  const adafm::Shape& shape = args.shape;
  const adafm::DType type = adafm::compute_type(args.weight_type);
  const bool channel = args.group == adafm::Group::kChannel;
  const auto grad = [&](int64_t o, int64_t i, int64_t t) {
    return round_to(type, read(args.grad, args.grad_type, offset(args.grad_layout, shape, o, i, t)));
  };
  for (int64_t o = 0; o < shape.out_channels; ++o) {
    const Statistics of = statistics(args, o);
    std::vector<double> sum_dn(shape.in_channels), sum_product(shape.in_channels);
    LaneSum all_dn(type), all_product(type);
    for (int64_t i = 0; i < shape.in_channels; ++i) {
      double sum_gamma = 0, sum_beta = 0;
      for (int64_t t = 0; t < shape.taps; ++t) {
        const double g = grad(o, i, t), n = normalized(args, of, o, i, t);
        const double dn = args.grad_weight ? round_to(type, parameter(args.gamma, type, o, i) * g) : 0;
        sum_dn[i] = round_to(type, sum_dn[i] + dn);
        sum_product[i] = multiply_add(type, dn, n, sum_product[i]);
        sum_gamma = multiply_add(type, g, n, sum_gamma);
        sum_beta = round_to(type, sum_beta + g);
      }
      all_dn.add(i, sum_dn[i]);
      all_product.add(i, sum_product[i]);
      if (args.grad_gamma != nullptr) {
        write(args.grad_gamma, type, o * shape.in_channels + i, sum_gamma);
      }
      if (args.grad_beta != nullptr) {
        write(args.grad_beta, type, o * shape.in_channels + i, sum_beta);
      }
    }
    if (args.grad_weight == nullptr) {
      continue;
    }
    for (int64_t i = 0; i < shape.in_channels; ++i) {
      const double mean = round_to(type, (channel ? all_dn.total() : sum_dn[i]) / of.count);
      const double product = channel ? all_product.total() : sum_product[i];
      const double slope = of.guarded[i] ? 0 : round_to(type, product / (of.count - 1));
      for (int64_t t = 0; t < shape.taps; ++t) {
        const double dn = round_to(type, parameter(args.gamma, type, o, i) * grad(o, i, t));
        const double y = multiply_add(type, -normalized(args, of, o, i, t), slope, round_to(type, dn - mean));
        write(args.grad_weight, args.weight_type, offset(args.weight_layout, shape, o, i, t),
              round_to(type, y / of.deviation[i]));
      }
    }
  }
}

inline void step_many(const adafm::StepManyArgs& args) {
  const adafm::DType type = adafm::compute_type(args.weight_type);
  const auto round = [&](double x) { return round_to(type, x); };
  const auto hyper = [&](int64_t k) { return read(args.hyper, type, k); };
  const AdamNumbers numbers{hyper(0), hyper(1), round(1 - hyper(1)), hyper(2), round(1 - hyper(2)), hyper(3),
                            hyper(4), hyper(5)};
  for (int64_t l = 0; l < args.layer_count; ++l) {
    const adafm::ArenaLayer& layer = args.layers[l];
    const int64_t pairs = layer.out_channels * layer.in_channels;
    std::vector<char> sums(2 * pairs * size_of(type));
    adafm::ArenaLayer alone = layer;
    alone.weight = alone.pair = 0;
    modulate_backward_arena({&alone, 1, nullptr, 0, at(args.grad, args.grad_type, layer.weight), args.grad_type,
                             at(args.weight, args.weight_type, layer.weight), args.weight_type, nullptr, nullptr,
                             sums.data(), at(sums.data(), type, pairs)});
    for (int64_t part = 0; part < 2; ++part) {
      const bool fixed = (layer.flags & (part ? adafm::kFixedBeta : adafm::kFixedGamma)) != 0;
      for (int64_t q = 0; q < pairs; ++q) {
        const int64_t e = part * args.stride + layer.pair + q;
        if (!fixed) {
          adam(type, numbers, read(sums.data(), type, part * pairs + q), args.parameters, args.exp_avg, args.exp_avg_sq,
               e);
        }
        if (args.average != nullptr) {
          const double a = read(args.average, type, e);
          write(args.average, type, e,
                multiply_add(type, round(1 - hyper(6)), round(read(args.parameters, type, e) - a), a));
        }
      }
    }
  }
  if (args.out != nullptr) {
    modulate_arena({args.layers, args.layer_count, nullptr, 0, args.weight, args.weight_type, args.parameters,
                    at(args.parameters, type, args.stride), args.out, args.out_type});
  }
}

}  // namespace reference
