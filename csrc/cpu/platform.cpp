#include "adafm/platform.h"

#include "adafm/types.h"
#include "clones.h"

namespace adafm {

const char* cpu_level() {
#if ADAFM_HAS_CLONES
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) {
    return "x86-64-v4";
  }
  if (__builtin_cpu_supports("x86-64-v3")) {
    return "x86-64-v3";
  }
#endif
  return "default";
}

#if !ADAFM_WITH_CUDA
const char* error_text(int error) {
  return error == kOk ? "no error" : error == kUnsupportedDType ? "unsupported element type" : "unknown error";
}
#endif

}  // namespace adafm
