// Every kernel against the reference, bit for bit: all element types, memory orders, parameter strides, odd sizes,
// offsets that break alignment, splits over threads, and no byte written outside a result. The CUDA kernels run here
// too, emulated (emulation/cuda_runtime.h), so that their indexing is checked on machines without a GPU;
// kernels_test_cuda is this program for a GPU. With the argument --few it runs a small part of the cases, for tools
// that slow it down.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "buffers.h"

namespace {

using namespace tests;

template <class args_t>
void run_in_pieces(int (*kernel)(const args_t&, int64_t, int64_t), const args_t& args) {
  const int64_t pairs = args.shape.pairs(), cut = pairs / 3;
  kernel(args, cut, pairs);
  kernel(args, 0, cut);
}

void test_modulate(const Shape& shape, DType weight_type, DType out_type, Layout from, Layout to, int form) {
  const int64_t n = shape.pairs() * shape.taps, shift = form == 1 ? 1 : 0;
  const DType type = adafm::compute_type(weight_type);
  Buffer weight(weight_type, n, shift);
  weight.fill_random(n);
  Values gamma(type, shape, form), beta(type, shape, (form + 2) % kForms);
  Buffer expected(out_type, n, shift), actual(out_type, n, shift), emulated(out_type, n, shift);
  adafm::ModulateArgs args{shape,          weight.data(),   weight_type, from, gamma.parameter,
                           beta.parameter, expected.data(), out_type,    to};
  reference::modulate(args);
  args.out = actual.data();
  run_in_pieces(&adafm::modulate_cpu, args);
  expect_same(actual, expected, "modulate_cpu", shape);
#if ADAFM_TEST_CUDA
  args.out = emulated.data();
  if (adafm::modulate_cuda(args, nullptr) != adafm::kOk) {
    fail("modulate_cuda: error", shape);
  }
  expect_same(emulated, expected, "modulate_cuda", shape);
#endif
}

void test_backward(const Shape& shape, DType grad_type, DType weight_type, Layout from, Layout to, int form,
                   unsigned needs) {
  const int64_t n = shape.pairs() * shape.taps, shift = form == 1 ? 1 : 0;
  const DType type = adafm::compute_type(weight_type);
  Buffer grad(grad_type, n, shift), weight(weight_type, n, shift);
  grad.fill_random(n);
  weight.fill_random(n);
  Values gamma(type, shape, form);
  adafm::ModulateBackwardArgs args{shape, grad.data(),     grad_type, from,    weight.data(), weight_type,
                                   to,    gamma.parameter, nullptr,   nullptr, nullptr};
  const auto run = [&](auto&& kernel, Buffer& grad_weight, Buffer& grad_gamma, Buffer& grad_beta) {
    args.grad_weight = needs & 1 ? grad_weight.data() : nullptr;
    args.grad_gamma = needs & 2 ? grad_gamma.data() : nullptr;
    args.grad_beta = needs & 4 ? grad_beta.data() : nullptr;
    kernel();
  };
  Buffer expected_weight(weight_type, n, shift), expected_gamma(type, shape.pairs(), 0),
      expected_beta(type, shape.pairs(), 0);
  run([&] { reference::modulate_backward(args); }, expected_weight, expected_gamma, expected_beta);
  Buffer actual_weight(weight_type, n, shift), actual_gamma(type, shape.pairs(), 0),
      actual_beta(type, shape.pairs(), 0);
  run([&] { run_in_pieces(&adafm::modulate_backward_cpu, args); }, actual_weight, actual_gamma, actual_beta);
  expect_same(actual_weight, expected_weight, "modulate_backward_cpu, dW", shape);
  expect_same(actual_gamma, expected_gamma, "modulate_backward_cpu, dgamma", shape);
  expect_same(actual_beta, expected_beta, "modulate_backward_cpu, dbeta", shape);
#if ADAFM_TEST_CUDA
  Buffer emulated_weight(weight_type, n, shift), emulated_gamma(type, shape.pairs(), 0),
      emulated_beta(type, shape.pairs(), 0);
  run(
      [&] {
        if (adafm::modulate_backward_cuda(args, nullptr) != adafm::kOk) {
          fail("modulate_backward_cuda: error", shape);
        }
      },
      emulated_weight, emulated_gamma, emulated_beta);
  expect_same(emulated_weight, expected_weight, "modulate_backward_cuda, dW", shape);
  expect_same(emulated_gamma, expected_gamma, "modulate_backward_cuda, dgamma", shape);
  expect_same(emulated_beta, expected_beta, "modulate_backward_cuda, dbeta", shape);
#endif
}

// gamma = 1, beta = -0: the values as they are, in another type. Sixteen-bit results have one not-a-number per sign.
void test_rounding_of(const std::vector<double>& values, const Shape& shape, DType from, DType to, Layout from_layout,
                      Layout to_layout) {
  const int64_t n = shape.pairs() * shape.taps;
  Buffer weight(from, n, 0), gamma(from, 1, 0), beta(from, 1, 0), expected(to, n, 0), actual(to, n, 0);
  for (int64_t e = 0; e < n; ++e) {
    reference::write(weight.data(), from, e, values[e]);
  }
  reference::write(gamma.data(), from, 0, 1.0);
  reference::write(beta.data(), from, 0, -0.0);
  adafm::ModulateArgs args{
      shape, weight.data(), from, from_layout, {gamma.data(), 0, 0}, {beta.data(), 0, 0}, expected.data(),
      to,    to_layout};
  reference::modulate(args);
  args.out = actual.data();
  adafm::modulate_cpu(args, 0, shape.pairs());
  if (reference::size_of(to) == 2) {
    expect_same(actual, expected, "rounding", shape);
    return;
  }
  for (int64_t e = 0; e < n; ++e) {
    const double a = reference::read(actual.data(), to, e), b = reference::read(expected.data(), to, e);
    const bool same = std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b);
    if (!same) {
      std::printf("FAILED rounding: %a, expected %a\n", a, b);
      std::exit(1);
    }
  }
  ++compared;
}

