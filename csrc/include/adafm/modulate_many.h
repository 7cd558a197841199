// modulate and modulate_backward for all layers of a network in one pass.
#pragma once

#include "adafm/arena.h"
#include "adafm/modulate.h"
#include "adafm/modulate_backward.h"

namespace adafm {

// W' = gamma * W + beta over arenas; `gamma`, `beta` are float (double with float64 weights). Padding between layers is
// not written. The CPU reads `layers`, CUDA `tiles` (device memory).
struct ModulateArenaArgs {
  const ArenaLayer* layers;
  int64_t layer_count;
  const Tile* tiles;
  int64_t tile_count;
  const void* weight;
  DType weight_type;
  const void* gamma;
  const void* beta;
  void* out;
  DType out_type;
};

// dW = gamma * G, dgamma = sum_k G * W, dbeta = sum_k G over arenas; null outputs are not computed, `gamma` may be null
// where dW is not asked for, `weight` where dgamma is not.
struct ModulateBackwardArenaArgs {
  const ArenaLayer* layers;
  int64_t layer_count;
  const Tile* tiles;
  int64_t tile_count;
  const void* grad;
  DType grad_type;
  const void* weight;
  DType weight_type;
  const void* gamma;
  void* grad_weight;
  void* grad_gamma;
  void* grad_beta;
};

// Work is numbered by weights, layer after layer without the padding: [0, sum of O * I * taps). A thread takes the
// pairs that begin inside [begin, end). Any split gives the same bits. A layer without taps takes no part.
int modulate_many_cpu(const ModulateArgs* layers, int64_t count, int64_t begin, int64_t end);
int modulate_many_backward_cpu(const ModulateBackwardArgs* layers, int64_t count, int64_t begin, int64_t end);
int modulate_arena_cpu(const ModulateArenaArgs& args, int64_t begin, int64_t end);
int modulate_backward_arena_cpu(const ModulateBackwardArenaArgs& args, int64_t begin, int64_t end);

// Separate layers that fit into the parameters of one CUDA kernel (4 KB).
constexpr int64_t kMostLayers = 48;

// One launch for any number of layers up to kMostLayers, else one for each group of so many. Separate weights: layers
// share their element types. `stream` is a cudaStream_t of the current device; nothing waits.
int modulate_many_cuda(const ModulateArgs* layers, int64_t count, void* stream);
int modulate_many_backward_cuda(const ModulateBackwardArgs* layers, int64_t count, void* stream);
int modulate_arena_cuda(const ModulateArenaArgs& args, void* stream);
int modulate_backward_arena_cuda(const ModulateBackwardArenaArgs& args, void* stream);

}  // namespace adafm
