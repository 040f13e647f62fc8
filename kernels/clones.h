// SCF_CLONES: a function that is also compiled for AVX-512; the dynamic loader selects the version for the processor.
#pragma once

#include <cstdlib>  // for __GLIBC__, whose loader supports this

// Not with AddressSanitizer, which is not ready when the loader asks.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__AVX512F__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__)
#define SCF_CLONES __attribute__((target_clones("avx512f", "default")))
#else
#define SCF_CLONES
#endif
