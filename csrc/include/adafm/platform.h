// What the library was built for and what it runs on.
#pragma once

namespace adafm {

// The instruction level that the CPU kernels use on this machine: "x86-64-v4", "x86-64-v3" or "default".
const char* cpu_level();

// Text for an error returned by a kernel.
const char* error_text(int error);

}  // namespace adafm
