// Run-time choice of the instruction set. gcc on x86-64 Linux compiles a marked function three times and the loader
// picks one; elsewhere there is one body. Results do not depend on the choice: kernels call std::fma explicitly and
// the build turns contraction off.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && !defined(ADAFM_NO_CLONES)
#define ADAFM_HAS_CLONES 1
#define ADAFM_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define ADAFM_HAS_CLONES 0
#define ADAFM_CLONES
#endif

// Helpers of a marked function have to be compiled into each of its bodies.
#define ADAFM_INLINE inline __attribute__((always_inline))
