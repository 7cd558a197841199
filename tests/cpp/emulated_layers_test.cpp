// The CUDA kernels over separate weights, emulated, against the reference, bit for bit: many layers in a launch, many
// samples, normalised and low-rank forms; every pair of element types and layouts, odd sizes, offsets that break
// alignment, parameter strides, and no byte written outside a result.
#include <deque>

#include "emulated.h"

namespace {

using namespace emulated;

const Shape kShapes[] = {{5, 7, 1}, {8, 16, 9}, {13, 5, 9}, {6, 24, 1},  {2, 130, 16}, {4, 3, 49},   {7, 1, 9},
                         {1, 1, 4}, {3, 64, 2}, {33, 8, 9}, {3, 8, 16},  {2, 16, 49},  {1, 2048, 9}, {2, 1032, 1},
                         {0, 3, 9}, {3, 0, 9},  {2, 24, 0}, {65, 16, 9}, {2, 40, 27},  {3, 16, 10}};
constexpr int64_t kShapeCount = sizeof(kShapes) / sizeof(kShapes[0]);

// gamma or beta of `samples` weights in one of the forms of buffers.h.
struct Parameters {
  Tensor memory;
  Parameter first;
  int64_t step;

  Parameters(DType type, const Shape& shape, int form, int64_t samples = 1)
      : memory(type, (samples + 1) * step_of(shape), form % tests::kForms == 4 ? 1 : 0),
        first(tests::parameter_in_form(memory.random().data(), shape, form % tests::kForms)),
        step(step_of(shape)) {}

  adafm::SampleParameter samples(bool shared) const {
    return {first.data, shared ? 0 : step, first.stride_o, first.stride_i};
  }

 private:
  static int64_t step_of(const Shape& shape) { return 2 * (shape.pairs() + shape.out_channels) + 4; }
};

// dW, dgamma and dbeta.
struct Gradients {
  Tensor weight, gamma, beta;

