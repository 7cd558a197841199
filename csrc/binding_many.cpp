// The operators of a whole network: lists of weights, and arenas that are written in place.
#include <initializer_list>

#include "adafm/modulate_many.h"
#include "adafm/step_many.h"
#include "binding.h"

namespace adafm {
namespace {

using namespace binding;

int64_t weights_in(const Shape& shape) { return shape.pairs() * shape.taps; }

// ---- lists of weights ----

void check_count(size_t found, size_t expected, const char* op, const char* name) {
  ADAFM_CHECK(found == expected, op, ": ", name, " holds ", found, " tensors; expected ", expected,
              ", one for each weight");
}

std::string numbered(const char* name, size_t l) { return std::string(name) + "[" + std::to_string(l) + "]"; }

void check_alike(const std::vector<Tensor>& weights, size_t l, const char* op) {
  check_type(weights[l], weights[0].scalar_type(), op, numbered("weights", l).c_str());
  check_same_device(weights[l], weights[0], op, numbered("weights", l).c_str(), "weights[0]");
}

template <class run_t>
std::vector<Tensor> modulate_many(const std::vector<Tensor>& weights, const std::vector<Tensor>& gammas,
                                  const std::vector<Tensor>& betas, ScalarType dtype,
                                  const std::vector<int64_t>& channels_last, run_t&& run) {
  constexpr const char* op = "adafm_compiled::modulate_many";
  check_count(gammas.size(), weights.size(), op, "gammas");
  check_count(betas.size(), weights.size(), op, "betas");
  ADAFM_CHECK(channels_last.size() == weights.size(), op, ": channels_last holds ", channels_last.size(),
              " numbers; expected ", weights.size(), ", one for each weight");
  std::vector<Tensor> outs;
  std::vector<ModulateArgs> layers;
  for (size_t l = 0; l < weights.size(); ++l) {
    const Tensor& weight = weights[l];
    check_alike(weights, l, op);
    ModulateArgs args{};
    args.shape = weight_shape(weight, op);
    args.weight_type = element_type(weight.scalar_type(), op, numbered("weights", l).c_str());
    args.weight_layout = dense_layout(weight, op, numbered("weights", l).c_str());
    args.gamma = parameter_of(gammas[l], weight, op, numbered("gammas", l).c_str());
    args.beta = parameter_of(betas[l], weight, op, numbered("betas", l).c_str());
    args.out_type = element_type(dtype, op, "dtype");
    args.out_layout = channels_last[l] ? Layout::kChannelsLast : Layout::kContiguous;
    outs.push_back(empty_weight(sizes_of(weight), dtype, channels_last[l] != 0, weight, op));
    if (outs[l].numel() != 0) {
      args.weight = weight.const_data_ptr();
      args.out = outs[l].mutable_data_ptr();
      layers.push_back(args);
    }
  }
  if (!layers.empty()) {
    run(layers);
  }
  return outs;
}

// dW of all layers, then dgamma of all, then dbeta of all; what is not asked for is left out.
template <class run_t>
std::vector<Tensor> modulate_many_backward(const std::vector<Tensor>& grads, const std::vector<Tensor>& weights,
                                           const std::vector<Tensor>& gammas, bool need_weight, bool need_gamma,
                                           bool need_beta, run_t&& run) {
  constexpr const char* op = "adafm_compiled::modulate_many_backward";
  check_count(grads.size(), weights.size(), op, "grads");
  check_count(gammas.size(), weights.size(), op, "gammas");
  std::vector<Tensor> grad_weights, grad_gammas, grad_betas;
  std::vector<ModulateBackwardArgs> layers;
  for (size_t l = 0; l < weights.size(); ++l) {
    const Tensor& weight = weights[l];
    const Tensor& grad = grads[l];
    check_alike(weights, l, op);
    ADAFM_CHECK(sizes_of(grad) == sizes_of(weight), op, ": ", numbered("grads", l), " has shape ", shape_text(grad),
                "; expected the weight's shape ", shape_text(weight));
    check_type(grad, grads[0].scalar_type(), op, numbered("grads", l).c_str());
    check_same_device(grad, weight, op, numbered("grads", l).c_str(), "its weight");
    ModulateBackwardArgs args{};
    args.shape = weight_shape(weight, op);
    args.grad_type = element_type(grad.scalar_type(), op, numbered("grads", l).c_str());
    args.grad_layout = dense_layout(grad, op, numbered("grads", l).c_str());
    args.weight_type = element_type(weight.scalar_type(), op, numbered("weights", l).c_str());
    args.weight_layout = dense_layout(weight, op, numbered("weights", l).c_str());
    args.gamma = parameter_of(gammas[l], weight, op, numbered("gammas", l).c_str());
    const std::vector<int64_t> pairs{weight.size(0), weight.size(1)};
    const auto sums = [&] {
      return args.shape.taps == 0 ? torch::stable::new_zeros(weight, pairs, wide_type(weight))
                                  : torch::stable::new_empty(weight, pairs, wide_type(weight));
    };
    if (need_weight) {
      grad_weights.push_back(torch::stable::empty_like(weight));
    }
    if (need_gamma) {
      grad_gammas.push_back(sums());
    }
    if (need_beta) {
      grad_betas.push_back(sums());
    }
    if (weights_in(args.shape) != 0 && (need_weight || need_gamma || need_beta)) {
      args.grad = grad.const_data_ptr();
      args.weight = weight.const_data_ptr();
      args.grad_weight = need_weight ? grad_weights[l].mutable_data_ptr() : nullptr;
      args.grad_gamma = need_gamma ? grad_gammas[l].mutable_data_ptr() : nullptr;
      args.grad_beta = need_beta ? grad_betas[l].mutable_data_ptr() : nullptr;
      layers.push_back(args);
    }
  }
  if (!layers.empty()) {
    run(layers);
  }
  grad_weights.insert(grad_weights.end(), grad_gammas.begin(), grad_gammas.end());
  grad_weights.insert(grad_weights.end(), grad_betas.begin(), grad_betas.end());
  return grad_weights;
}

template <class args_t>
void run_layers_on_cpu(const std::vector<args_t>& layers, int (*kernel)(const args_t*, int64_t, int64_t, int64_t)) {
  int64_t work = 0;
  for (const args_t& layer : layers) {
    work += weights_in(layer.shape);
  }
  run_on_cpu(work, 1, [&](int64_t begin, int64_t end) {
    kernel(layers.data(), static_cast<int64_t>(layers.size()), begin, end);
  });
}

std::vector<Tensor> modulate_many_on_cpu(std::vector<Tensor> weights, std::vector<Tensor> gammas,
                                         std::vector<Tensor> betas, ScalarType dtype,
                                         std::vector<int64_t> channels_last) {
  return modulate_many(weights, gammas, betas, dtype, channels_last,
                       [](const std::vector<ModulateArgs>& layers) { run_layers_on_cpu(layers, &modulate_many_cpu); });
}

std::vector<Tensor> modulate_many_backward_on_cpu(std::vector<Tensor> grads, std::vector<Tensor> weights,
                                                  std::vector<Tensor> gammas, bool need_weight, bool need_gamma,
                                                  bool need_beta) {
  return modulate_many_backward(
      grads, weights, gammas, need_weight, need_gamma, need_beta,
      [](const std::vector<ModulateBackwardArgs>& layers) { run_layers_on_cpu(layers, &modulate_many_backward_cpu); });
}

// ---- arenas ----

// What every arena of a call has in common: the weights' type and device.
struct Home {
  ScalarType type;
  ScalarType wide;
  bool cuda;
  int32_t device;

