// Adam on all tensors of a network on CUDA; formulas in adam_many.h. A table of the tensors is the kernel's parameter.
#include "adafm/adam_many.h"
#include "adam.cuh"
#include "table.cuh"

namespace adafm {
namespace cuda {

template <class acc_t>
struct AdamEntry {
  acc_t* parameter;
  const acc_t* grad;
  acc_t* exp_avg;
  acc_t* exp_avg_sq;
  float* steps;
  const float* rate_at;
  int64_t count;
  acc_t rate;

  // Whether 16-byte words can be read.
  __device__ __forceinline__ bool is_vector() const {
    const auto bits = [](const acc_t* p) { return reinterpret_cast<uintptr_t>(p); };
    return ((bits(parameter) | bits(grad) | bits(exp_avg) | bits(exp_avg_sq)) & 15) == 0;
  }
};

template <class acc_t>
struct AdamProblem {
  Table<AdamEntry<acc_t>, kMostTensors> table;
  double beta1;
  double beta2;
  acc_t eps;
  const float* skip;

  __device__ __forceinline__ bool skipped() const { return skip != nullptr && __ldg(skip) != 0.0f; }
};

template <int width, class acc_t>
__device__ __forceinline__ void update(const AdamEntry<acc_t>& entry, const AdamNumbers<acc_t>& numbers, int64_t at) {
  acc_t g[width], p[width], m[width], v[width];
  read_vector(entry.grad + at, g);
  read_vector(entry.parameter + at, p);
  read_vector(entry.exp_avg + at, m);
  read_vector(entry.exp_avg_sq + at, v);
#pragma unroll
  for (int j = 0; j < width; ++j) {
    adam(numbers, g[j], p[j], m[j], v[j]);
  }
  write_vector(entry.parameter + at, p);
  write_vector(entry.exp_avg + at, m);
  write_vector(entry.exp_avg_sq + at, v);
}

// A thread takes eight neighbouring elements.
template <class acc_t>
__global__ void __launch_bounds__(kThreads) adam_many_kernel(const __grid_constant__ AdamProblem<acc_t> problem) {
  __shared__ acc_t corrections[2];
  if (problem.skipped()) {
    return;
  }
  const uint32_t number = layer_of_block(problem.table);
  const AdamEntry<acc_t>& entry = problem.table.layers[number];
  if (threadIdx.x == 0) {
    const int64_t t = static_cast<int64_t>(__ldg(entry.steps)) + 1;
    corrections[0] = static_cast<acc_t>(correction(problem.beta1, t));
    corrections[1] = static_cast<acc_t>(correction(problem.beta2, t));
  }
  __syncthreads();
  const AdamNumbers<acc_t> numbers{entry.rate_at == nullptr ? entry.rate : static_cast<acc_t>(__ldg(entry.rate_at)),
                                   static_cast<acc_t>(problem.beta1),
                                   static_cast<acc_t>(1 - problem.beta1),
                                   static_cast<acc_t>(problem.beta2),
                                   static_cast<acc_t>(1 - problem.beta2),
                                   problem.eps,
                                   corrections[0],
                                   corrections[1]};
  const int64_t thread = int64_t{blockIdx.x - problem.table.first_block[number]} * kThreads + threadIdx.x;
  const int64_t first = thread * kVector;
  if constexpr (sizeof(acc_t) == sizeof(float)) {
    if (entry.is_vector() && first + kVector <= entry.count) {
      update<kVector>(entry, numbers, first);
      return;
    }
  }
  for (int64_t at = first; at < first + kVector && at < entry.count; ++at) {
    update<1>(entry, numbers, at);
  }
}

// Behind the step, which reads the counts.
template <class acc_t>
__global__ void __launch_bounds__(kThreads) count_steps_kernel(const __grid_constant__ AdamProblem<acc_t> problem) {
  if (threadIdx.x < problem.table.count && !problem.skipped()) {
    *problem.table.layers[threadIdx.x].steps += 1;
  }
}

static_assert(kMostTensors <= kThreads, "a thread counts one tensor's steps");

template <class acc_t>
int launch_adam(AdamProblem<acc_t>& problem, cudaStream_t stream) {
  const auto& table = problem.table;
  if (table.count == 0) {
    return kOk;
  }
  int error = launch(adam_many_kernel<acc_t>, table.first_block[table.count], stream, problem);
  if (error == kOk) {
    error = launch(count_steps_kernel<acc_t>, 1, stream, problem);
  }
  problem.table.count = 0;
  return error;
}

template <class acc_t>
int launch_adam_many(const AdamManyArgs& args, cudaStream_t stream) {
  AdamProblem<acc_t> problem{{}, args.beta1, args.beta2, static_cast<acc_t>(args.eps), args.skip};
  static_assert(sizeof(problem) <= 4096, "a kernel's parameters");
  for (const AdamTensor* tensor = args.tensors; tensor != args.tensors + args.tensor_count; ++tensor) {
    // An empty tensor's steps count all the same.
    const int64_t threads = (tensor->count + kVector - 1) / kVector;
    problem.table.add({static_cast<acc_t*>(tensor->parameter), static_cast<const acc_t*>(tensor->grad),
                       static_cast<acc_t*>(tensor->exp_avg), static_cast<acc_t*>(tensor->exp_avg_sq), tensor->steps,
                       tensor->rate_at, tensor->count, static_cast<acc_t>(tensor->rate)},
                      threads > 0 ? threads : 1);
    if (problem.table.full()) {
      if (const int error = launch_adam(problem, stream); error != kOk) {
        return error;
      }
    }
  }
  return launch_adam(problem, stream);
}

}  // namespace cuda

int adam_many_cuda(const AdamManyArgs& args, void* stream) {
  switch (args.type) {
    case DType::kFloat32:
      return cuda::launch_adam_many<float>(args, static_cast<cudaStream_t>(stream));
    case DType::kFloat64:
      return cuda::launch_adam_many<double>(args, static_cast<cudaStream_t>(stream));
    default:
      return kUnsupportedDType;
  }
}

}  // namespace adafm
