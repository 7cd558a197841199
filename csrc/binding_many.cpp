// The operators of a whole network: lists of weights, and arenas that are written in place.
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

// A flat buffer: one row of `type` on the device of `like`.
void check_arena(const Tensor& arena, const Tensor& like, ScalarType type, int64_t rows, const char* op,
                 const char* name) {
  ADAFM_CHECK(arena.dim() == (rows == 1 ? 1 : 2) && (rows == 1 || arena.size(0) == rows) && arena.is_contiguous(), op,
              ": ", name, " has shape ", shape_text(arena), "; expected a contiguous ",
              rows == 1 ? "one-dimensional tensor" : "tensor [2, pairs]");
  check_type(arena, type, op, name);
  check_same_device(arena, like, op, name, "weight");
}

bool overlap(const Tensor& a, const Tensor& b, int64_t size_a, int64_t size_b) {
  const char* first = static_cast<const char*>(a.const_data_ptr());
  const char* second = static_cast<const char*>(b.const_data_ptr());
  return first < second + b.numel() * size_b && second < first + a.numel() * size_a;
}

int64_t element_size(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
}

struct Named {
  const Tensor* tensor;
  const char* name;
};

// No written tensor shares memory with another one.
void check_apart(const std::vector<Named>& written, const std::vector<Named>& read, const char* op) {
  for (size_t w = 0; w < written.size(); ++w) {
    const Named& target = written[w];
    const auto against = [&](const Named& other) {
      ADAFM_CHECK(!overlap(*target.tensor, *other.tensor, element_size(*target.tensor), element_size(*other.tensor)),
                  op, ": ", target.name, " shares memory with ", other.name, "; give it memory of its own");
    };
    for (size_t v = w + 1; v < written.size(); ++v) {
      against(written[v]);
    }
    for (const Named& source : read) {
      against(source);
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

const void* read_pointer(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}
void* write_pointer(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->mutable_data_ptr() : nullptr;
}

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
  ModulateArenaArgs args{};
  args.weight_type = element_type(weight.scalar_type(), op, "weight");
  args.out_type = element_type(out.scalar_type(), op, "out");
  check_arena(weight, weight, weight.scalar_type(), 1, op, "weight");
  check_arena(gamma, weight, wide_type(weight), 1, op, "gamma");
  check_arena(beta, weight, wide_type(weight), 1, op, "beta");
  check_arena(out, weight, out.scalar_type(), 1, op, "out");
  const Layers table(layers, std::min(weight.numel(), out.numel()), std::min(gamma.numel(), beta.numel()), op);
  check_apart({{&out, "out"}}, {{&weight, "weight"}, {&gamma, "gamma"}, {&beta, "beta"}}, op);
  args.weight = weight.const_data_ptr();
  args.gamma = gamma.const_data_ptr();
  args.beta = beta.const_data_ptr();
  args.out = out.mutable_data_ptr();
  run_arena(args, table, tiles, weight, op, &modulate_arena_cpu, ADAFM_CUDA_OR_NULL(modulate_arena_cuda));
}

void modulate_many_backward_out(Tensor grad, Tensor weight, std::optional<Tensor> gamma, Tensor layers,
                                std::optional<Tensor> tiles, std::optional<Tensor> grad_weight,
                                std::optional<Tensor> grad_gamma, std::optional<Tensor> grad_beta) {
  constexpr const char* op = "adafm_compiled::modulate_many_backward_out";
  ModulateBackwardArenaArgs args{};
  args.grad_type = element_type(grad.scalar_type(), op, "grad");
  args.weight_type = element_type(weight.scalar_type(), op, "weight");
  check_arena(weight, weight, weight.scalar_type(), 1, op, "weight");
  check_arena(grad, weight, grad.scalar_type(), 1, op, "grad");
  int64_t weight_end = std::min(weight.numel(), grad.numel()), pair_end = INT64_MAX;
  std::vector<Named> written, read{{&grad, "grad"}, {&weight, "weight"}};
  const auto pairs = [&](const std::optional<Tensor>& arena, const char* name, std::vector<Named>& where) {
    if (arena.has_value()) {
      check_arena(*arena, weight, wide_type(weight), 1, op, name);
      pair_end = std::min(pair_end, arena->numel());
      where.push_back({&*arena, name});
    }
  };
  pairs(gamma, "gamma", read);
  pairs(grad_gamma, "grad_gamma", written);
  pairs(grad_beta, "grad_beta", written);
  if (grad_weight.has_value()) {
    ADAFM_CHECK(gamma.has_value(), op, ": gamma is missing, and grad_weight = gamma * grad needs it");
    check_arena(*grad_weight, weight, weight.scalar_type(), 1, op, "grad_weight");
    weight_end = std::min(weight_end, grad_weight->numel());
    written.push_back({&*grad_weight, "grad_weight"});
  }
  const Layers table(layers, weight_end, pair_end, op);
  check_apart(written, read, op);
  if (written.empty()) {
    return;
  }
  args.grad = grad.const_data_ptr();
  args.weight = weight.const_data_ptr();
  args.gamma = read_pointer(gamma);
  args.grad_weight = write_pointer(grad_weight);
  args.grad_gamma = write_pointer(grad_gamma);
  args.grad_beta = write_pointer(grad_beta);
  run_arena(args, table, tiles, weight, op, &modulate_backward_arena_cpu,
            ADAFM_CUDA_OR_NULL(modulate_backward_arena_cuda));
}

void step_many(Tensor grad, Tensor weight, Tensor layers, std::optional<Tensor> tiles, Tensor hyper, Tensor parameters,
               Tensor exp_avg, Tensor exp_avg_sq, std::optional<Tensor> average, std::optional<Tensor> out) {
  constexpr const char* op = "adafm_compiled::step_many";
  StepManyArgs args{};
  args.grad_type = element_type(grad.scalar_type(), op, "grad");
  args.weight_type = element_type(weight.scalar_type(), op, "weight");
  const ScalarType wide = wide_type(weight);
  check_arena(weight, weight, weight.scalar_type(), 1, op, "weight");
  check_arena(grad, weight, grad.scalar_type(), 1, op, "grad");
  check_arena(hyper, weight, wide, 1, op, "hyper");
  ADAFM_CHECK(hyper.numel() == 8, op, ": hyper has shape ", shape_text(hyper), "; expected [8]");
  int64_t weight_end = std::min(weight.numel(), grad.numel());
  std::vector<Named> written{{&parameters, "parameters"}, {&exp_avg, "exp_avg"}, {&exp_avg_sq, "exp_avg_sq"}};
  if (average.has_value()) {
    written.push_back({&*average, "average"});
  }
  for (const Named& row : written) {
    check_arena(*row.tensor, weight, wide, 2, op, row.name);
    ADAFM_CHECK(row.tensor->size(1) == parameters.size(1), op, ": ", row.name, " has shape ", shape_text(*row.tensor),
                "; expected that of parameters, ", shape_text(parameters));
  }
  args.out_type = args.weight_type;
  if (out.has_value()) {
    args.out_type = element_type(out->scalar_type(), op, "out");
    check_arena(*out, weight, out->scalar_type(), 1, op, "out");
    weight_end = std::min(weight_end, out->numel());
    written.push_back({&*out, "out"});
  }
  const Layers table(layers, weight_end, parameters.size(1), op);
  check_apart(written, {{&grad, "grad"}, {&weight, "weight"}, {&hyper, "hyper"}}, op);
  args.grad = grad.const_data_ptr();
  args.weight = weight.const_data_ptr();
  args.hyper = hyper.const_data_ptr();
  args.parameters = parameters.mutable_data_ptr();
  args.exp_avg = exp_avg.mutable_data_ptr();
  args.exp_avg_sq = exp_avg_sq.mutable_data_ptr();
  args.average = write_pointer(average);
  args.stride = parameters.size(1);
  args.out = write_pointer(out);
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
