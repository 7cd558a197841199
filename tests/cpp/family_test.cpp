// The CPU kernels of the whole family against the reference, bit for bit: all element types, memory orders, parameter
// strides, odd sizes, splits over threads, and no byte written outside a result or between the layers of an arena.
#include <memory>
#include <utility>
#include <vector>

#include "buffers.h"
#include "reference_family.h"

namespace {

using namespace tests;
using adafm::ArenaLayer;
using adafm::Group;
using adafm::SampleParameter;

constexpr Shape kShapes[] = {{5, 7, 1},  {8, 16, 9},  {13, 5, 9}, {3, 70, 9}, {6, 24, 1},   {2, 130, 16},
                             {4, 3, 49}, {7, 1, 9},   {1, 1, 4},  {3, 64, 2}, {2, 67, 27},  {1, 3, 2000},
                             {33, 8, 9}, {2, 65, 70}, {0, 3, 9},  {2, 0, 9},  {2, 1100, 3}, {2, 3, 0}};

bool is_large(const Shape& shape) { return shape.pairs() * shape.taps > 2000; }

// Runs [0, total) in pieces that begin at odd places, the last piece first.
template <class args_t>
void run_in_pieces(int (*kernel)(const args_t&, int64_t, int64_t), const args_t& args, int64_t total,
                   const std::string& what, const Shape& shape) {
  const int64_t cuts[] = {0, total / 7, total / 3 + 1 < total ? total / 3 + 1 : total, total};
  for (int piece = 2; piece >= 0; --piece) {
    if (kernel(args, cuts[piece], cuts[piece + 1]) != adafm::kOk) {
      fail(what + ": error", shape);
    }
  }
}

// gamma or beta of N samples: dense, one set for all, one value per filter, samples innermost.
struct Samples {
  Buffer buffer;
  SampleParameter parameter;

  Samples(DType type, int64_t samples, const Shape& shape, int form) : buffer(type, samples * shape.pairs() + 1, 0) {
    buffer.fill_random(samples * shape.pairs() + 1);
    const int64_t in_channels = shape.in_channels;
    const SampleParameter forms[] = {{buffer.data(), shape.pairs(), in_channels, 1},
                                     {buffer.data(), 0, in_channels, 1},
                                     {buffer.data(), shape.out_channels, 1, 0},
                                     {buffer.data(), 1, in_channels * samples, samples}};
    parameter = forms[form % 4];
  }
};

void test_per_sample(const Shape& shape, DType weight_type, DType out_type, Layout from, Layout to, int form) {
  const int64_t samples = form + 1, n = shape.pairs() * shape.taps;
  const DType type = adafm::compute_type(weight_type);
  Buffer weight(weight_type, n, form % 2);
  weight.fill_random(n);
  Samples gamma(type, samples, shape, form), beta(type, samples, shape, form + 1);
  Buffer expected(out_type, samples * n, form % 2), actual(out_type, samples * n, form % 2);
  adafm::ModulatePerSampleArgs args{samples,         shape,          weight.data(),   weight_type, from,
                                    gamma.parameter, beta.parameter, expected.data(), out_type,    to};
  reference::modulate_per_sample(args);
  args.out = actual.data();
  run_in_pieces(&adafm::modulate_per_sample_cpu, args, shape.pairs(), "modulate_per_sample_cpu", shape);
  expect_same(actual, expected, "modulate_per_sample_cpu", shape);
}

// The results of a backward op, each a buffer; those not asked for stay null and untouched.
struct Gradients {
  Buffer weight, gamma, beta;

  Gradients(DType weight_type, int64_t n, int64_t sums)
      : weight(weight_type, n, 0),
        gamma(adafm::compute_type(weight_type), sums, 0),
        beta(adafm::compute_type(weight_type), sums, 0) {}

  template <class args_t>
  void hand_out(args_t& args, unsigned needs) {
    args.grad_weight = needs & 1 ? weight.data() : nullptr;
    args.grad_gamma = needs & 2 ? gamma.data() : nullptr;
    args.grad_beta = needs & 4 ? beta.data() : nullptr;
  }