  Gradients(DType type, const Shape& shape, int64_t shift, int64_t samples = 1)
      : weight(type, shape.pairs() * shape.taps, shift),
        gamma(adafm::compute_type(type), samples * shape.pairs()),
        beta(adafm::compute_type(type), samples * shape.pairs()) {}
};

void expect_same_gradients(Gradients& actual, Gradients& expected, const std::string& what, const Shape& shape) {
  expect_same(actual.weight, expected.weight, what + ", dW", shape);
  expect_same(actual.gamma, expected.gamma, what + ", dgamma", shape);
  expect_same(actual.beta, expected.beta, what + ", dbeta", shape);
}

template <class args_t>
void ask(args_t& args, Gradients& gradients, unsigned needs) {
  args.grad_weight = wanted(needs, 1, gradients.weight);
  args.grad_gamma = wanted(needs, 2, gradients.gamma);
  args.grad_beta = wanted(needs, 4, gradients.beta);
}

struct Case {
  Shape shape;
  Layout from, to;
  int form;
  int64_t shift;
};

// Layers of all shapes, layouts, alignments and parameter forms.
std::vector<Case> make_layers(int64_t count) {
  std::vector<Case> layers;
  for (int64_t k = 0; k < count; ++k) {
    const int64_t round = k / kShapeCount;
    const Layout first = kLayouts[(k + round) % 2], second = round % 3 == 2 ? kLayouts[(k + round + 1) % 2] : first;
    layers.push_back({kShapes[k % kShapeCount], first, second, static_cast<int>(k), k % 7 == 3 ? 1 : 0});
  }
  return layers;
}

void expect_launches(int64_t before, int64_t layers, const std::string& what) {
  expect(before == kNotCounted || launches() - before == (layers + adafm::kMostLayers - 1) / adafm::kMostLayers,
         what + ": number of launches");
}

void test_many(DType weight_type, DType out_type, int64_t count) {
  const DType type = adafm::compute_type(weight_type);
  std::deque<Tensor> weights, expected, actual;
  std::deque<Parameters> parameters;
  std::vector<adafm::ModulateArgs> args;
  int64_t kept = 0;
  for (const Case& layer : make_layers(count)) {
    const int64_t n = layer.shape.pairs() * layer.shape.taps;
    weights.emplace_back(weight_type, n, layer.shift);
    parameters.emplace_back(type, layer.shape, layer.form);
    parameters.emplace_back(type, layer.shape, layer.form / 2);
    expected.emplace_back(out_type, n, layer.shift);
    actual.emplace_back(out_type, n, layer.shift);
    args.push_back({layer.shape, weights.back().random().data(), weight_type, layer.from,
                    parameters[parameters.size() - 2].first, parameters.back().first, expected.back().data(), out_type,
                    layer.to});
    reference::modulate(args.back());
    args.back().out = actual.back().data();
    kept += n != 0;
  }
  const int64_t before = launches();
  expect_ok(adafm::modulate_many_cuda(args.data(), count, nullptr), "modulate_many_cuda");
  expect_launches(before, kept, "modulate_many_cuda");
  for (size_t k = 0; k < args.size(); ++k) {
    expect_same(actual[k], expected[k], "modulate_many_cuda", args[k].shape);
  }
}

void test_many_backward(DType grad_type, DType weight_type, int64_t count, unsigned needs) {
  const DType type = adafm::compute_type(weight_type);
  std::deque<Tensor> grads, weights;
  std::deque<Parameters> gammas;
  std::deque<Gradients> expected, actual;
  std::vector<adafm::ModulateBackwardArgs> args;
  int64_t kept = 0;
  for (const Case& layer : make_layers(count)) {
    const int64_t n = layer.shape.pairs() * layer.shape.taps;
    grads.emplace_back(grad_type, n, layer.shift).random();
    weights.emplace_back(weight_type, n, layer.shift).random();
    gammas.emplace_back(type, layer.shape, layer.form);
    expected.emplace_back(weight_type, layer.shape, layer.form % 5 == 4 ? 1 : 0);
    actual.emplace_back(weight_type, layer.shape, layer.form % 5 == 4 ? 1 : 0);
    args.push_back({layer.shape, grads.back().data(), grad_type, layer.from, wanted(needs, 2, weights.back()),
                    weight_type, layer.to, needs & 1 ? gammas.back().first : Parameter{nullptr, 0, 0}, nullptr, nullptr,
                    nullptr});
    ask(args.back(), expected.back(), needs);
    reference::modulate_backward(args.back());
    ask(args.back(), actual.back(), needs);
    kept += layer.shape.pairs() != 0;
  }
  const int64_t before = launches();
  expect_ok(adafm::modulate_many_backward_cuda(args.data(), count, nullptr), "modulate_many_backward_cuda");
  expect_launches(before, kept, "modulate_many_backward_cuda");
  for (size_t k = 0; k < args.size(); ++k) {
    expect_same_gradients(actual[k], expected[k], "modulate_many_backward_cuda", args[k].shape);
  }
}

void test_per_sample(const Case& of, int64_t samples, DType weight_type, DType out_type) {
  const DType type = adafm::compute_type(weight_type);
  const int64_t n = of.shape.pairs() * of.shape.taps;
  Tensor weight(weight_type, n, of.shift);
  Parameters gamma(type, of.shape, of.form, samples), beta(type, of.shape, of.form + 1, samples);
  Tensor expected(out_type, samples * n, of.shift), actual(out_type, samples * n, of.shift);
  adafm::ModulatePerSampleArgs args{samples,
                                    of.shape,
                                    weight.random().data(),
                                    weight_type,
                                    of.from,
                                    gamma.samples(false),
                                    beta.samples(of.form % 2 != 0),
                                    expected.data(),
                                    out_type,
                                    of.to};
  reference::modulate_per_sample(args);
  args.out = actual.data();
  expect_ok(adafm::modulate_per_sample_cuda(args, nullptr), "modulate_per_sample_cuda", of.shape);
  expect_same(actual, expected, "modulate_per_sample_cuda", of.shape);
}

void test_per_sample_backward(const Case& of, int64_t samples, DType grad_type, DType weight_type, unsigned needs) {
  const int64_t n = of.shape.pairs() * of.shape.taps;
  Tensor grad(grad_type, samples * n, of.shift), weight(weight_type, n);
  Parameters gamma(adafm::compute_type(weight_type), of.shape, of.form, samples);
  Gradients expected(weight_type, of.shape, 0, samples), actual(weight_type, of.shape, 0, samples);
  adafm::ModulatePerSampleBackwardArgs args{
      samples,     of.shape, grad.random().data(), grad_type, of.from, wanted(needs, 2, weight.random()),
      weight_type, of.to,    gamma.samples(false), nullptr,   nullptr, nullptr};
  ask(args, expected, needs);
  reference::modulate_per_sample_backward(args);
  ask(args, actual, needs);
  expect_ok(adafm::modulate_per_sample_backward_cuda(args, nullptr), "modulate_per_sample_backward_cuda", of.shape);
  expect_same_gradients(actual, expected, "modulate_per_sample_backward_cuda", of.shape);
}

void test_lowrank(const Case& of, int64_t rank, DType weight_type, DType out_type) {
  const DType type = adafm::compute_type(weight_type);
  const int64_t n = of.shape.pairs() * of.shape.taps;
  Tensor weight(weight_type, n, of.shift), left(type, of.shape.out_channels * rank);
  Tensor right(type, rank * of.shape.in_channels, of.form % 5 == 2 ? 1 : 0);
  Parameters gamma(type, of.shape, of.form), beta(type, of.shape, of.form + 2);
  Tensor expected(out_type, n, of.shift), actual(out_type, n, of.shift);
  adafm::ModulateLowrankArgs args{of.shape,
                                  rank,
                                  weight.random().data(),
                                  weight_type,
                                  of.from,
                                  gamma.first,
                                  left.random().data(),
                                  right.random().data(),
                                  beta.first,
                                  expected.data(),
                                  out_type,
                                  of.to};
  reference::modulate_lowrank(args);
  args.out = actual.data();
  expect_ok(adafm::modulate_lowrank_cuda(args, nullptr), "modulate_lowrank_cuda", of.shape);
  expect_same(actual, expected, "modulate_lowrank_cuda", of.shape);
}

// Random weights, but every fifth filter, or the second channel, is constant: its deviation is guarded.
void fill_weight(Tensor& weight, DType type, const Shape& shape, Layout layout, adafm::Group group) {
  weight.random();
  for (int64_t o = 0; o < shape.out_channels; ++o) {
    for (int64_t i = 0; i < shape.in_channels; ++i) {
      for (int64_t t = 0; t < shape.taps; ++t) {
        if (group == adafm::Group::kChannel ? o == 1 : i % 5 == 2) {
          reference::write(weight.data(), type, reference::offset(layout, shape, o, i, t), 0.5);
        }
      }
    }
  }
}

constexpr double kEps = 1e-3;

void test_normalized(const Case& of, adafm::Group group, DType weight_type, DType out_type) {
  const DType type = adafm::compute_type(weight_type);
  const int64_t n = of.shape.pairs() * of.shape.taps;
  Tensor weight(weight_type, n, of.shift);
  fill_weight(weight, weight_type, of.shape, of.from, group);
  Parameters gamma(type, of.shape, of.form), beta(type, of.shape, of.form + 2);
  Tensor expected(out_type, n, of.shift), actual(out_type, n, of.shift);
  adafm::ModulateNormalizedArgs args{of.shape,        group,    kEps,        weight.data(),
                                     weight_type,     of.from,  gamma.first, beta.first,
                                     expected.data(), out_type, of.to};
  reference::modulate_normalized(args);
  args.out = actual.data();
  expect_ok(adafm::modulate_normalized_cuda(args, nullptr), "modulate_normalized_cuda", of.shape);
  expect_same(actual, expected, "modulate_normalized_cuda", of.shape);
}

void test_normalized_backward(const Case& of, adafm::Group group, DType grad_type, DType weight_type, unsigned needs) {
  const int64_t n = of.shape.pairs() * of.shape.taps;
  Tensor grad(grad_type, n), weight(weight_type, n, of.shift);
  fill_weight(weight, weight_type, of.shape, of.to, group);
  Parameters gamma(adafm::compute_type(weight_type), of.shape, of.form);
  Gradients expected(weight_type, of.shape, of.shift), actual(weight_type, of.shape, of.shift);
  adafm::ModulateNormalizedBackwardArgs args{of.shape,      group,
                                             kEps,          grad.random().data(),
                                             grad_type,     of.from,
                                             weight.data(), weight_type,
                                             of.to,         needs & 1 ? gamma.first : Parameter{nullptr, 0, 0},
                                             nullptr,       nullptr,
                                             nullptr};
  ask(args, expected, needs);
  reference::modulate_normalized_backward(args);
  ask(args, actual, needs);
  expect_ok(adafm::modulate_normalized_backward_cuda(args, nullptr), "modulate_normalized_backward_cuda", of.shape);
  expect_same_gradients(actual, expected, "modulate_normalized_backward_cuda", of.shape);
}

// Every op on one weight; the choices that are left turn with the form.
void test_weight(const Case& of, DType weight_type, DType other) {
  const unsigned needs = 1 + of.form % 7;
  test_per_sample(of, of.form % 5, weight_type, other);
  test_per_sample_backward(of, of.form % 5, other, weight_type, needs);
  test_lowrank(of, of.form % 6, weight_type, other);
  const adafm::Group group = of.form % 3 ? adafm::Group::kFilter : adafm::Group::kChannel;
  if (of.shape.taps > 1 || (group == adafm::Group::kChannel && of.shape.taps * of.shape.in_channels > 1)) {
    test_normalized(of, group, weight_type, other);
    test_normalized_backward(of, group, other, weight_type, needs);
  }
}

}  // namespace

