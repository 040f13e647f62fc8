// (x + bias) sigmoid(1.702 (x + bias)) and its gradients; formulas in README.md.
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

// Rows with a bias.
template <class T>
struct QuickGeluForward {
  const T* x;         // [rows, width]
  const float* bias;  // [width]
  T* out;             // [rows, width]
  int64_t rows, width;
};

template <class T>
struct QuickGeluBackward {
  const T* grad;      // [rows, width]
  const T* x;         // [rows, width]
  const float* bias;  // [width]
  T* out;             // [rows, width]
  float* parts;       // [quick_gelu_parts(rows), width], scratch for d_bias
  float* d_bias;      // [width], or null
  int64_t rows, width;
};

// The number of partial sums over the rows; it does not depend on the threads, so that neither do the results.
int64_t quick_gelu_parts(int64_t rows);

template <class T>
void quick_gelu_bias_forward_cpu(const QuickGeluForward<T>& problem, const Parallel& parallel);

template <class T>
void quick_gelu_bias_backward_cpu(const QuickGeluBackward<T>& problem, const Parallel& parallel);

}  // namespace scf