  void expect_same_as(Gradients& expected, const std::string& what, const Shape& shape) {
    expect_same(weight, expected.weight, what + ", dW", shape);
    expect_same(gamma, expected.gamma, what + ", dgamma", shape);
    expect_same(beta, expected.beta, what + ", dbeta", shape);
  }
};

void test_per_sample_backward(const Shape& shape, DType grad_type, DType weight_type, Layout from, Layout to, int form,
                              unsigned needs) {
  const int64_t samples = form + 1, n = shape.pairs() * shape.taps;
  Buffer grad(grad_type, samples * n, form % 2), weight(weight_type, n, 0);
  grad.fill_random(samples * n);
  weight.fill_random(n);
  Samples gamma(adafm::compute_type(weight_type), samples, shape, form);
  Gradients expected(weight_type, n, samples * shape.pairs()), actual(weight_type, n, samples * shape.pairs());
  adafm::ModulatePerSampleBackwardArgs args{samples,     shape, grad.data(),     grad_type, from,    weight.data(),
                                            weight_type, to,    gamma.parameter, nullptr,   nullptr, nullptr};
  expected.hand_out(args, needs);
  reference::modulate_per_sample_backward(args);
  actual.hand_out(args, needs);
  run_in_pieces(&adafm::modulate_per_sample_backward_cpu, args, shape.pairs(), "modulate_per_sample_backward_cpu",
                shape);
  actual.expect_same_as(expected, "modulate_per_sample_backward_cpu", shape);
}

void test_lowrank(const Shape& shape, DType weight_type, DType out_type, Layout from, Layout to, int form) {
  const int64_t n = shape.pairs() * shape.taps, rank = form * form;
  const DType type = adafm::compute_type(weight_type);
  Buffer weight(weight_type, n, 0), left(type, shape.out_channels * rank, 0), right(type, rank * shape.in_channels, 0);
  weight.fill_random(n);
  left.fill_random(shape.out_channels * rank);
  right.fill_random(rank * shape.in_channels);
  Values gamma(type, shape, form), beta(type, shape, (form + 2) % kForms);
  Buffer expected(out_type, n, 0), actual(out_type, n, 0);
  adafm::ModulateLowrankArgs args{shape,       rank,         weight.data(),  weight_type,     from,     gamma.parameter,
                                  left.data(), right.data(), beta.parameter, expected.data(), out_type, to};
  reference::modulate_lowrank(args);
  args.out = actual.data();
  run_in_pieces(&adafm::modulate_lowrank_cpu, args, shape.pairs(), "modulate_lowrank_cpu", shape);
  expect_same(actual, expected, "modulate_lowrank_cpu", shape);
}

// A weight with spread filters, or one whose filters hold nearly one value each: their deviation is guarded.
void fill_weight(Buffer& weight, DType type, int64_t n, bool flat) {
  weight.fill_random(n);
  for (int64_t e = 0; flat && e < n; ++e) {
    reference::write(weight.data(), type, e, 0.5 + 1e-6 * reference::read(weight.data(), type, e));
  }
}

constexpr double kEps = 1e-5;

void test_normalized(const Shape& shape, DType weight_type, DType out_type, Layout from, Layout to, int form,
                     Group group) {
  const int64_t n = shape.pairs() * shape.taps;
  const DType type = adafm::compute_type(weight_type);
  Buffer weight(weight_type, n, 0);
  fill_weight(weight, weight_type, n, form == 1);
  Values gamma(type, shape, form), beta(type, shape, (form + 2) % kForms);
  Buffer expected(out_type, n, 0), actual(out_type, n, 0);
  adafm::ModulateNormalizedArgs args{shape, group,           kEps,           weight.data(),   weight_type,
                                     from,  gamma.parameter, beta.parameter, expected.data(), out_type,
                                     to};
  reference::modulate_normalized(args);
  args.out = actual.data();
  run_in_pieces(&adafm::modulate_normalized_cpu, args, shape.out_channels, "modulate_normalized_cpu", shape);
  expect_same(actual, expected, "modulate_normalized_cpu", shape);
}

void test_normalized_backward(const Shape& shape, DType grad_type, DType weight_type, Layout from, Layout to, int form,
                              Group group, unsigned needs) {
  const int64_t n = shape.pairs() * shape.taps;
  Buffer grad(grad_type, n, 0), weight(weight_type, n, 0);
  grad.fill_random(n);
  fill_weight(weight, weight_type, n, form == 1);
  Values gamma(adafm::compute_type(weight_type), shape, form);
  Gradients expected(weight_type, n, shape.pairs()), actual(weight_type, n, shape.pairs());
  adafm::ModulateNormalizedBackwardArgs args{shape,   group,         kEps,        grad.data(), grad_type,
                                             from,    weight.data(), weight_type, to,          gamma.parameter,
                                             nullptr, nullptr,       nullptr};
  expected.hand_out(args, needs);
  reference::modulate_normalized_backward(args);
  actual.hand_out(args, needs);
  run_in_pieces(&adafm::modulate_normalized_backward_cpu, args, shape.out_channels, "modulate_normalized_backward_cpu",
                shape);
  actual.expect_same_as(expected, "modulate_normalized_backward_cpu", shape);
}

// A network: layers of every kind at multiples of eight, with gaps.
struct Network {
  std::vector<ArenaLayer> layers;
  int64_t weights = 0, pairs = 0, work = 0;