int main() {
  int form = 0;
  for (const DType first : kTypes) {
    for (const DType second : kTypes) {
      test_many(first, second, adafm::kMostLayers + 15);
      test_many_backward(second, first, adafm::kMostLayers + 15, 1 + form % 7);
      for (const Shape& shape : kShapes) {
        test_weight({shape, Layout::kChannelsLast, Layout::kChannelsLast, form, 0}, first, second);
        ++form;
        test_weight({shape, kLayouts[form % 2], kLayouts[form / 2 % 2], form, form % 4 == 3}, first, second);
        ++form;
      }
    }
  }
  for (unsigned needs = 1; needs < 8; ++needs) {
    test_many_backward(DType::kBFloat16, DType::kFloat32, 3 * adafm::kMostLayers, needs);
    for (const Shape& shape : {Shape{6, 24, 1}, Shape{8, 16, 9}, Shape{2, 16, 49}, Shape{3, 8, 16}}) {
      const Case of{shape, Layout::kChannelsLast, Layout::kChannelsLast, 0, 0};
      test_per_sample_backward(of, 3, DType::kBFloat16, DType::kFloat32, needs);
      test_normalized_backward(of, adafm::Group::kChannel, DType::kBFloat16, DType::kFloat32, needs);
    }
  }
  for (const int64_t count : {int64_t{0}, int64_t{1}, adafm::kMostLayers}) {
    test_many(DType::kFloat32, DType::kBFloat16, count);
  }
  for (const Layout layout : kLayouts) {
    const Case of{{8, 16, 9}, layout, layout, 0, 0};
    test_per_sample_backward(of, 0, DType::kBFloat16, DType::kFloat32, 7);
    test_per_sample(of, 40, DType::kFloat32, DType::kBFloat16);
  }
  return finish("results equal the reference, bit for bit");
}
