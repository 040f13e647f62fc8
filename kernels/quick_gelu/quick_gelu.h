// x sigmoid(1.702 x) and its gradient; formulas in README.md.
#pragma once

#include <cstdint>

#include "kernels/element.h"
#include "kernels/parallel.h"

namespace scf {

template <class T>  // float or BFloat16
void quick_gelu_forward_cpu(const T* x /* [size] */, T* out /* [size] */, int64_t size, const Parallel& parallel);

template <class T>
void quick_gelu_backward_cpu(const T* grad /* [size] */, const T* x /* [size] */, T* out /* [size] */, int64_t size,
                             const Parallel& parallel);

}  // namespace scf
