// Addresses beyond 2^31 and 2^32 elements, in memory that is only reserved: the emulated CUDA kernels run on tiles and
// blocks at the ends of arenas and weights, and only those pages are ever touched.
#include <sys/mman.h>

#include "emulated.h"
#include "planner.h"

namespace {

using namespace emulated;

constexpr int kSkipped = 77;

class Reserved {
 public:
  Reserved(DType type, int64_t n) : type_(type), bytes_(static_cast<size_t>(n * reference::size_of(type))) {
    memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory_ == MAP_FAILED) {
      std::printf("skipped: this system does not reserve %zu bytes of addresses\n", bytes_);
      std::exit(kSkipped);
    }
  }
  ~Reserved() { munmap(memory_, bytes_); }
  Reserved(const Reserved&) = delete;
  Reserved& operator=(const Reserved&) = delete;

  void* data() { return memory_; }
  void* at(int64_t element) { return static_cast<char*>(memory_) + element * reference::size_of(type_); }
  double read(int64_t element) { return reference::read(memory_, type_, element); }
  // Small whole numbers: products of them are exact in every type.
  void set(int64_t element) { reference::write(memory_, type_, element, static_cast<double>(element % 13 - 6)); }

 private:
  DType type_;
  size_t bytes_;
  void* memory_;
};

constexpr DType kWeight = DType::kBFloat16, kPair = DType::kFloat32;
constexpr int64_t kEnd = int64_t{1} << 35;

// A tile's weights and pairs by the definition in arena.h.
template <class visit_t>
void each_pair(const ArenaLayer& layer, const Tile& tile, visit_t&& visit) {
  const int64_t unit = (tile.count & adafm::kTileScalar) != 0 ? 1 : 8;
  for (int64_t v = 0; v < (tile.count & adafm::kCountMask) * unit; ++v) {
    const int64_t pair = int64_t{tile.pair} * 8 + v - layer.pair;
    const int64_t o = pair / layer.in_channels, i = pair % layer.in_channels;
    visit(layer.pair + pair, layer.weight + o * layer.taps * layer.in_channels + i);
  }
}

void test_arena(const ArenaLayer& layer) {
  const std::vector<Tile> all = adafm::plan_tiles({layer});
  const std::vector<Tile> tiles = {all.front(), all.back()};
  Reserved weight(kWeight, kEnd), grad(kWeight, kEnd), out(kWeight, kEnd);
  Reserved gamma(kPair, kEnd), beta(kPair, kEnd), grad_gamma(kPair, kEnd), grad_beta(kPair, kEnd);
  for (const Tile& tile : tiles) {
    each_pair(layer, tile, [&](int64_t pair, int64_t first) {
      gamma.set(pair), beta.set(pair);
      for (int64_t t = 0; t < layer.taps; ++t) {
        weight.set(first + t * layer.in_channels), grad.set(first + t * layer.in_channels);
      }
    });
  }
  const int64_t count = static_cast<int64_t>(tiles.size());
  expect_ok(adafm::modulate_arena_cuda({nullptr, 0, tiles.data(), count, weight.data(), kWeight, gamma.data(),
                                        beta.data(), out.data(), kWeight},
                                       nullptr),
            "modulate_arena_cuda");
  expect_ok(adafm::modulate_backward_arena_cuda({nullptr, 0, tiles.data(), count, grad.data(), kWeight, weight.data(),
                                                 kWeight, nullptr, nullptr, grad_gamma.data(), grad_beta.data()},
                                                nullptr),
            "modulate_backward_arena_cuda");
  for (const Tile& tile : tiles) {
    each_pair(layer, tile, [&](int64_t pair, int64_t first) {
      double sum_gamma = 0, sum_beta = 0;
      for (int64_t t = 0; t < layer.taps; ++t) {
        const int64_t e = first + t * layer.in_channels;
        expect(out.read(e) == gamma.read(pair) * weight.read(e) + beta.read(pair), "far modulate_arena_cuda");
        sum_gamma += grad.read(e) * weight.read(e), sum_beta += grad.read(e);
      }
      expect(grad_gamma.read(pair) == sum_gamma && grad_beta.read(pair) == sum_beta,
             "far modulate_backward_arena_cuda");
    });
  }
}

// `parameters` and its like are two rows of `stride`: the second begins far out.
void test_step() {
  const int64_t stride = kEnd / 2;
  const ArenaLayer layer{kEnd - 9 * 64, stride - 64, 8, 8, 9, 0};
  const std::vector<Tile> tiles = adafm::plan_tiles({layer});
  Reserved weight(kWeight, kEnd), grad(kWeight, kEnd), out(kWeight, kEnd);
  Reserved parameters(kPair, kEnd), exp_avg(kPair, kEnd), exp_avg_sq(kPair, kEnd);
  for (int64_t e = layer.weight; e < kEnd; ++e) {
    weight.set(e), grad.set(e);
  }
  // lr 1, no momentum, eps 1: p = p - d / (|d| + 1).
  const float hyper[8] = {1, 0, 0, 1, 1, 1, 0, 0};
  expect_ok(adafm::step_many_cuda({nullptr, 0, tiles.data(), static_cast<int64_t>(tiles.size()), grad.data(), kWeight,
                                   weight.data(), kWeight, hyper, parameters.data(), exp_avg.data(), exp_avg_sq.data(),
                                   nullptr, stride, out.data(), kWeight},
                                  nullptr),
            "step_many_cuda");
  each_pair(layer, tiles[0], [&](int64_t pair, int64_t first) {
    float sum_gamma = 0, sum_beta = 0;
    for (int64_t t = 0; t < 9; ++t) {
      const float g = static_cast<float>(grad.read(first + t * 8));
      sum_gamma += g * static_cast<float>(weight.read(first + t * 8)), sum_beta += g;
    }
    expect(exp_avg.read(pair) == sum_gamma && exp_avg.read(stride + pair) == sum_beta, "far step_many_cuda, exp_avg");
    expect(parameters.read(pair) == -sum_gamma / (std::fabs(sum_gamma) + 1) &&
               parameters.read(stride + pair) == -sum_beta / (std::fabs(sum_beta) + 1),
           "far step_many_cuda, parameters");
  });
}

