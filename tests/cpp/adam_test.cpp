// Adam on many tensors, on the CPU and by the CUDA kernels (emulated, or on a GPU with ADAFM_GPU), against the
// reference, bit for bit: sizes around a vector, unaligned tensors, steps and step sizes of their own, skipped steps.
#include <memory>
#include <vector>

#include "adafm/adam_many.h"
#include "buffers.h"
#include "reference_adam.h"
#if ADAFM_TEST_CUDA && !ADAFM_GPU
#include "cuda_runtime.h"
#endif

namespace {

using tests::Buffer;
using tests::DType;
using tests::Shape;

constexpr double kBeta1 = 0.9, kBeta2 = 0.999, kEps = 1e-8;

struct Numbers {
  Buffer steps{DType::kFloat32, 1, 0}, rate{DType::kFloat32, 1, 0};
};

// One tensor with its gradient and moments; `shift` elements away from an aligned address.
struct One {
  int64_t count;
  DType type;
  Buffer parameter, grad, exp_avg, exp_avg_sq;
  Numbers numbers;

  One(DType type, int64_t count, int64_t shift)
      : count(count),
        type(type),
        parameter(type, count, shift),
        grad(type, count, 0),
        exp_avg(type, count, 0),
        exp_avg_sq(type, count, shift) {}

  void set(int64_t steps, double rate) {
    for (Buffer* buffer : {&parameter, &grad, &exp_avg, &exp_avg_sq}) {
      buffer->fill_random(count);
    }
    for (int64_t e = 0; e < count; ++e) {
      const double square = std::fabs(reference::read(exp_avg_sq.data(), type, e));
      reference::write(exp_avg_sq.data(), type, e, square);
    }
    reference::write(numbers.steps.data(), DType::kFloat32, 0, static_cast<double>(steps));
    reference::write(numbers.rate.data(), DType::kFloat32, 0, rate);
  }