  explicit Home(const Tensor& weight)
      : type(weight.scalar_type()),
        wide(type == ScalarType::Double ? ScalarType::Double : ScalarType::Float),
        cuda(weight.is_cuda()),
        device(cuda ? weight.get_device_index() : 0) {}
};

int64_t size_of(ScalarType type) { return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2; }

// A checked flat buffer. Each question to a tensor is a call into torch, so none is asked twice.
struct Arena {
  const char* begin = nullptr;
  int64_t count = 0;
  int64_t bytes = 0;
  const char* name = nullptr;

  const void* read() const { return begin; }
  void* write() const { return const_cast<char*>(begin); }
};

// One row (or `rows`) of `type` on the device of the weights.
Arena arena_of(const Tensor& tensor, const Home& home, ScalarType type, int64_t rows, const char* op,
               const char* name) {
  ADAFM_CHECK(tensor.dim() == (rows == 1 ? 1 : 2) && (rows == 1 || tensor.size(0) == rows) && tensor.is_contiguous(),
              op, ": ", name, " has shape ", shape_text(tensor), "; expected a contiguous ",
              rows == 1 ? "one-dimensional tensor" : "tensor [2, pairs]");
  check_type(tensor, type, op, name);
  ADAFM_CHECK(tensor.is_cuda() == home.cuda && (!home.cuda || tensor.get_device_index() == home.device), op, ": ", name,
              " and weight are on different devices");
  const int64_t count = tensor.numel();
  return {static_cast<const char*>(tensor.const_data_ptr()), count, count * size_of(type), name};
}

// No written arena shares memory with another one. Those without a name are not there.
void check_apart(std::initializer_list<Arena> written, std::initializer_list<Arena> read, const char* op) {
  const auto check = [&](const Arena& target, const Arena& other) {
    ADAFM_CHECK(!(target.begin < other.begin + other.bytes && other.begin < target.begin + target.bytes), op, ": ",
                target.name, " shares memory with ", other.name, "; give it memory of its own");
  };
  for (const Arena* target = written.begin(); target != written.end(); ++target) {
    for (const Arena* other = target + 1; target->name != nullptr && other != written.end(); ++other) {
      if (other->name != nullptr) {
        check(*target, *other);
      }
    }
    for (const Arena& other : read) {
      if (target->name != nullptr && other.name != nullptr) {
        check(*target, other);
      }
    }
  }
}

// The table of layers, each inside the arenas and behind the one before it.
struct Layers {
  const ArenaLayer* rows;
  int64_t count;
  int64_t weights = 0;

