// The arithmetic of single rows and numbers, shared by the CUDA kernels and the CPU tests. Notation of README.md;
// logits are in base 2: cosines times k2 = scale log2(e).
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/contrastive/contrastive.h"
#include "kernels/host_device.h"

namespace scf {

constexpr double kLn2 = 0.69314718055994530942;
constexpr double kLog2e = 1.44269504088896340736;

// Products and differences that several kernels must round alike: no contraction to FMA.
SCF_HD float rounded_product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  volatile float product = a * b;
  return product;
#endif
}

SCF_HD float logit_scale(float scale) { return rounded_product(scale, static_cast<float>(kLog2e)); }

// exp2 flushes results below 2^-126 to zero. The largest possible logit, k2, is shifted to at most 100 in the sums, and
// 2^27 terms stay finite; smaller scales get no offset, which would cost precision. Sums outside these bounds are
// recomputed with a running maximum: relative to a sum in range, terms above 2^-26 are kept, whose weight is at most
// kHeaviest. A heavier text makes the sum infinite or NaN.
constexpr float kHeadroom = 100, kHeaviest = 0x1p20f;
constexpr double kSmallestSum = 0x1p-80, kLargestSum = 0x1p127;
SCF_HD float summed_weight(float weight) { return weight <= kHeaviest ? weight : INFINITY; }
SCF_HD float sum_offset(float k2) { return fmaxf(k2 - kHeadroom, 0.0f); }

// The offset of the gradients' single exponential, and how far a log-sum may lie from it. With norms between 2^-20
// and 2^20, and weights over norms up to kHeavy, terms above 2^-26 of their sum are then not flushed to zero, and no
// factor overflows.
constexpr float kGradientHeadroom = 86, kSpread = 80, kHeavy = 0x1p40f;
SCF_HD float gradient_offset(float k2) { return fmaxf(k2 - kGradientHeadroom, 0.0f); }

SCF_HD float bfloat16_to_float(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
#ifdef __CUDA_ARCH__
  return __uint_as_float(word);
#else
  float value;
  __builtin_memcpy(&value, &word, sizeof value);
  return value;
#endif
}

// Rounds to nearest, ties to even.
SCF_HD uint16_t float_to_bfloat16(float value) {
#ifdef __CUDA_ARCH__
  const uint32_t word = __float_as_uint(value);
#else
  uint32_t word;
  __builtin_memcpy(&word, &value, sizeof word);
#endif
  if (value != value) return 0x7fc0;
  return static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

// One over the norm of a row, as in F.normalize. Norms whose products could leave the range of the kernels give NaN.
SCF_HD float inverse_norm(float squares, bool any_nonzero, bool normalize) {
  if (!normalize) return 1;
  if (!any_nonzero) return 1e12f;
  return squares >= 0x1p-40f && squares <= 0x1p40f ? 1 / sqrtf(squares) : NAN;
}

SCF_HD float weight_of(const TextWeight& weight, int64_t text) {
  if (weight.numbers != nullptr) return weight.numbers[text];
  return weight.counts != nullptr ? static_cast<float>(weight.counts[text]) : 1.0f;
}

// The column of row i's positive, which may be out of range.
SCF_HD int64_t positive_column(const Positives& positives, int64_t row) {
  return (positives.index != nullptr ? positives.index[row] : row) + positives.first;
}

// A sum of w 2^logit with a running maximum.
struct RunningSum {
  float top = -INFINITY;
  float terms = 0;  // relative to 2^top

  // A text of weight zero contributes nothing, unless it is NaN.
  SCF_HD void add(float logit, float weight) {
    const bool counts = weight > 0 || weight != weight || logit != logit;
    merge({counts ? logit : -INFINITY, counts ? weight : 0.0f});
  }
  SCF_HD void merge(RunningSum other) {
    const float higher = fmaxf(top, other.top);
    const float shift = higher == -INFINITY ? 0 : higher;
    terms = terms * exp2f(top - shift) + other.terms * exp2f(other.top - shift);
    top = higher;
  }
};

SCF_HD bool sum_in_range(double sum) { return sum >= kSmallestSum && sum <= kLargestSum; }

// The natural logarithm of a sum relative to 2^offset. The host does not check the scale, which would synchronise: one
// that is not positive gives NaN.
SCF_HD double natural_log_sum(double log2_sum, float k2) { return k2 > 0 ? log2_sum * kLn2 : NAN; }

// The logit of a positive, given the exponent that is part of its row's sum. Where a positive dominates, the loss is
// the small difference of the two: their rounding errors cancel.
SCF_HD double positive_logit(float exponent, float k2) {
  return (static_cast<double>(exponent) + static_cast<double>(sum_offset(k2))) * kLn2;
}

// The log-sum of a row or a text in base 2, rounded, and its upstream gradient times 2^exponent, corrected for that
// rounding; and the gradient relative to 2^offset.
struct Gain {
  float log_sum;
  float gain;
  float term;
};

SCF_HD Gain gain_of(double lse, double grad, float offset, int exponent) {
  const double exact = lse * kLog2e, scaled = ldexp(grad, exponent);
  const float rounded = static_cast<float>(exact);
  // The log-sum of no terms is -inf, and needs no correction.
  const double error = rounded == -INFINITY ? 0 : static_cast<double>(rounded) - exact;
  return {rounded, static_cast<float>(scaled * exp2(error)),
          static_cast<float>(scaled * exp2(static_cast<double>(offset) - exact))};
}

SCF_HD GradientRow gradient_row(double lse, double grad, float inverse, float k2, int exponent) {
  const float offset = gradient_offset(k2);
  const Gain gain = gain_of(lse, grad, offset, exponent);
  const float shift = offset - log2f(inverse);
  const bool near = fabsf(shift - gain.log_sum) <= kSpread;  // false for NaN
  return {inverse * k2, shift, gain.term, near ? 0.0f : 1.0f, gain.log_sum, gain.gain, inverse, 0};
}

SCF_HD GradientText gradient_text(double lse, double grad, float inverse, float weight, float k2, int exponent) {
  const float offset = gradient_offset(k2);
  const Gain gain = gain_of(lse, grad, offset, exponent);
  // A heavy text could overflow the factor of an exponential that is zero.
  const bool near = fabsf(offset - gain.log_sum) <= kSpread && weight * inverse <= kHeavy;
  return {inverse, weight * inverse, gain.term * inverse, near ? 0.0f : 1.0f, gain.log_sum, gain.gain * inverse,
          {0, 0}};
}

// H of row i's positive, whose place in the matrix of gradients is zero.
SCF_HD float positive_gain(const FactorsProblem& p, int64_t row) {
  const int64_t text = positive_column(p.positives, row);
  if (text < 0 || text >= p.texts) return 0;
  const double weight = weight_of(p.weight, text), logit = p.positive[row];
  const double by_row = weight == 0 ? 0 : p.grad_row[row] * weight * exp(logit - p.row_lse[row]);
  const double by_column = p.grad_column[text] * exp(logit - p.column_lse[text]);
  const double inverse = static_cast<double>(p.inv_x[row]) * static_cast<double>(p.inv_y[text]);
  return static_cast<float>(ldexp((by_row + by_column + p.grad_positive[row]) * inverse, p.exponent));
}

// The gradient of one entry of a row of features; `gradient` is its P, `dot` the row's features . P.
SCF_HD float finished_entry(float feature, float gradient, float dot, float inverse, float factor, bool normalize) {
  if (!normalize) return factor * gradient;
  return factor * (gradient - feature * inverse * (inverse * dot));
}

}  // namespace scf
