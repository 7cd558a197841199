// The CUDA kernels over arenas, emulated, against the reference, bit for bit: every pair of element types, odd and
// large layers, arenas that break alignment, every choice of outputs, and no byte written outside a layer. And the
// planner.
#include <stdexcept>

#include "emulated.h"
#include "planner.h"

namespace {

using namespace emulated;

// A network with gaps between its layers.
struct Network {
  std::vector<ArenaLayer> layers;
  device::Vector<Tile> tiles;
  int64_t weights = 16, pairs = 8;

  explicit Network(const std::vector<Shape>& shapes) {
    int64_t flags = 0;
    for (const Shape& shape : shapes) {
      layers.push_back({weights, pairs, shape.out_channels, shape.in_channels, shape.taps, flags++ % 4});
      weights += (shape.pairs() * shape.taps + 7) / 8 * 8 + 8;
      pairs += (shape.pairs() + 7) / 8 * 8 + 8;
    }
    const std::vector<Tile> planned = adafm::plan_tiles(layers);
    tiles.assign(planned.begin(), planned.end());
  }

  int64_t layer_count() const { return static_cast<int64_t>(layers.size()); }
  int64_t tile_count() const { return static_cast<int64_t>(tiles.size()); }
};

void test_modulate(const Network& net, DType weight_type, DType out_type, int64_t shift) {
  const DType type = adafm::compute_type(weight_type);
  Tensor weight(weight_type, net.weights, shift), gamma(type, net.pairs), beta(type, net.pairs);
  Tensor expected(out_type, net.weights, shift), actual(out_type, net.weights, shift);
  adafm::ModulateArenaArgs args{net.layers.data(),      net.layer_count(), net.tiles.data(),      net.tile_count(),
                                weight.random().data(), weight_type,       gamma.random().data(), beta.random().data(),
                                expected.data(),        out_type};
  reference::modulate_arena(args);
  args.layers = nullptr;
  args.out = actual.data();
  expect_ok(adafm::modulate_arena_cuda(args, nullptr), "modulate_arena_cuda");
  expect_same(actual, expected, "modulate_arena_cuda", {});
}

void test_backward(const Network& net, DType grad_type, DType weight_type, int64_t shift, unsigned needs) {
  const DType type = adafm::compute_type(weight_type);
  Tensor grad(grad_type, net.weights), weight(weight_type, net.weights, shift), gamma(type, net.pairs);
  struct Results {
    Tensor weight, gamma, beta;
  };
  Results expected{{weight_type, net.weights, shift}, {type, net.pairs}, {type, net.pairs}};
  Results actual{{weight_type, net.weights, shift}, {type, net.pairs}, {type, net.pairs}};
  const auto args = [&](Results& to) -> adafm::ModulateBackwardArenaArgs {
    return {net.layers.data(),
            net.layer_count(),
            net.tiles.data(),
            net.tile_count(),
            grad.data(),
            grad_type,
            wanted(needs, 2, weight),
            weight_type,
            wanted(needs, 1, gamma),
            wanted(needs, 1, to.weight),
            wanted(needs, 2, to.gamma),
            wanted(needs, 4, to.beta)};
  };
  grad.random(), weight.random(), gamma.random();
  reference::modulate_backward_arena(args(expected));
  expect_ok(adafm::modulate_backward_arena_cuda(args(actual), nullptr), "modulate_backward_arena_cuda");
  expect_same(actual.weight, expected.weight, "modulate_backward_arena_cuda, dW", {});
  expect_same(actual.gamma, expected.gamma, "modulate_backward_arena_cuda, dgamma", {});
  expect_same(actual.beta, expected.beta, "modulate_backward_arena_cuda, dbeta", {});
}

void test_step(const Network& net, DType grad_type, DType weight_type, DType out_type, int64_t shift, bool average,
               bool out) {
  const DType type = adafm::compute_type(weight_type);
  const int64_t stride = net.pairs + (shift ? 1 : 0);
  Tensor grad(grad_type, net.weights, shift), weight(weight_type, net.weights), hyper(type, 8);
  struct Results {
    Tensor parameters, exp_avg, exp_avg_sq, average, out;
  };
  const auto results = [&]() -> Results {
    return {
        {type, 2 * stride}, {type, 2 * stride}, {type, 2 * stride}, {type, 2 * stride}, {out_type, net.weights, shift}};
  };
  Results expected = results(), actual = results();
  const auto args = [&](Results& to) -> adafm::StepManyArgs {
    return {net.layers.data(),
            net.layer_count(),
            net.tiles.data(),
            net.tile_count(),
            grad.data(),
            grad_type,
            weight.data(),
            weight_type,
            hyper.data(),
            to.parameters.data(),
            to.exp_avg.data(),
            to.exp_avg_sq.data(),
            average ? to.average.data() : nullptr,
            stride,
            out ? to.out.data() : nullptr,
            out_type};
  };
  const double numbers[] = {0.05, 0.5, 0.99, 1e-8, 1 / (1 - 0.125), 1 / (1 - 0.970299), 0.99, 0};
  for (int k = 0; k < 8; ++k) {
    reference::write(hyper.data(), type, k, numbers[k]);
  }
  grad.random(), weight.random();
  actual.parameters = expected.parameters.random();
  actual.exp_avg = expected.exp_avg.random();
  actual.exp_avg_sq = expected.exp_avg_sq.positive();
  actual.average = expected.average.random();
  reference::step_many(args(expected));
  expect_ok(adafm::step_many_cuda(args(actual), nullptr), "step_many_cuda");
  expect_same(actual.parameters, expected.parameters, "step_many_cuda, parameters", {});
  expect_same(actual.exp_avg, expected.exp_avg, "step_many_cuda, exp_avg", {});
  expect_same(actual.exp_avg_sq, expected.exp_avg_sq, "step_many_cuda, exp_avg_sq", {});
  expect_same(actual.average, expected.average, "step_many_cuda, average", {});
  expect_same(actual.out, expected.out, "step_many_cuda, out", {});
}

// Every pair of a layer is in one tile, in order, and tiles keep their promises.
void test_plan(const ArenaLayer& layer) {
  const std::vector<Tile> tiles = adafm::plan_tiles({layer});
  int64_t next = 0;
  for (const Tile& tile : tiles) {
    const bool scalar = (tile.count & adafm::kTileScalar) != 0;
    const int64_t unit = scalar ? 1 : 8, count = (tile.count & adafm::kCountMask) * unit;
    const int64_t row = (tile.shape & 0xffff) * unit, taps = tile.shape >> 16;
    const int64_t pair = int64_t{tile.pair} * 8 - layer.pair, o = pair / row, i = pair % row;
    expect(scalar == (layer.in_channels % 8 != 0) && row == layer.in_channels && taps == layer.taps, "tile: shape");
    expect(pair == next, "tile: not behind the last one");
    expect(int64_t{tile.weight} * 8 == layer.weight + o * taps * row + i, "tile: weight offset");
    expect(count > 0 && (scalar || count <= 8 * int64_t{adafm::kTileVectors}), "tile: size");
    expect(i == 0 ? count % row == 0 || (!scalar && count < row) : i + count <= row, "tile: not whole filters");
    expect(!scalar || o % 8 == 0, "scalar tile: does not begin at a multiple of 8 filters");
    expect(((tile.count & adafm::kTileFixedGamma) != 0) == ((layer.flags & adafm::kFixedGamma) != 0) &&
               ((tile.count & adafm::kTileFixedBeta) != 0) == ((layer.flags & adafm::kFixedBeta) != 0),
           "tile: flags");
    next += count;
  }
  const Shape shape = reference::shape_of(layer);
  expect(next == (shape.taps == 0 ? 0 : shape.pairs()), "tiles do not cover the layer", shape);
}

void expect_refused(const ArenaLayer& layer, const std::string& part) {
  try {
    adafm::plan_tiles({{0, 0, 1, 8, 1, 0}, layer});
  } catch (const std::invalid_argument& error) {
    const std::string what = error.what();
    expect(what.find("layer 1: ") == 0 && what.find(part) != std::string::npos, "planner says: " + what);
    return;
  }
  expect(false, "the planner takes a layer with bad " + part);
}

void test_planner() {
  std::uniform_int_distribution<int64_t> filters(0, 300), channels(0, 160), taps(0, 49), kind(0, 3);
  for (int k = 0; k < 3000; ++k) {
    const int64_t in_channels =
        kind(tests::random_engine) == 0 ? channels(tests::random_engine) : 8 * channels(tests::random_engine);
    test_plan({8 * channels(tests::random_engine), 8 * filters(tests::random_engine), filters(tests::random_engine),
               in_channels, taps(tests::random_engine), kind(tests::random_engine)});
  }
  const int64_t end = int64_t{1} << 35;
  test_plan({end - 65535 * 64, end - 64, 8, 8, 65535, 3});
  test_plan({0, 0, 2, 524280, 2, 0});
  test_plan({0, 0, 9, 65535, 2, 0});
  expect_refused({4, 0, 8, 8, 9, 0}, "weight offset 4 is not a multiple of 8");
  expect_refused({0, 12, 8, 8, 9, 0}, "pair offset 12 is not a multiple of 8");
  expect_refused({-8, 0, 8, 8, 9, 0}, "weight offset -8");
  expect_refused({end, 0, 8, 8, 9, 0}, "beyond 2^35");
  expect_refused({end - 568, 0, 8, 8, 9, 0}, "beyond 2^35");
  expect_refused({0, end - 56, 8, 8, 9, 0}, "beyond 2^35");
  expect_refused({0, 0, int64_t{1} << 40, int64_t{1} << 40, 1, 0}, "2^35");
  expect_refused({0, 0, 1, 65537, 1, 0}, "I is 65537");
  expect_refused({0, 0, 1, 524288, 1, 0}, "I is 524288");
  expect_refused({0, 0, 1, 8, 65536, 0}, "taps are 65536");
  expect_refused({0, 0, -1, 8, 9, 0}, "O is -1");
  expect_refused({0, 0, 1, -8, 9, 0}, "I is -8");
  expect_refused({0, 0, 1, 8, -9, 0}, "taps is -9");
  expect_refused({0, 0, 1, 8, 9, 4}, "flags are 4");
  expect(adafm::plan_tiles({}).empty() && adafm::plan_tiles({{0, 0, 0, 8, 9, 0}, {0, 0, 8, 0, 9, 0}}).empty(),
         "layers without weights have tiles");
}

}  // namespace

