#include <cuda_runtime.h>

#include "adafm/platform.h"
#include "adafm/types.h"

namespace adafm {

const char* error_text(int error) {
  if (error == kUnsupportedDType) {
    return "unsupported element type";
  }
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace adafm