  Network() {
    const auto padded = [](int64_t n) { return (n + 7) / 8 * 8; };
    for (const Shape& shape : {Shape{3, 16, 9}, Shape{5, 3, 9}, Shape{1, 1, 1}, Shape{0, 4, 9}, Shape{2, 5, 0},
                               Shape{70, 9, 1}, Shape{4, 130, 16}, Shape{1, 40, 1}, Shape{2, 1100, 9}}) {
      const int64_t n = shape.pairs() * shape.taps;
      layers.push_back(
          {weights, pairs, shape.out_channels, shape.in_channels, shape.taps, static_cast<int64_t>(layers.size()) % 4});
      weights += padded(n) + 8;
      pairs += padded(shape.pairs()) + 8;
      work += n;
    }
  }

  int64_t count() const { return static_cast<int64_t>(layers.size()); }
  Shape shape() const { return {count(), weights, 1}; }
};

void copy(Buffer& to, Buffer& from) { std::memcpy(to.data(), from.data(), to.bytes()); }

void test_arena(const Network& net, DType first, DType second) {
  const DType type = adafm::compute_type(first);
  Buffer weight(first, net.weights, 0), gamma(type, net.pairs, 0), beta(type, net.pairs, 0);
  weight.fill_random(net.weights);
  gamma.fill_random(net.pairs);
  beta.fill_random(net.pairs);
  Buffer expected(second, net.weights, 0), actual(second, net.weights, 0);
  adafm::ModulateArenaArgs args{net.layers.data(), net.count(), nullptr,         0,     weight.data(), first,
                                gamma.data(),      beta.data(), expected.data(), second};
  reference::modulate_arena(args);
  args.out = actual.data();
  run_in_pieces(&adafm::modulate_arena_cpu, args, net.work, "modulate_arena_cpu", net.shape());
  expect_same(actual, expected, "modulate_arena_cpu", net.shape());
}

void test_arena_backward(const Network& net, DType weight_type, DType grad_type, unsigned needs) {
  const DType type = adafm::compute_type(weight_type);
  Buffer grad(grad_type, net.weights, 0), weight(weight_type, net.weights, 0), gamma(type, net.pairs, 0);
  grad.fill_random(net.weights);
  weight.fill_random(net.weights);
  gamma.fill_random(net.pairs);
  Gradients expected(weight_type, net.weights, net.pairs), actual(weight_type, net.weights, net.pairs);
  adafm::ModulateBackwardArenaArgs args{net.layers.data(),
                                        net.count(),
                                        nullptr,
                                        0,
                                        grad.data(),
                                        grad_type,
                                        needs & 2 ? weight.data() : nullptr,
                                        weight_type,
                                        needs & 1 ? gamma.data() : nullptr,
                                        nullptr,
                                        nullptr,
                                        nullptr};
  expected.hand_out(args, needs);
  reference::modulate_backward_arena(args);
  actual.hand_out(args, needs);
  run_in_pieces(&adafm::modulate_backward_arena_cpu, args, net.work, "modulate_backward_arena_cpu", net.shape());
  actual.expect_same_as(expected, "modulate_backward_arena_cpu", net.shape());
}

// What a step changes.
struct StepState {
  Buffer parameters, exp_avg, exp_avg_sq, average, out;

