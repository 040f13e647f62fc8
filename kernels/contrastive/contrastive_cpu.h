// The element-wise passes of the contrastive loss on a CPU; contrastive_cpu_native.py computes the products between
// them. Formulas in README.md. Every sum has a fixed order that does not depend on the number of threads.
#pragma once

#include <cstdint>

#include "kernels/parallel.h"

namespace scf {

// A tile of the level's N x U matrix: rows from first_row, texts from first_text. Vectors are those of the whole level.
struct ContrastiveTile {
  int64_t first_row, first_text;
  int64_t rows, texts;
  const int64_t* index;  // [N] the text of each row; nullptr: row i has text i

  // The column of the positive of row i of the tile; -1: in another tile.
  int64_t positive(int64_t i) const {
    const int64_t row = first_row + i, u = (index ? index[row] : row) - first_text;
    return u < texts ? (u < 0 ? -1 : u) : -1;
  }
};

// Logits are product * by_row * by_text, and exponentials exp(logit - offset).
struct ContrastiveLogits {
  const float* by_row;   // [N]
  const float* by_text;  // [U]
  float scale;           // a factor of by_row
  float offset;
};

// What multiplies exponentials in the gradient: exponential * (row_a text_a + row_b text_b), plus row_c text_c at the
// positive of a row.
struct ContrastiveFactors {
  float *row_a, *row_b, *row_c;     // [N]
  float *text_a, *text_b, *text_c;  // [U]
};

struct ContrastiveGradients {
  const double *row_lse, *col_lse;                 // [N], [U]
  const double *grad_row, *grad_col, *grad_logit;  // [N], [U], [N]: of row_lse, col_lse and the positives
};

// Writes one over the norm of each row of x [rows, width] to inverse [rows]: at most 1e12, and 0 if the squares
// overflow.
void contrastive_inverse_cpu(const float* x, int64_t rows, int64_t width, float* inverse, const Parallel& parallel);

// Replaces the products of a tile by exponentials, adds their sums to row_sum [N], weighted, and col_sum [U], and
// writes the logits of the positives [N].
void contrastive_exponentials_cpu(const ContrastiveTile& tile, const ContrastiveLogits& logits,
                                  const float* weight,  // [U]
                                  float* values, int64_t stride, double* row_sum, double* col_sum, double* positive,
                                  const Parallel& parallel);

// Fills in the factors, for upstream gradients divided by `magnitude`, a power of two that brings the largest of them
// to order one. False: a log-sum is too far from the offset, or a product of factors could leave the range of float.
bool contrastive_factors_cpu(const ContrastiveGradients& gradients, const ContrastiveLogits& logits,
                             const float* weight,  // [U]
                             int64_t rows, int64_t texts, const ContrastiveFactors& factors, double& magnitude,
                             const Parallel& parallel);

// Writes the gradients of a tile's logits, times by_row by_text, to `out`. source: exponentials if `kept`, else
// products; may be `out`.
void contrastive_gradients_cpu(const ContrastiveTile& tile, const ContrastiveLogits& logits,
                               const ContrastiveFactors& factors, bool kept, const float* source, int64_t source_stride,
                               float* out, int64_t out_stride, const Parallel& parallel);

// Turns d [rows, width], the gradient of unit rows times `inverse` [rows], into the gradient of the rows x
// [rows, width], times `factor`. Returns the sum of all x d.
double contrastive_finish_cpu(const float* x, const float* inverse, float factor, bool normalize, int64_t rows,
                              int64_t width, float* d, const Parallel& parallel);

}  // namespace scf
