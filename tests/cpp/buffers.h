// Shared by the C++ tests: buffers with margins that show a stray write, random parameters of every form, comparison.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>

#include "device_memory.h"
#include "reference.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes)
#endif

// Programs built for a level that a machine lacks are skipped there.
#if defined(__x86_64__) && defined(__AVX2__)
#define ADAFM_NEEDS_V3 1
#else
#define ADAFM_NEEDS_V3 0
#endif

namespace tests {

using adafm::DType;
using adafm::Layout;
using adafm::Parameter;
using adafm::Shape;

inline constexpr DType kTypes[] = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16};
inline constexpr Layout kLayouts[] = {Layout::kContiguous, Layout::kChannelsLast};
constexpr unsigned char kCanary = 0xa5;
constexpr int64_t kMargin = 64;

inline std::mt19937 random_engine(7);
inline int64_t compared = 0;

// A tensor of n elements that begins `shift` elements behind a 64-byte boundary, with a margin on both sides: nobody
// writes there, and under AddressSanitizer nobody reads there.
class Buffer {
 public:
  Buffer(DType type, int64_t n, int64_t shift)
      : type_(type),
        used_(n * reference::size_of(type)),
        begin_(kMargin + shift * reference::size_of(type)),
        bytes_((begin_ + used_ + 2 * kMargin + 63) / 64 * 64) {
    memory_ = static_cast<unsigned char*>(device::allocate(bytes_));
    std::memset(memory_, kCanary, bytes_);
    forbid_margins();
  }
  ~Buffer() {
    ASAN_UNPOISON_MEMORY_REGION(memory_, bytes_);
    device::release(memory_, bytes_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data() { return memory_ + begin_; }
  int64_t bytes() const { return used_; }

  void fill_random(int64_t n) {
    std::normal_distribution<double> values;
    for (int64_t e = 0; e < n; ++e) {
      reference::write(data(), type_, e, values(random_engine));
    }
  }

  bool margins_untouched() const {
    ASAN_UNPOISON_MEMORY_REGION(memory_, bytes_);
    bool untouched = true;
    for (int64_t b = 0; b < bytes_; ++b) {
      untouched = untouched && ((b >= begin_ && b < begin_ + used_) || memory_[b] == kCanary);
    }
    forbid_margins();
    return untouched;
  }

 private:
  void forbid_margins() const {
    ASAN_POISON_MEMORY_REGION(memory_, begin_);
    ASAN_POISON_MEMORY_REGION(memory_ + begin_ + used_, bytes_ - begin_ - used_);
  }

  DType type_;
  int64_t used_, begin_, bytes_;
  unsigned char* memory_;
};

[[noreturn]] inline void fail(const std::string& what, const Shape& shape) {
  std::printf("FAILED %s, shape [%lld, %lld, %lld]\n", what.c_str(), static_cast<long long>(shape.out_channels),
              static_cast<long long>(shape.in_channels), static_cast<long long>(shape.taps));
  std::exit(1);
}

inline void expect_same(Buffer& actual, Buffer& expected, const std::string& what, const Shape& shape) {
  ++compared;
  device::wait();
  if (std::memcmp(actual.data(), expected.data(), actual.bytes()) != 0) {
    fail(what + ": values differ", shape);
  }
  if (!actual.margins_untouched()) {
    fail(what + ": wrote outside its result", shape);
  }
}

constexpr int kForms = 6;

// gamma or beta: dense, one per filter, one per channel, transposed, every second column at an offset, rows of a wider
// matrix.
inline Parameter parameter_in_form(const void* data, const Shape& shape, int form) {
  const int64_t in_channels = shape.in_channels;
  switch (form) {
    case 1:
      return {data, 1, 0};
    case 2:
      return {data, 0, 1};
    case 3:
      return {data, 1, shape.out_channels};
    case 4:
      return {data, 2 * in_channels, 2};
    case 5:
      return {data, in_channels + 1, 1};
    default:
      return {data, in_channels, 1};
  }
}

struct Values {
  Buffer buffer;
  Parameter parameter;

  Values(DType type, const Shape& shape, int form)
      : buffer(type, 2 * shape.pairs() + 1, form == 4 ? 1 : 0),
        parameter(parameter_in_form(buffer.data(), shape, form)) {
    buffer.fill_random(2 * shape.pairs() + 1);
  }
};

}  // namespace tests
