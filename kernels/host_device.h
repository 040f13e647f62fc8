// Marks functions that compile for both the CPU and CUDA, so that CPU tests exercise the GPU's arithmetic.
#pragma once

#ifdef __CUDACC__
#define SCF_HD __host__ __device__ __forceinline__
#else
#define SCF_HD inline
#endif
