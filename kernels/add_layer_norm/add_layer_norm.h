// A residual addition followed by LayerNorm, and the gradient; formulas in README.md.
#pragma once

#include <cstdint>

#include "kernels/element.h"
#include "kernels/parallel.h"

namespace scf {

// T: float or BFloat16. Out: the dtype of the normalised rows and of their gradient, T or float.
template <class T, class Out>
struct AddLayerNormForward {
  const T* x;                // [rows, width]
  const T* branch;           // [rows, width], or null
  const float* weight;       // [width]
  const float* bias;         // [width]
  const float* branch_bias;  // [width], or null
  T* total;                  // [rows, width]; null without a branch
  Out* normed;               // [rows, width]
  float* statistics;         // [2, rows]: mean, inverse deviation
  int64_t rows, width;
  float eps;
};

template <class T, class Out>
struct AddLayerNormBackward {
  const T* d_total;         // [rows, width], or null
  const Out* d_normed;      // [rows, width]
  const T* total;           // [rows, width]
  const float* weight;      // [width]
  const float* statistics;  // [2, rows]
  T* dx;                    // [rows, width]
  float* parts;             // [add_layer_norm_parts(rows), sums, width], scratch for d_sums
  float* d_sums;            // [sums, width]: the gradients of weight, bias and, for 3 sums, branch_bias
  int64_t rows, width;
  int64_t sums;  // 0, 2 or 3
};

// The number of partial sums over the rows; it does not depend on the threads, so that neither do the results.
int64_t add_layer_norm_parts(int64_t rows);

template <class T, class Out>
void add_layer_norm_forward_cpu(const AddLayerNormForward<T, Out>& problem, const Parallel& parallel);

template <class T, class Out>
void add_layer_norm_backward_cpu(const AddLayerNormBackward<T, Out>& problem, const Parallel& parallel);

}  // namespace scf