  void copy(One& other) {
    Buffer* const mine[] = {&parameter, &grad, &exp_avg, &exp_avg_sq, &numbers.steps, &numbers.rate};
    Buffer* const theirs[] = {&other.parameter,  &other.grad,          &other.exp_avg,
                              &other.exp_avg_sq, &other.numbers.steps, &other.numbers.rate};
    for (int k = 0; k < 6; ++k) {
      std::memcpy(mine[k]->data(), theirs[k]->data(), mine[k]->bytes());
    }
  }
};

using Tensors = std::vector<std::unique_ptr<One>>;

// Every second step size is read where the kernel runs, as in a replayed graph.
std::vector<adafm::AdamTensor> table_of(Tensors& tensors) {
  std::vector<adafm::AdamTensor> table;
  for (const std::unique_ptr<One>& one : tensors) {
    const bool there = table.size() % 2 == 0;
    const float* rate = static_cast<const float*>(one->numbers.rate.data());
    table.push_back({one->parameter.data(), one->grad.data(), one->exp_avg.data(), one->exp_avg_sq.data(),
                     static_cast<float*>(one->numbers.steps.data()), there ? rate : nullptr, there ? -1.0 : *rate,
                     one->count});
  }
  return table;
}

void reference_step(Tensors& tensors) {
  for (const std::unique_ptr<One>& one : tensors) {
    const double t = reference::read(one->numbers.steps.data(), DType::kFloat32, 0) + 1;
    double power1 = 1, power2 = 1;
    for (int64_t k = 0; k < t; ++k) {
      power1 *= kBeta1, power2 *= kBeta2;
    }
    const auto round = [&](double x) { return reference::round_to(one->type, x); };
    const double rate = reference::read(one->numbers.rate.data(), DType::kFloat32, 0);
    // Powers are formed in another order here, so their last bits may differ; what the kernels use is held to them.
    const double correction1 = adafm::correction(kBeta1, static_cast<int64_t>(t));
    const double correction2 = adafm::correction(kBeta2, static_cast<int64_t>(t));
    ++tests::compared;
    if (std::fabs(correction1 * (1 - power1) - 1) > 1e-10 || std::fabs(correction2 * (1 - power2) - 1) > 1e-10) {
      tests::fail("correction", {});
    }
    const reference::AdamNumbers numbers{round(rate),       round(kBeta1), round(1 - kBeta1),  round(kBeta2),
                                         round(1 - kBeta2), round(kEps),   round(correction1), round(correction2)};
    for (int64_t e = 0; e < one->count; ++e) {
      reference::adam(one->type, numbers, reference::read(one->grad.data(), one->type, e), one->parameter.data(),
                      one->exp_avg.data(), one->exp_avg_sq.data(), e);
    }
    reference::write(one->numbers.steps.data(), DType::kFloat32, 0, t);
  }
}

void expect_alike(Tensors& actual, Tensors& expected, const std::string& what) {
  for (size_t l = 0; l < actual.size(); ++l) {
    One &a = *actual[l], &b = *expected[l];
    const std::string name = what + ", tensor " + std::to_string(l);
    tests::expect_same(a.parameter, b.parameter, name + ", parameter", {});
    tests::expect_same(a.exp_avg, b.exp_avg, name + ", exp_avg", {});
    tests::expect_same(a.exp_avg_sq, b.exp_avg_sq, name + ", exp_avg_sq", {});
    tests::expect_same(a.grad, b.grad, name + ", gradient", {});
    tests::expect_same(a.numbers.steps, b.numbers.steps, name + ", steps", {});
  }
}

int step_on_cpu(const adafm::AdamManyArgs& args, int64_t total) {
  const int64_t cuts[] = {0, total / 7, total / 3, total};
  for (int piece = 2; piece >= 0; --piece) {
    if (const int error = adafm::adam_many_cpu(args, cuts[piece], cuts[piece + 1]); error != adafm::kOk) {
      return error;
    }
  }
  adafm::count_steps_cpu(args);
  return adafm::kOk;
}

// Two steps of `sizes`, the second skipped or not. `skip`: -1 no flag, else its value.
template <class step_t>
void test(DType type, const std::vector<int64_t>& sizes, int skip, const std::string& what, step_t&& step) {
  Tensors expected, actual;
  int64_t total = 0;
  for (const int64_t count : sizes) {
    const int64_t l = static_cast<int64_t>(expected.size());
    for (Tensors* tensors : {&expected, &actual}) {
      tensors->push_back(std::make_unique<One>(type, count, l % 3 == 2 ? 1 : 0));
    }
    expected.back()->set(l % 4 == 3 ? 1234 : l % 4, 0.001 * static_cast<double>(l + 1));
    actual.back()->copy(*expected.back());
    total += count;
  }
  Buffer flag(DType::kFloat32, 1, 0);
  reference::write(flag.data(), DType::kFloat32, 0, skip > 0 ? 1 : 0);
  for (int repeat = 0; repeat < 2; ++repeat) {
    if (skip <= 0) {
      reference_step(expected);
    }
    const std::vector<adafm::AdamTensor> table = table_of(actual);
    const adafm::AdamManyArgs args{table.data(),
                                   static_cast<int64_t>(table.size()),
                                   type,
                                   kBeta1,
                                   kBeta2,
                                   kEps,
                                   skip < 0 ? nullptr : static_cast<const float*>(flag.data())};
    ++tests::compared;
    if (step(args, total) != adafm::kOk) {
      tests::fail(what + ": error", {});
    }
    device::wait();
  }
  expect_alike(actual, expected, what);
}

template <class step_t>
void test_all(const std::string& what, step_t&& step) {
  std::vector<int64_t> many;
  for (int64_t l = 0; l < 2 * adafm::kMostTensors + 3; ++l) {
    many.push_back(l % 19);
  }
  for (const DType type : {DType::kFloat32, DType::kFloat64}) {
    for (const int skip : {-1, 0, 1}) {
      test(type, {0, 1, 7, 8, 9, 1023, 1024, 1025, 5000}, skip, what, step);
      test(type, many, skip, what, step);
    }
  }
  for (const DType type : {DType::kFloat16, DType::kBFloat16}) {
    const adafm::AdamManyArgs args{nullptr, 0, type, kBeta1, kBeta2, kEps, nullptr};
    ++tests::compared;
    if (step(args, 0) != adafm::kUnsupportedDType) {
      tests::fail(what + ": a half type was not refused", {});
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
  test_all("adam_many_cpu", &step_on_cpu);
#if ADAFM_TEST_CUDA
  test_all("adam_many_cuda", [](const adafm::AdamManyArgs& args, int64_t) {
#if !ADAFM_GPU
    const int64_t before = emulation::launches;
#endif
    const int error = adafm::adam_many_cuda(args, nullptr);
#if !ADAFM_GPU
    const int64_t groups = (args.tensor_count + adafm::kMostTensors - 1) / adafm::kMostTensors;
    if (emulation::launches - before != (error == adafm::kOk ? 2 * groups : 0)) {
      tests::fail("adam_many_cuda: launches", {});
    }
#endif
    return error;
  });
#endif
  std::printf("%lld results equal the reference, bit for bit\n", static_cast<long long>(tests::compared));
  return 0;
}