// The first and last pairs of a channels-last weight; only the first and last blocks run.
void test_modulate(const Shape& shape, bool many) {
  const int64_t n = shape.pairs() * shape.taps, last = shape.out_channels - 1, filter = shape.in_channels * shape.taps;
  Reserved weight(kWeight, n), out(kWeight, n);
  Tensor gamma(kPair, shape.in_channels), beta(kPair, shape.in_channels);
  for (int64_t i = 0; i < shape.in_channels; ++i) {
    reference::write(gamma.data(), kPair, i, static_cast<double>(i % 7 - 3));
    reference::write(beta.data(), kPair, i, static_cast<double>(i % 5 - 2));
  }
  const adafm::ModulateArgs args{shape,
                                 weight.data(),
                                 kWeight,
                                 Layout::kChannelsLast,
                                 {gamma.data(), 0, 1},
                                 {beta.data(), 0, 1},
                                 out.data(),
                                 kWeight,
                                 Layout::kChannelsLast};
  const int64_t some = 128;  // pairs of one block's threads, or fewer than those of its vectors
  for (int64_t t = 0; t < shape.taps; ++t) {
    for (int64_t i = 0; i < some; ++i) {
      weight.set(t * shape.in_channels + i), weight.set(last * filter + (t + 1) * shape.in_channels - 1 - i);
    }
  }
  emulation::chosen_blocks = {0, -1};
  expect_ok(many ? adafm::modulate_many_cuda(&args, 1, nullptr) : adafm::modulate_cuda(args, nullptr), "modulate_cuda");
  emulation::chosen_blocks.clear();
  for (int64_t t = 0; t < shape.taps; ++t) {
    for (int64_t k = 0; k < some; ++k) {
      for (const int64_t o : {int64_t{0}, last}) {
        const int64_t i = o == 0 ? k : shape.in_channels - 1 - k, e = o * filter + t * shape.in_channels + i;
        const double expected =
            reference::read(gamma.data(), kPair, i) * weight.read(e) + reference::read(beta.data(), kPair, i);
        expect(out.read(e) == expected, "far modulate_cuda", shape);
      }
    }
  }
}

// Samples of a small weight lie beyond 2^32 elements.
void test_per_sample() {
  const Shape shape{64, 1024, 9};
  const int64_t n = shape.pairs() * shape.taps, samples = (int64_t{1} << 32) / n + 2;
  Reserved weight(kWeight, n), out(kWeight, samples * n);
  Tensor gamma(kPair, 8);
  gamma.random();
  for (int64_t e = 0; e < n; ++e) {
    weight.set(e);
  }
  emulation::chosen_blocks = {-1};
  expect_ok(adafm::modulate_per_sample_cuda({samples,
                                             shape,
                                             weight.data(),
                                             kWeight,
                                             Layout::kChannelsLast,
                                             {gamma.data(), 0, 0, 0},
                                             {gamma.data(), 0, 0, 0},
                                             out.data(),
                                             kWeight,
                                             Layout::kChannelsLast},
                                            nullptr),
            "modulate_per_sample_cuda");
  emulation::chosen_blocks.clear();
  int64_t found = 0;
  const float factor = static_cast<float>(reference::read(gamma.data(), kPair, 0));
  for (int64_t s = samples - 16; s < samples; ++s) {
    const double expected = reference::widen(
        reference::narrow(double{std::fma(factor, static_cast<float>(weight.read(n - 1)), factor)}, reference::kBFloat),
        reference::kBFloat);
    found += out.read((s + 1) * n - 1) == expected;
  }
  expect(found == 1, "far modulate_per_sample_cuda: the last block takes every sixteenth sample");
}

}  // namespace

int main() {
  const int64_t size = 9 * 64 * 64;
  test_arena({kEnd - size, kEnd - 64 * 64, 64, 64, 9, 0});
  test_arena({kEnd - 9 * 56 - 8, kEnd - 56, 8, 7, 9, 0});
  test_arena({0, 0, int64_t{1} << 17, 4096, 64, 0});  // 2^35 weights, 2^29 pairs
  test_arena({0, 0, int64_t{1} << 20, 2049, 15, 0});  // scalar tiles
  test_arena({8, 8, 3, 524280, 8200, 0});             // pieces of filters of more than 2^32 weights
  test_step();
  test_modulate({1 << 14, 1 << 14, 16}, false);  // 2^32 weights: pair by pair
  test_modulate({1 << 14, 1 << 14, 15}, false);  // vectors, unsigned numbers
  test_modulate({1 << 14, 1 << 14, 7}, true);    // the most that a table takes
  test_modulate({1 << 14, 1 << 14, 9}, true);    // a launch of its own
  test_per_sample();
  return finish("results at far addresses are right");
}
