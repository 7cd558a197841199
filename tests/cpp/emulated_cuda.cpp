// The CUDA kernels as plain C++: this folder's cuda_runtime.h comes before the toolkit's.
#include "cuda/modulate.cu"
#include "cuda/modulate_backward.cu"
