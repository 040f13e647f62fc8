// torch's thread pool for kernels/parallel.h.
#pragma once

#include <torch/csrc/stable/library.h>

#include "kernels/parallel.h"

namespace scf {

inline Parallel torch_threads() {
  return Parallel([](int64_t count, int64_t grain, Parallel::Body body, void* context) {
    TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, body, context));
  });
}

}  // namespace scf
