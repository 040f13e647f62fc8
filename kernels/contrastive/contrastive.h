// Launchers of the backend "cuda" of the contrastive softmax: see README.md for the formulas and the algorithm. Raw
// pointers and sizes, no torch headers; nothing here allocates or synchronises. Features are bfloat16, as bits.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#elif defined(USE_CUDA)
#include <driver_types.h>
#endif

namespace scf {

// The sides of the tiles of logits of both kernels of hopper/.
constexpr int kTileRows = 128;
constexpr int kTileTexts = 128;

// One number per text: its weight in the row sums. Both null: ones.
struct TextWeight {
  const float* numbers = nullptr;   // [U]
  const int32_t* counts = nullptr;  // [U]
};

// The column of each row's positive: index[i] + first, or i + first without an index. A column that does not exist
// stands for a positive outside of this block, or for an index out of range.
struct Positives {
  const int64_t* index = nullptr;  // [N]
  int64_t first = 0;
};

// Two blocks of features and one over the norms of their rows. TMA requires rows aligned to 16 bytes.
struct Operands {
  const uint16_t* x;   // [rows, width]
  const uint16_t* y;   // [texts, width]
  const float* inv_x;  // [rows]
  const float* inv_y;  // [texts]
  const float* scale;  // [1]
  int64_t rows;
  int64_t texts;
  int64_t width;
  int64_t x_stride;
  int64_t y_stride;
};

struct InverseNormsProblem {
  const uint16_t* x;  // [rows, width]
  int64_t rows;
  int64_t width;
  int64_t stride;
  bool normalize;
  float* out;  // [rows]
};

struct SumsProblem {
  Operands operands;
  Positives positives;
  TextWeight weight;
  float* row_parts;     // [tiles of texts, rows]
  float* column_parts;  // [tiles of rows, texts]
  float* own_exponent;  // [rows] the exponent of each positive in these sums; unchanged where there is none
};

// The log-sums of rows x over all y; the caller swaps the sides for the columns.
struct FinishSumsProblem {
  const float* parts;  // [count, rows]
  int64_t count;
  Operands operands;          // of any alignment
  TextWeight weight;          // of y
  const float* own_exponent;  // [rows] as in SumsProblem, or null
  double* lse;                // [rows] out, natural logarithm
  double* positive;           // [rows] out: logits of the positives; null without exponents
};

// What the tiles of gradients read of a row, in one or two loads of 16 bytes. Notation of README.md: offset m.
struct alignas(16) GradientRow {
  float factor;   // k2 / norm
  float shift;    // m + log2 norm
  float term;     // A = gain 2^(m - log_sum)
  float apart;    // 1 if the log-sum is far from the offset: its tiles then need the other numbers
  float log_sum;  // in base 2
  float gain;     // the upstream gradient times 2^K
  float inverse;  // one over the norm
  float unused;
};

struct alignas(16) GradientText {
  float inverse;
  float weight;  // W: the text's weight over its norm
  float term;    // B = gain 2^(m - log_sum)
  float apart;
  float log_sum;
  float gain;  // the upstream gradient times 2^K, over the norm
  float unused[2];
};

struct FactorsProblem {
  const double* row_lse;        // [rows], natural logarithms
  const double* column_lse;     // [texts]
  const double* positive;       // [rows] logits
  const double* grad_row;       // [rows]
  const double* grad_column;    // [texts]
  const double* grad_positive;  // [rows]
  const float* inv_x;           // [rows]
  const float* inv_y;           // [texts]
  const float* scale;           // [1]
  Positives positives;
  TextWeight weight;
  int64_t rows;
  int64_t texts;
  int exponent;            // K
  GradientRow* row_out;    // [rows]
  GradientText* text_out;  // [texts]
  float* positive_gain;    // [rows] out: H of the positive, 0 where there is none
};

struct GradientsProblem {
  Operands operands;  // without norms, which are part of the rows and texts below
  Positives positives;
  const GradientRow* row;    // [rows]
  const GradientText* text;  // [texts]
  uint16_t* out;             // [rows, texts] in rows of `stride`; what lies beyond `texts` is not written
  int64_t stride;
};

// Gradients of one side's features. Partners of a row, whose features enter with `gain`:
//   order null: row positives.index[i] + positives.first (without an index: i + positives.first) of the other side, if
//   it exists; otherwise: rows order[offsets[i]] to order[offsets[i + 1] - 1] of the other side.
struct FinishProblem {
  const uint16_t* features;  // [rows, width]
  const float* inverse;      // [rows]
  const float* product;      // [rows, width] contiguous
  const uint16_t* partners;  // [partner_rows, width]
  Positives positives;
  const int64_t* order;    // [positives], or null
  const int64_t* offsets;  // [rows + 1], or null
  int64_t order_size;      // of `order`
  const float* gain;       // [rows], or [partner_rows] if gain_of_partner
  bool gain_of_partner;
  const float* scale;  // [1]
  int64_t rows;
  int64_t partner_rows;
  int64_t width;
  int64_t feature_stride;
  int64_t partner_stride;
  int exponent;  // K
  bool normalize;
  uint16_t* out;  // [rows, width] contiguous
  float* dots;    // [rows] out: their sum is the gradient of the scale
};

// A thread of `finish` holds eight entries of a row.
constexpr int64_t kFinishEntries = 8;
constexpr int64_t kFinishWidth = 1024 * kFinishEntries;

#if defined(__CUDACC__) || defined(USE_CUDA)
// Null on success, otherwise the error.
const char* inverse_norms_cuda(const InverseNormsProblem& problem, cudaStream_t stream);
const char* finish_sums_cuda(const FinishSumsProblem& problem, cudaStream_t stream);
const char* factors_cuda(const FactorsProblem& problem, cudaStream_t stream);
const char* finish_cuda(const FinishProblem& problem, cudaStream_t stream);
// hopper/: compute capability 9.0 alone.
const char* sums_hopper(const SumsProblem& problem, cudaStream_t stream);
const char* gradients_hopper(const GradientsProblem& problem, cudaStream_t stream);
#endif

}  // namespace scf
