// SCF_DEVICE_CHECK: an assertion in a kernel, also in release builds. It prints itself and its place and ends the
// kernel; the next call into CUDA reports "device-side assert triggered".
#pragma once

#ifdef __CUDACC__
#include <cstddef>

extern "C" __device__ void __assertfail(const char* message, const char* file, unsigned line, const char* function,
                                        size_t char_size) __attribute__((noreturn));

#define SCF_DEVICE_CHECK(condition) \
  if (!(condition)) __assertfail(#condition, __FILE__, __LINE__, __func__, sizeof(char))
#else  // kernels that tests run on a CPU
#include <cassert>

#define SCF_DEVICE_CHECK(condition) assert(condition)
#endif