  StepState(DType type, DType out_type, const Network& net)
      : parameters(type, 2 * net.pairs, 0),
        exp_avg(type, 2 * net.pairs, 0),
        exp_avg_sq(type, 2 * net.pairs, 0),
        average(type, 2 * net.pairs, 0),
        out(out_type, net.weights, 0) {}

  void hand_out(adafm::StepManyArgs& args, bool average_too, bool out_too) {
    args.parameters = parameters.data();
    args.exp_avg = exp_avg.data();
    args.exp_avg_sq = exp_avg_sq.data();
    args.average = average_too ? average.data() : nullptr;
    args.out = out_too ? out.data() : nullptr;
  }
};

void test_step(const Network& net, DType weight_type, DType grad_type, DType out_type, bool average, bool out) {
  const DType type = adafm::compute_type(weight_type);
  Buffer grad(grad_type, net.weights, 0), weight(weight_type, net.weights, 0), hyper(type, 8, 0);
  grad.fill_random(net.weights);
  weight.fill_random(net.weights);
  const double numbers[] = {1e-2, 0.9, 0.999, 1e-8, 10.0, 1000.0, 0.99, 0.0};
  for (int64_t k = 0; k < 8; ++k) {
    reference::write(hyper.data(), type, k, numbers[k]);
  }
  StepState expected(type, out_type, net), actual(type, out_type, net);
  expected.parameters.fill_random(2 * net.pairs);
  expected.exp_avg.fill_random(2 * net.pairs);
  expected.exp_avg_sq.fill_random(2 * net.pairs);
  expected.average.fill_random(2 * net.pairs);
  for (int64_t e = 0; e < 2 * net.pairs; ++e) {
    const double square = std::fabs(reference::read(expected.exp_avg_sq.data(), type, e));
    reference::write(expected.exp_avg_sq.data(), type, e, square);
  }
  copy(actual.parameters, expected.parameters);
  copy(actual.exp_avg, expected.exp_avg);
  copy(actual.exp_avg_sq, expected.exp_avg_sq);
  copy(actual.average, expected.average);
  adafm::StepManyArgs args{};
  args.layers = net.layers.data();
  args.layer_count = net.count();
  args.grad = grad.data();
  args.grad_type = grad_type;
  args.weight = weight.data();
  args.weight_type = weight_type;
  args.hyper = hyper.data();
  args.stride = net.pairs;
  args.out_type = out_type;
  for (int repeat = 0; repeat < 2; ++repeat) {
    expected.hand_out(args, average, out);
    reference::step_many(args);
    actual.hand_out(args, average, out);
    run_in_pieces(&adafm::step_many_cpu, args, net.work, "step_many_cpu", net.shape());
  }
  expect_same(actual.parameters, expected.parameters, "step_many_cpu, parameters", net.shape());
  expect_same(actual.exp_avg, expected.exp_avg, "step_many_cpu, exp_avg", net.shape());
  expect_same(actual.exp_avg_sq, expected.exp_avg_sq, "step_many_cpu, exp_avg_sq", net.shape());
  expect_same(actual.average, expected.average, "step_many_cpu, average", net.shape());
  expect_same(actual.out, expected.out, "step_many_cpu, W'", net.shape());
}

// Separate layers with layouts, types and parameters of their own, numbered together.
void test_many(DType weight_type, DType out_type) {
  const DType type = adafm::compute_type(weight_type);
  std::vector<adafm::ModulateArgs> layers;
  std::vector<adafm::ModulateBackwardArgs> backward;
  std::vector<std::unique_ptr<Buffer>> memory;
  std::vector<std::unique_ptr<Values>> values;
  std::vector<std::unique_ptr<Gradients>> gradients;
  const auto buffer = [&](DType of, int64_t n) {
    memory.push_back(std::make_unique<Buffer>(of, n, 0));
    return memory.back().get();
  };
  std::vector<Buffer*> expected, actual;
  int64_t work = 0;
  int form = 0;
  for (const Shape& shape : kShapes) {
    const int64_t n = shape.pairs() * shape.taps;
    Buffer *weight = buffer(weight_type, n), *grad = buffer(out_type, n);
    weight->fill_random(n);
    grad->fill_random(n);
    const Layout from = kLayouts[form % 2], to = kLayouts[form / 2 % 2];
    values.push_back(std::make_unique<Values>(type, shape, form % kForms));
    const Parameter gamma = values.back()->parameter;
    values.push_back(std::make_unique<Values>(type, shape, (form + 1) % kForms));
    expected.push_back(buffer(out_type, n));
    actual.push_back(buffer(out_type, n));
    layers.push_back({shape, weight->data(), weight_type, from, gamma, values.back()->parameter,
                      expected.back()->data(), out_type, to});
    reference::modulate(layers.back());
    layers.back().out = actual.back()->data();
    for (int k = 0; k < 2; ++k) {
      gradients.push_back(std::make_unique<Gradients>(weight_type, n, shape.pairs()));
    }
    backward.push_back(
        {shape, grad->data(), out_type, to, weight->data(), weight_type, from, gamma, nullptr, nullptr, nullptr});
    gradients[gradients.size() - 2]->hand_out(backward.back(), 7);
    reference::modulate_backward(backward.back());
    gradients.back()->hand_out(backward.back(), 7);
    work += n;
    ++form;
  }
  const int64_t count = static_cast<int64_t>(layers.size()), cut = work / 3 + 1;
  for (const auto& [begin, end] : {std::pair{cut, work}, std::pair{int64_t{0}, cut}}) {
    if (adafm::modulate_many_cpu(layers.data(), count, begin, end) != adafm::kOk ||
        adafm::modulate_many_backward_cpu(backward.data(), count, begin, end) != adafm::kOk) {
      fail("modulate_many_cpu: error", {count, work, 1});
    }
  }
  for (size_t l = 0; l < layers.size(); ++l) {
    expect_same(*actual[l], *expected[l], "modulate_many_cpu", layers[l].shape);
    gradients[2 * l + 1]->expect_same_as(*gradients[2 * l], "modulate_many_backward_cpu", layers[l].shape);
  }
}

void test_weights() {
  for (const Shape& shape : kShapes) {
    for (const DType first : kTypes) {
      for (const DType second : kTypes) {
        for (const Layout from : kLayouts) {
          for (const Layout to : kLayouts) {
            for (int form = 0; form < (is_large(shape) ? 2 : 4); ++form) {
              constexpr unsigned kNeeds[] = {7, 3, 6, 1};
              const unsigned needs = kNeeds[form];
              test_per_sample(shape, first, second, from, to, form);
              test_per_sample_backward(shape, first, second, from, to, form, needs);
              test_lowrank(shape, first, second, from, to, form);
              for (const Group group : {Group::kFilter, Group::kChannel}) {
                if ((group == Group::kFilter ? shape.taps : shape.in_channels * shape.taps) > 1) {
                  test_normalized(shape, first, second, from, to, form, group);
                  test_normalized_backward(shape, first, second, from, to, form, group, needs);
                }
              }
            }
          }
        }
      }
    }
  }
}

void test_networks() {
  const Network net;
  for (const DType first : kTypes) {
    for (const DType second : kTypes) {
      test_arena(net, first, second);
      for (const unsigned needs : {1u, 2u, 4u, 6u, 7u}) {
        test_arena_backward(net, first, second, needs);
      }
      test_many(first, second);
      test_step(net, first, second, second, true, true);
      test_step(net, first, DType::kBFloat16, second, false, true);
      test_step(net, first, DType::kFloat32, second, true, false);
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
  test_weights();
  test_networks();
  std::printf("%lld results equal the reference, bit for bit\n", static_cast<long long>(compared));
  return 0;
}
