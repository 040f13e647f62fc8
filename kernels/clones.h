// SCF_CLONES: a function that is compiled once more for AVX-512; the loader takes the one that the processor runs.
#pragma once

#include <cstdlib>  // for __GLIBC__, whose loader can choose

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__AVX512F__) && !defined(__clang__)
#define SCF_CLONES __attribute__((target_clones("avx512f", "default")))
#else
#define SCF_CLONES
#endif