  Layers(const Tensor& layers, int64_t weight_end, int64_t pair_end, const char* op)
      : rows(static_cast<const ArenaLayer*>(layers.const_data_ptr())), count(layers.dim() == 2 ? layers.size(0) : 0) {
    ADAFM_CHECK(layers.dim() == 2 && layers.size(1) == 6 && layers.is_contiguous() &&
                    layers.scalar_type() == ScalarType::Long && !layers.is_cuda(),
                op, ": layers has shape ", shape_text(layers), " and type ",
                torch::headeronly::toString(layers.scalar_type()),
                "; expected a contiguous int64 tensor [L, 6] on the CPU");
    int64_t weight = 0, pair = 0;
    for (int64_t l = 0; l < count; ++l) {
      const ArenaLayer& row = rows[l];
      ADAFM_CHECK(row.out_channels >= 0 && row.in_channels >= 0 && row.taps >= 1, op, ": layers[", l,
                  "] has the sizes ", row.out_channels, ", ", row.in_channels, ", ", row.taps,
                  "; expected O and I of at least 0, taps of at least 1");
      ADAFM_CHECK(row.weight % 8 == 0 && row.pair % 8 == 0 && row.weight >= weight && row.pair >= pair, op, ": layers[",
                  l, "] begins at weight ", row.weight, " and pair ", row.pair,
                  "; expected multiples of 8 behind the layer before, ", weight, " and ", pair);
      // Sizes are compared by division: the product of any three numbers need not fit.
      const auto at_most = [](int64_t a, int64_t b, int64_t limit) { return b == 0 || a <= limit / b; };
      const bool fits = row.weight <= weight_end && row.pair <= pair_end &&
                        at_most(row.out_channels, row.in_channels, pair_end - row.pair) &&
                        at_most(row.out_channels * row.in_channels, row.taps, weight_end - row.weight);
      ADAFM_CHECK(fits, op, ": layers[", l, "] has ", row.out_channels, " x ", row.in_channels, " pairs of ", row.taps,
                  " weights at weight ", row.weight, " and pair ", row.pair, "; the arenas end at ", weight_end,
                  " and ", pair_end);
      const int64_t pairs = row.out_channels * row.in_channels;
      weight = row.weight + pairs * row.taps;
      pair = row.pair + pairs;
      weights += pairs * row.taps;
    }
  }
};

#if ADAFM_WITH_CUDA
// The tiles of a CUDA launch.
const Tile* tiles_of(const std::optional<Tensor>& tiles, const Tensor& weight, const char* op) {
  ADAFM_CHECK(tiles.has_value(), op,
              ": tiles is missing; on CUDA tensors it holds the layout of the launch, "
              "made by adafm_kernels._C.plan_tiles");
  ADAFM_CHECK(
      tiles->dim() == 2 && tiles->size(1) == 4 && tiles->is_contiguous() && tiles->scalar_type() == ScalarType::Int, op,
      ": tiles has shape ", shape_text(*tiles), "; expected a contiguous int32 tensor [T, 4]");
  check_same_device(*tiles, weight, op, "tiles", "weight");
  return static_cast<const Tile*>(tiles->const_data_ptr());
}
#endif

template <class args_t>
void run_arena(args_t& args, const Layers& layers, const std::optional<Tensor>& tiles, const Tensor& weight,
               const char* op, int (*cpu)(const args_t&, int64_t, int64_t), LaunchOf<args_t> cuda) {
  args.layers = layers.rows;
  args.layer_count = layers.count;
  if (!weight.is_cuda()) {
    run_on_cpu(layers.weights, 1, [&](int64_t begin, int64_t end) { cpu(args, begin, end); });
    return;
  }
#if ADAFM_WITH_CUDA
  args.tiles = tiles_of(tiles, weight, op);
  args.tile_count = tiles->size(0);
  run_on_cuda(weight, op, [&](void* stream) { return cuda(args, stream); });
#else
  (void)tiles, (void)cuda;
  fail(op, ": the weight is on a CUDA device, but the library was built without CUDA");
#endif
}

void modulate_many_out(Tensor weight, Tensor gamma, Tensor beta, Tensor layers, std::optional<Tensor> tiles,
                       Tensor out) {
  constexpr const char* op = "adafm_compiled::modulate_many_out";
  const Home home(weight);
  const ScalarType out_type = out.scalar_type();
  ModulateArenaArgs args{};
  args.weight_type = element_type(home.type, op, "weight");
  args.out_type = element_type(out_type, op, "out");
  const Arena weights = arena_of(weight, home, home.type, 1, op, "weight");
  const Arena gammas = arena_of(gamma, home, home.wide, 1, op, "gamma");
  const Arena betas = arena_of(beta, home, home.wide, 1, op, "beta");
  const Arena outs = arena_of(out, home, out_type, 1, op, "out");
  const Layers table(layers, std::min(weights.count, outs.count), std::min(gammas.count, betas.count), op);
  check_apart({outs}, {weights, gammas, betas}, op);
  args.weight = weights.read();
  args.gamma = gammas.read();
  args.beta = betas.read();
  args.out = outs.write();
  run_arena(args, table, tiles, weight, op, &modulate_arena_cpu, ADAFM_CUDA_OR_NULL(modulate_arena_cuda));
}

void modulate_many_backward_out(Tensor grad, Tensor weight, std::optional<Tensor> gamma, Tensor layers,
                                std::optional<Tensor> tiles, std::optional<Tensor> grad_weight,
                                std::optional<Tensor> grad_gamma, std::optional<Tensor> grad_beta) {
  constexpr const char* op = "adafm_compiled::modulate_many_backward_out";
  const Home home(weight);
  const ScalarType grad_type = grad.scalar_type();
  ModulateBackwardArenaArgs args{};
  args.grad_type = element_type(grad_type, op, "grad");
  args.weight_type = element_type(home.type, op, "weight");
  const Arena weights = arena_of(weight, home, home.type, 1, op, "weight");
  const Arena grads = arena_of(grad, home, grad_type, 1, op, "grad");
  int64_t weight_end = std::min(weights.count, grads.count), pair_end = INT64_MAX;
  const auto pairs = [&](const std::optional<Tensor>& tensor, const char* name) {
    if (!tensor.has_value()) {
      return Arena{};
    }
    const Arena arena = arena_of(*tensor, home, home.wide, 1, op, name);
    pair_end = std::min(pair_end, arena.count);
    return arena;
  };
  const Arena gammas = pairs(gamma, "gamma");
  const Arena grad_gammas = pairs(grad_gamma, "grad_gamma");
  const Arena grad_betas = pairs(grad_beta, "grad_beta");
  Arena grad_weights{};
  if (grad_weight.has_value()) {
    ADAFM_CHECK(gamma.has_value(), op, ": gamma is missing, and grad_weight = gamma * grad needs it");
    grad_weights = arena_of(*grad_weight, home, home.type, 1, op, "grad_weight");
    weight_end = std::min(weight_end, grad_weights.count);
  }
  const Layers table(layers, weight_end, pair_end, op);
  check_apart({grad_gammas, grad_betas, grad_weights}, {grads, weights, gammas}, op);
  if (!grad_gamma.has_value() && !grad_beta.has_value() && !grad_weight.has_value()) {
    return;
  }
  args.grad = grads.read();
  args.weight = weights.read();
  args.gamma = gammas.read();
  args.grad_weight = grad_weights.write();
  args.grad_gamma = grad_gammas.write();
  args.grad_beta = grad_betas.write();
  run_arena(args, table, tiles, weight, op, &modulate_backward_arena_cpu,
            ADAFM_CUDA_OR_NULL(modulate_backward_arena_cuda));
}

void step_many(Tensor grad, Tensor weight, Tensor layers, std::optional<Tensor> tiles, Tensor hyper, Tensor parameters,
               Tensor exp_avg, Tensor exp_avg_sq, std::optional<Tensor> average, std::optional<Tensor> out) {
  constexpr const char* op = "adafm_compiled::step_many";
  const Home home(weight);
  const ScalarType grad_type = grad.scalar_type();
  StepManyArgs args{};
  args.grad_type = element_type(grad_type, op, "grad");
  args.weight_type = element_type(home.type, op, "weight");
  const Arena weights = arena_of(weight, home, home.type, 1, op, "weight");
  const Arena grads = arena_of(grad, home, grad_type, 1, op, "grad");
  const Arena hypers = arena_of(hyper, home, home.wide, 1, op, "hyper");
  ADAFM_CHECK(hypers.count == 8, op, ": hyper has shape ", shape_text(hyper), "; expected [8]");
  int64_t weight_end = std::min(weights.count, grads.count);
  const Arena values = arena_of(parameters, home, home.wide, 2, op, "parameters");
  const auto state = [&](const Tensor& tensor, const char* name) {
    const Arena arena = arena_of(tensor, home, home.wide, 2, op, name);
    ADAFM_CHECK(arena.count == values.count, op, ": ", name, " has shape ", shape_text(tensor),
                "; expected that of parameters, ", shape_text(parameters));
    return arena;
  };
  const Arena moments = state(exp_avg, "exp_avg"), squares = state(exp_avg_sq, "exp_avg_sq");
  const Arena averages = average.has_value() ? state(*average, "average") : Arena{};
  args.out_type = args.weight_type;
  Arena outs{};
  if (out.has_value()) {
    const ScalarType out_type = out->scalar_type();
    args.out_type = element_type(out_type, op, "out");
    outs = arena_of(*out, home, out_type, 1, op, "out");
    weight_end = std::min(weight_end, outs.count);
  }
  const Layers table(layers, weight_end, values.count / 2, op);
  check_apart({values, moments, squares, averages, outs}, {grads, weights, hypers}, op);
  args.grad = grads.read();
  args.weight = weights.read();
  args.hyper = hypers.read();
  args.parameters = values.write();
  args.exp_avg = moments.write();
  args.exp_avg_sq = squares.write();
  args.average = averages.write();
  args.stride = values.count / 2;
  args.out = outs.write();
  run_arena(args, table, tiles, weight, op, &step_many_cpu, ADAFM_CUDA_OR_NULL(step_many_cuda));
}

#if ADAFM_WITH_CUDA
std::vector<Tensor> modulate_many_on_cuda(std::vector<Tensor> weights, std::vector<Tensor> gammas,
                                          std::vector<Tensor> betas, ScalarType dtype,
                                          std::vector<int64_t> channels_last) {
  return modulate_many(weights, gammas, betas, dtype, channels_last, [&](const std::vector<ModulateArgs>& layers) {
    run_on_cuda(weights[0], "adafm_compiled::modulate_many", [&](void* stream) {
      return modulate_many_cuda(layers.data(), static_cast<int64_t>(layers.size()), stream);
    });
  });
}

std::vector<Tensor> modulate_many_backward_on_cuda(std::vector<Tensor> grads, std::vector<Tensor> weights,
                                                   std::vector<Tensor> gammas, bool need_weight, bool need_gamma,
                                                   bool need_beta) {
  return modulate_many_backward(
      grads, weights, gammas, need_weight, need_gamma, need_beta, [&](const std::vector<ModulateBackwardArgs>& layers) {
        run_on_cuda(weights[0], "adafm_compiled::modulate_many_backward", [&](void* stream) {
          return modulate_many_backward_cuda(layers.data(), static_cast<int64_t>(layers.size()), stream);
        });
      });
}
#endif

}  // namespace
}  // namespace adafm

STABLE_TORCH_LIBRARY_IMPL(adafm_compiled, CPU, m) {
  m.impl("modulate_many", TORCH_BOX(&adafm::modulate_many_on_cpu));
  m.impl("modulate_many_backward", TORCH_BOX(&adafm::modulate_many_backward_on_cpu));
  m.impl("modulate_many_out", TORCH_BOX(&adafm::modulate_many_out));
  m.impl("modulate_many_backward_out", TORCH_BOX(&adafm::modulate_many_backward_out));
  m.impl("step_many", TORCH_BOX(&adafm::step_many));
}

#if ADAFM_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(adafm_compiled, CUDA, m) {
  m.impl("modulate_many", TORCH_BOX(&adafm::modulate_many_on_cuda));
  m.impl("modulate_many_backward", TORCH_BOX(&adafm::modulate_many_backward_on_cuda));
  m.impl("modulate_many_out", TORCH_BOX(&adafm::modulate_many_out));
  m.impl("modulate_many_backward_out", TORCH_BOX(&adafm::modulate_many_backward_out));
  m.impl("step_many", TORCH_BOX(&adafm::step_many));
}
#endif