int main() {
  test_planner();
  const Network net({{8, 16, 9},
                     {5, 8, 1},
                     {3, 24, 16},
                     {2, 7, 9},
                     {18, 3, 9},
                     {1, 2048, 1},
                     {2, 1032, 9},
                     {9, 8, 49},
                     {0, 8, 9},
                     {130, 8, 4},
                     {450, 5, 1},
                     {1, 1, 1},
                     {7, 1, 9},
                     {3, 40, 2},
                     {2, 16, 3}});
  for (const DType first : kTypes) {
    for (const DType second : kTypes) {
      for (const int64_t shift : {0, 1}) {
        test_modulate(net, first, second, shift);
        for (unsigned needs = 1; needs < 8; ++needs) {
          test_backward(net, first, second, shift, needs);
        }
        for (const bool average : {false, true}) {
          test_step(net, first, second, first, shift, average, true);
          test_step(net, first, second, DType::kFloat32, shift, average, !average);
        }
      }
    }
  }
  const Network empty({});
  test_modulate(empty, DType::kFloat32, DType::kBFloat16, 0);
  test_backward(empty, DType::kBFloat16, DType::kFloat32, 0, 7);
  test_step(empty, DType::kBFloat16, DType::kFloat32, DType::kBFloat16, 0, true, true);
  return finish("results equal the reference, bit for bit");
}
