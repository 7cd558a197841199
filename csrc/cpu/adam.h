// One step of Adam on neighbouring elements.
#pragma once

#include <cmath>

#include "clones.h"
#include "element.h"

namespace adafm {
namespace cpu {

// `rest1` is 1 - beta1; the corrections are 1 / (1 - beta^t).
template <class acc_t>
struct AdamNumbers {
  acc_t rate, beta1, rest1, beta2, rest2, eps, correction1, correction2;
};

template <class acc_t>
ADAFM_CLONES void adam(const AdamNumbers<acc_t>& n, const acc_t* __restrict__ gradient, int64_t count,
                       acc_t* __restrict__ p, acc_t* __restrict__ m, acc_t* __restrict__ v) {
  for (int64_t q = 0; q < count; ++q) {
    const acc_t g = gradient[q];
    m[q] = std::fma(n.beta1, m[q], n.rest1 * g);
    v[q] = std::fma(n.beta2, v[q], n.rest2 * g * g);
    p[q] -= n.rate * (m[q] * n.correction1) / (std::sqrt(v[q] * n.correction2) + n.eps);
  }
}

}  // namespace cpu
}  // namespace adafm
