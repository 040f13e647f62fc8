// Marks functions that compile for the CPU and for CUDA alike, so that CPU tests exercise the GPU's arithmetic.
#pragma once

#ifdef __CUDACC__
#define SCF_HD __host__ __device__ __forceinline__
#else
#define SCF_HD inline
#endif
