// What the kernels should compute, written for reading: one element at a time, rounding with the C library.
#pragma once

#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "adafm/modulate.h"
#include "adafm/modulate_backward.h"

namespace reference {

// A binary format with an 8- or 5-bit exponent, in 16 bits.
struct Format {
  int fraction_bits;
  int lowest_exponent;  // of a normal number
  double largest;
};

constexpr Format kHalf{10, -14, 65504.0};
constexpr Format kBFloat{7, -126, 3.3895313892515355e38};

// To nearest, ties to even, in the default rounding mode.
inline uint16_t narrow(double x, const Format& format) {
  const int exponent_bits = 15 - format.fraction_bits;
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const uint16_t infinity = static_cast<uint16_t>(((1 << exponent_bits) - 1) << format.fraction_bits);
  if (std::isnan(x)) {
    return static_cast<uint16_t>(sign | infinity | 1 << (format.fraction_bits - 1));
  }
  const double magnitude = std::fabs(x);
  if (magnitude == 0) {
    return sign;
  }
  if (std::isinf(magnitude)) {
    return sign | infinity;
  }
  int exponent = std::ilogb(magnitude);
  if (exponent < format.lowest_exponent) {
    exponent = format.lowest_exponent;
  }
  const double unit = std::ldexp(1.0, exponent - format.fraction_bits);
  const double rounded = std::nearbyint(magnitude / unit) * unit;
  if (rounded > format.largest) {
    return sign | infinity;
  }
  const int biased =
      rounded >= std::ldexp(1.0, format.lowest_exponent) ? std::ilogb(rounded) - format.lowest_exponent + 1 : 0;
  const int scale = biased > 0 ? biased - 1 : 0;
  const double fraction = std::ldexp(rounded, format.fraction_bits - format.lowest_exponent - scale);
  const int implicit = biased > 0 ? 1 << format.fraction_bits : 0;
  return static_cast<uint16_t>(sign | biased << format.fraction_bits | (static_cast<int>(fraction) - implicit));
}

inline double widen(uint16_t bits, const Format& format) {
  const int exponent_mask = (1 << (15 - format.fraction_bits)) - 1;
  const int biased = bits >> format.fraction_bits & exponent_mask;
  const int fraction = bits & ((1 << format.fraction_bits) - 1);
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  if (biased == exponent_mask) {
    return fraction ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  }
  const int implicit = biased ? 1 << format.fraction_bits : 0;
  const int scale = biased ? biased - 1 : 0;
  return sign * std::ldexp(fraction + implicit, format.lowest_exponent - format.fraction_bits + scale);
}

inline int64_t size_of(adafm::DType type) {
  return type == adafm::DType::kFloat64 ? 8 : type == adafm::DType::kFloat32 ? 4 : 2;
}

inline double read(const void* data, adafm::DType type, int64_t index) {
  switch (type) {
    case adafm::DType::kFloat32:
      return static_cast<const float*>(data)[index];
    case adafm::DType::kFloat64:
      return static_cast<const double*>(data)[index];
    case adafm::DType::kFloat16:
      return widen(static_cast<const uint16_t*>(data)[index], kHalf);
    case adafm::DType::kBFloat16:
      return widen(static_cast<const uint16_t*>(data)[index], kBFloat);
  }
  return 0;
}

inline void write(void* data, adafm::DType type, int64_t index, double x) {
  switch (type) {
    case adafm::DType::kFloat32:
      static_cast<float*>(data)[index] = static_cast<float>(x);
      return;
    case adafm::DType::kFloat64:
      static_cast<double*>(data)[index] = x;
      return;
    case adafm::DType::kFloat16:
      static_cast<uint16_t*>(data)[index] = narrow(x, kHalf);
      return;
    case adafm::DType::kBFloat16:
      static_cast<uint16_t*>(data)[index] = narrow(x, kBFloat);
      return;
  }
}

inline int64_t offset(adafm::Layout layout, const adafm::Shape& shape, int64_t o, int64_t i, int64_t t) {
  return layout == adafm::Layout::kContiguous ? (o * shape.in_channels + i) * shape.taps + t
                                              : (o * shape.taps + t) * shape.in_channels + i;
}

inline double parameter(const adafm::Parameter& p, adafm::DType type, int64_t o, int64_t i) {
  return read(p.data, type, o * p.stride_o + i * p.stride_i);
}

// One fused multiply-add in the computing type.
inline double multiply_add(adafm::DType type, double a, double b, double c) {
  return type == adafm::DType::kFloat64
             ? std::fma(a, b, c)
             : double{std::fma(static_cast<float>(a), static_cast<float>(b), static_cast<float>(c))};
}

inline double round_to(adafm::DType type, double x) {
  return type == adafm::DType::kFloat64 ? x : double{static_cast<float>(x)};
}

inline void modulate(const adafm::ModulateArgs& args) {
  const adafm::Shape& shape = args.shape;
  const adafm::DType type = adafm::compute_type(args.weight_type);
  for (int64_t o = 0; o < shape.out_channels; ++o) {
    for (int64_t i = 0; i < shape.in_channels; ++i) {
      for (int64_t t = 0; t < shape.taps; ++t) {
        const double w = read(args.weight, args.weight_type, offset(args.weight_layout, shape, o, i, t));
        const double y = multiply_add(type, parameter(args.gamma, type, o, i), w, parameter(args.beta, type, o, i));
        write(args.out, args.out_type, offset(args.out_layout, shape, o, i, t), y);
      }
    }
  }
}

inline void modulate_backward(const adafm::ModulateBackwardArgs& args) {
  const adafm::Shape& shape = args.shape;
  const adafm::DType type = adafm::compute_type(args.weight_type);
  for (int64_t o = 0; o < shape.out_channels; ++o) {
    for (int64_t i = 0; i < shape.in_channels; ++i) {
      double sum_gamma = 0, sum_beta = 0;
      for (int64_t t = 0; t < shape.taps; ++t) {
        const double g = round_to(type, read(args.grad, args.grad_type, offset(args.grad_layout, shape, o, i, t)));
        const int64_t at = offset(args.weight_layout, shape, o, i, t);
        if (args.grad_gamma != nullptr) {
          sum_gamma = multiply_add(type, g, read(args.weight, args.weight_type, at), sum_gamma);
        }
        sum_beta = round_to(type, sum_beta + g);
        if (args.grad_weight != nullptr) {
          write(args.grad_weight, args.weight_type, at, round_to(type, parameter(args.gamma, type, o, i) * g));
        }
      }
      if (args.grad_gamma != nullptr) {
        write(args.grad_gamma, type, o * shape.in_channels + i, sum_gamma);
      }
      if (args.grad_beta != nullptr) {
        write(args.grad_beta, type, o * shape.in_channels + i, sum_beta);
      }
    }
  }
}

}  // namespace reference
