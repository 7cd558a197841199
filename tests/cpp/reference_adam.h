// What a step of Adam should compute, one element at a time.
#pragma once

#include "reference.h"

namespace reference {

struct AdamNumbers {
  double rate, beta1, rest1, beta2, rest2, eps, correction1, correction2;
};

// Element e of a parameter and its moments, all of `type`; `g` is its gradient.
inline void adam(adafm::DType type, const AdamNumbers& n, double g, void* parameter, void* exp_avg, void* exp_avg_sq,
                 int64_t e) {
  const auto round = [&](double x) { return round_to(type, x); };
  const double m = multiply_add(type, n.beta1, read(exp_avg, type, e), round(n.rest1 * g));
  const double v = multiply_add(type, n.beta2, read(exp_avg_sq, type, e), round(round(n.rest2 * g) * g));
  const double rise = round(n.rate * round(m * n.correction1));
  const double change = round(rise / round(round(std::sqrt(round(v * n.correction2))) + n.eps));
  write(parameter, type, e, round(read(parameter, type, e) - change));
  write(exp_avg, type, e, m);
  write(exp_avg_sq, type, e, v);
}

}  // namespace reference