// Rounding at the edges of the 16-bit formats: ties, subnormals, overflow, infinities, not-a-number, signed zeros.
void test_rounding() {
  std::vector<double> values = {0.0,          -0.0,          INFINITY,      -INFINITY,  NAN,       65504.0,
                                65519.99,     65520.0,       -65520.0,      0x1p-14,    0x1p-24,   0x1p-25,
                                0x1.8p-25,    0x1p-26,       0x1p-133,      0x1.8p-134, 3.39e38,   -3.4e38,
                                1.0009765625, 1.00048828125, 1.00146484375, 1.00390625, 1.01171875};
  std::uniform_int_distribution<uint32_t> bits;
  for (int k = 0; k < 20000; ++k) {
    const uint32_t u = bits(random_engine);
    float x;
    std::memcpy(&x, &u, sizeof(x));
    values.push_back(x);
  }
  for (double wide : {1.0 + 0x1p-11 + 0x1p-40, 1.0 + 0x1p-8 + 0x1p-45, 1.0 + 0x1p-11 - 0x1p-40, 65519.9999999}) {
    values.push_back(wide);  // a second rounding through float32 would go wrong
  }
  const int64_t n = static_cast<int64_t>(values.size());
  for (const Shape& shape : {Shape{1, n, 1}, Shape{1, n / 9, 9}}) {
    for (const DType from : {DType::kFloat32, DType::kFloat64}) {
      for (const DType to : kTypes) {
        for (const Layout from_layout : kLayouts) {
          for (const Layout to_layout : kLayouts) {
            test_rounding_of(values, shape, from, to, from_layout, to_layout);
          }
        }
      }
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  const bool few = count > 1 && std::strcmp(arguments[1], "--few") == 0;
#if ADAFM_NEEDS_V3
  if (!__builtin_cpu_supports("x86-64-v3")) {
    std::printf("skipped: built for x86-64-v3, which this machine is not\n");
    return 77;
  }
#endif
  test_rounding();
  const Shape shapes[] = {{5, 7, 1},  {8, 16, 9}, {13, 5, 9},  {3, 70, 9},   {6, 24, 1},  {2, 130, 16},
                          {4, 3, 49}, {7, 1, 9},  {1, 1, 4},   {3, 64, 2},   {2, 67, 27}, {1, 3, 5000},
                          {33, 8, 9}, {3, 8, 16}, {2, 65, 70}, {0, 3, 9},    {2, 3, 0},   {5, 35, 4},
                          {3, 33, 3}, {2, 37, 5}, {40, 35, 9}, {1, 1100, 2}, {37, 1, 25}};
  for (const Shape& shape : shapes) {
    if (few && shape.pairs() * shape.taps > 2000) {
      continue;
    }
    for (const DType first : kTypes) {
      for (const DType second : kTypes) {
        if (few && first != DType::kFloat32 && second != DType::kFloat32) {
          continue;
        }
        for (const Layout from : kLayouts) {
          for (const Layout to : kLayouts) {
            for (int form = 0; form < (few || shape.pairs() * shape.taps > 4000 ? 2 : kForms); ++form) {
              test_modulate(shape, first, second, from, to, form);
              test_backward(shape, first, second, from, to, form, form == 0 ? 7u : 1u + unsigned(form));
            }
          }
        }
      }
    }
  }
  std::printf("%lld results equal the reference, bit for bit\n", static_cast<long long>(compared));
  return 0;
}
