// Every kernel against the reference, bit for bit: all element types, memory orders, parameter strides, odd sizes,
// offsets that break alignment, splits over threads, and no byte written outside a result. The CUDA kernels run here
// too, emulated (emulation/cuda_runtime.h), so that their indexing is checked on machines without a GPU.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>

#include "reference.h"

#if defined(__x86_64__) && defined(__AVX2__)
#define ADAFM_NEEDS_V3 1
#else
#define ADAFM_NEEDS_V3 0
#endif

namespace {

using adafm::DType;
using adafm::Layout;
using adafm::Parameter;
using adafm::Shape;

constexpr DType kTypes[] = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16};
constexpr Layout kLayouts[] = {Layout::kContiguous, Layout::kChannelsLast};
constexpr unsigned char kCanary = 0xa5;
constexpr int64_t kMargin = 64;

std::mt19937 random_engine(7);
int64_t compared = 0;

// A tensor of n elements that begins `shift` elements behind a 64-byte boundary, with a margin on both sides.
class Buffer {
 public:
  Buffer(DType type, int64_t n, int64_t shift)
      : type_(type),
        used_(n * reference::size_of(type)),
        begin_(kMargin + shift * reference::size_of(type)),
        bytes_((begin_ + used_ + 2 * kMargin + 63) / 64 * 64) {
    memory_ = static_cast<unsigned char*>(std::aligned_alloc(64, bytes_));
    std::memset(memory_, kCanary, bytes_);
  }
  ~Buffer() { std::free(memory_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data() { return memory_ + begin_; }
  int64_t bytes() const { return used_; }

  void fill_random(int64_t n) {
    std::normal_distribution<double> values;
    for (int64_t e = 0; e < n; ++e) {
      reference::write(data(), type_, e, values(random_engine));
    }
  }

  bool margins_untouched() const {
    for (int64_t b = 0; b < bytes_; ++b) {
      if ((b < begin_ || b >= begin_ + used_) && memory_[b] != kCanary) {
        return false;
      }
    }
    return true;
  }

 private:
  DType type_;
  int64_t used_, begin_, bytes_;
  unsigned char* memory_;
};

void fail(const std::string& what, const Shape& shape) {
  std::printf("FAILED %s, shape [%lld, %lld, %lld]\n", what.c_str(), static_cast<long long>(shape.out_channels),
              static_cast<long long>(shape.in_channels), static_cast<long long>(shape.taps));
  std::exit(1);
}

void expect_same(Buffer& actual, Buffer& expected, const std::string& what, const Shape& shape) {
  ++compared;
  if (std::memcmp(actual.data(), expected.data(), actual.bytes()) != 0) {
    fail(what + ": values differ", shape);
  }
  if (!actual.margins_untouched()) {
    fail(what + ": wrote outside its result", shape);
  }
}

constexpr int kForms = 6;

// gamma or beta: dense, one per filter, one per channel, transposed, every second column at an offset, rows of a wider
// matrix.
Parameter parameter_in_form(const void* data, const Shape& shape, int form) {
  const int64_t in_channels = shape.in_channels;
  switch (form) {
    case 1:
      return {data, 1, 0};
    case 2:
      return {data, 0, 1};
    case 3:
      return {data, 1, shape.out_channels};
    case 4:
      return {data, 2 * in_channels, 2};
    case 5:
      return {data, in_channels + 1, 1};
    default:
      return {data, in_channels, 1};
  }
}

struct Values {
  Buffer buffer;
  Parameter parameter;

  Values(DType type, const Shape& shape, int form)
      : buffer(type, 2 * shape.pairs() + 1, form == 4 ? 1 : 0),
        parameter(parameter_in_form(buffer.data(), shape, form)) {
    buffer.fill_random(2 * shape.pairs() + 1);
  }
};

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
#if ADAFM_EMULATED_CUDA
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
#if ADAFM_EMULATED_CUDA
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
  const Shape shape{1, static_cast<int64_t>(values.size()), 1};
  for (const DType from : {DType::kFloat32, DType::kFloat64}) {
    for (const DType to : kTypes) {
      Buffer weight(from, shape.pairs(), 0), gamma(from, 1, 0), beta(from, 1, 0);
      for (int64_t e = 0; e < shape.pairs(); ++e) {
        reference::write(weight.data(), from, e, values[e]);
      }
      reference::write(gamma.data(), from, 0, 1.0);
      reference::write(beta.data(), from, 0, -0.0);
      Buffer expected(to, shape.pairs(), 0), actual(to, shape.pairs(), 0);
      adafm::ModulateArgs args{shape,
                               weight.data(),
                               from,
                               Layout::kContiguous,
                               {gamma.data(), 0, 0},
                               {beta.data(), 0, 0},
                               expected.data(),
                               to,
                               Layout::kContiguous};
      reference::modulate(args);
      args.out = actual.data();
      adafm::modulate_cpu(args, 0, shape.pairs());
      for (int64_t e = 0; e < shape.pairs(); ++e) {
        const double a = reference::read(actual.data(), to, e), b = reference::read(expected.data(), to, e);
        const bool same = std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b);
        if (!same) {
          std::printf("FAILED rounding of %a: %a, expected %a\n", values[e], a, b);
          std::exit(1);
        }
      }
      ++compared;
    }
  }
}

}  // namespace

int main() {
#if ADAFM_NEEDS_V3
  if (!__builtin_cpu_supports("x86-64-v3")) {
    std::printf("skipped: built for x86-64-v3, which this machine is not\n");
    return 77;
  }
#endif
  test_rounding();
  const Shape shapes[] = {{5, 7, 1},  {8, 16, 9}, {13, 5, 9},  {3, 70, 9}, {6, 24, 1},  {2, 130, 16},
                          {4, 3, 49}, {7, 1, 9},  {1, 1, 4},   {3, 64, 2}, {2, 67, 27}, {1, 3, 5000},
                          {33, 8, 9}, {3, 8, 16}, {2, 65, 70}, {0, 3, 9},  {2, 3, 0}};
  for (const Shape& shape : shapes) {
    for (const DType first : kTypes) {
      for (const DType second : kTypes) {
        for (const Layout from : kLayouts) {
          for (const Layout to : kLayouts) {
            for (int form = 0; form < (shape.pairs() * shape.taps > 4000 ? 2 : kForms); ++form) {
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
