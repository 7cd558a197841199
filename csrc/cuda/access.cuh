// Reading and writing single elements whose type is known when compiling, or only when running: pairs of element types
// that are too rare for an instance of their own share one, in which every access chooses by type.
#pragma once

#include "element.cuh"

namespace adafm {
namespace cuda {

// Stands for an element type that is known when running; acc_t is the computing type.
template <class acc_t>
struct Any {};

template <class element_t>
struct Access {
  using acc_t = acc_type<element_t>;
  static constexpr bool kTyped = true;
};

template <class computing_t>
struct Access<Any<computing_t>> {
  using acc_t = computing_t;
  static constexpr bool kTyped = false;
};

template <class element_t>
constexpr bool is_typed = Access<element_t>::kTyped;

// The computing type for a weight of type element_t.
template <class element_t>
using computing_type = typename Access<element_t>::acc_t;

template <class element_t>
struct Source {
  const element_t* data;

  __host__ __device__ Source(const void* memory, DType) : data(static_cast<const element_t*>(memory)) {}

  template <class acc_t>
  __device__ __forceinline__ acc_t at(int64_t e) const {
    return load<acc_t>(__ldg(data + e));
  }
};

template <class any_t>
struct Source<Any<any_t>> {
  const void* data;
  DType type;

  __host__ __device__ Source(const void* memory, DType element) : data(memory), type(element) {}

  template <class acc_t>
  __device__ __forceinline__ acc_t at(int64_t e) const {
    switch (type) {
      case DType::kFloat32:
        return load<acc_t>(__ldg(static_cast<const float*>(data) + e));
      case DType::kFloat64:
        return load<acc_t>(__ldg(static_cast<const double*>(data) + e));
      case DType::kFloat16:
        return load<acc_t>(__ldg(static_cast<const __half*>(data) + e));
      default:
        return load<acc_t>(__ldg(static_cast<const __nv_bfloat16*>(data) + e));
    }
  }
};

template <class element_t>
struct Target {
  element_t* data;

  __host__ __device__ Target(void* memory, DType) : data(static_cast<element_t*>(memory)) {}

  template <class acc_t>
  __device__ __forceinline__ void put(int64_t e, acc_t x) const {
    data[e] = store<element_t>(x);
  }
};

template <class any_t>
struct Target<Any<any_t>> {
  void* data;
  DType type;

  __host__ __device__ Target(void* memory, DType element) : data(memory), type(element) {}

  template <class acc_t>
  __device__ __forceinline__ void put(int64_t e, acc_t x) const {
    switch (type) {
      case DType::kFloat32:
        static_cast<float*>(data)[e] = store<float>(x);
        return;
      case DType::kFloat64:
        static_cast<double*>(data)[e] = store<double>(x);
        return;
      case DType::kFloat16:
        static_cast<__half*>(data)[e] = store<__half>(x);
        return;
      default:
        static_cast<__nv_bfloat16*>(data)[e] = store<__nv_bfloat16>(x);
        return;
    }
  }
};

// ---- host side ----

inline bool known(DType type) {
  return type == DType::kFloat32 || type == DType::kFloat64 || type == DType::kFloat16 || type == DType::kBFloat16;
}

// Calls fn with one of the three types that have instances; `type` is not float64.
template <class fn_t>
int with_typed(DType type, fn_t&& fn) {
  switch (type) {
    case DType::kFloat16:
      return fn(__half{});
    case DType::kBFloat16:
      return fn(__nv_bfloat16{});
    default:
      return fn(float{});
  }
}

// Calls fn with the element types of a weight and of the result or gradient that goes with it: the 9 pairs without
// float64 have instances, all others get Any.
template <class fn_t>
int with_types(DType weight, DType other, fn_t&& fn) {
  if (!known(weight) || !known(other)) {
    return kUnsupportedDType;
  }
  if (weight == DType::kFloat64) {
    return fn(Any<double>{}, Any<double>{});
  }
  if (other == DType::kFloat64) {
    return fn(Any<float>{}, Any<float>{});
  }
  return with_typed(weight,
                    [&](auto first) { return with_typed(other, [&](auto second) { return fn(first, second); }); });
}

// The same for the kernels that are large or take a whole network. The five pairs that
// networks use have instances: float32 weights with any of the three types, 16-bit weights with their own type. All
// other pairs, and everything where `vector` is false, get Any.
template <class fn_t>
int with_pair(DType weight, DType other, bool vector, fn_t&& fn) {
  if (!known(weight) || !known(other)) {
    return kUnsupportedDType;
  }
  if (vector) {
    if (weight == DType::kFloat32 && other == DType::kFloat32) {
      return fn(float{}, float{});
    }
    if (weight == DType::kFloat32 && other == DType::kBFloat16) {
      return fn(float{}, __nv_bfloat16{});
    }
    if (weight == DType::kFloat32 && other == DType::kFloat16) {
      return fn(float{}, __half{});
    }
    if (weight == DType::kBFloat16 && other == DType::kBFloat16) {
      return fn(__nv_bfloat16{}, __nv_bfloat16{});
    }
    if (weight == DType::kFloat16 && other == DType::kFloat16) {
      return fn(__half{}, __half{});
    }
  }
  if (weight == DType::kFloat64) {
    return fn(Any<double>{}, Any<double>{});
  }
  return fn(Any<float>{}, Any<float>{});
}

}  // namespace cuda
}  // namespace adafm
