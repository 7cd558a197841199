// What the tests of the CUDA kernels share beyond buffers.h. They run by emulation, and on a GPU (ADAFM_GPU).
#pragma once

#include <string>
#include <vector>

#include "adafm/modulate_many.h"
#include "buffers.h"
#include "reference_family.h"

#if !ADAFM_GPU
#include "cuda_runtime.h"
#endif

namespace emulated {

using adafm::ArenaLayer;
using adafm::Tile;
using tests::Buffer;
using tests::DType;
using tests::kLayouts;
using tests::kTypes;
using tests::Layout;
using tests::Parameter;
using tests::Shape;

inline void expect(bool holds, const std::string& what, const Shape& shape = {}) {
  ++tests::compared;
  if (!holds) {
    tests::fail(what, shape);
  }
}

inline void expect_ok(int error, const std::string& what, const Shape& shape = {}) {
  expect(error == adafm::kOk, what + ": launch error", shape);
}

// A buffer that knows its type and size.
class Tensor : public Buffer {
 public:
  Tensor(DType type, int64_t n, int64_t shift = 0) : Buffer(type, n, shift), type_(type), count_(n) {}

  void* at(int64_t element) { return reference::at(data(), type_, element); }
  Tensor& random() {
    fill_random(count_);
    return *this;
  }
  Tensor& positive() {
    random();
    for (int64_t e = 0; e < count_; ++e) {
      reference::write(data(), type_, e, std::fabs(reference::read(data(), type_, e)) + 0.01);
    }
    return *this;
  }
  Tensor& operator=(Tensor& other) {
    std::memcpy(data(), other.data(), bytes());
    return *this;
  }

 private:
  DType type_;
  int64_t count_;
};

// Launches so far; on a GPU nobody counts them.
constexpr int64_t kNotCounted = -1;
inline int64_t launches() {
#if ADAFM_GPU
  return kNotCounted;
#else
  return emulation::launches;
#endif
}

// The pointer where `bit` of `needs` asks for it.
inline void* wanted(unsigned needs, unsigned bit, Tensor& tensor) { return needs & bit ? tensor.data() : nullptr; }

inline int finish(const char* what) {
  std::printf("%lld %s\n", static_cast<long long>(tests::compared), what);
  return 0;
}

}  // namespace emulated
