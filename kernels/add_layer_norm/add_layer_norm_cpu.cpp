#include <algorithm>
#include <cmath>

#include "kernels/add_layer_norm/add_layer_norm.h"
#include "kernels/clones.h"

namespace scf {
namespace {

constexpr int64_t kGrain = 16;  // rows per thread: about 10 microseconds at width 768
constexpr int64_t kPartRows = 64, kMaxParts = 64;

template <class T, class Out>
[[gnu::always_inline]] inline void forward_row(const AddLayerNormForward<T, Out>& p, int64_t row) {
  const int64_t width = p.width;
  const T* x = p.x + row * width;
  float sum = 0;
  if (p.branch != nullptr) {
    const T* branch = p.branch + row * width;
    const float* branch_bias = p.branch_bias;
    T* total = p.total + row * width;
    if (branch_bias != nullptr) {
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < width; ++j) {
        total[j] = from_float<T>(to_float(x[j]) + (to_float(branch[j]) + branch_bias[j]));
        sum += to_float(total[j]);
      }
    } else {
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < width; ++j) {
        total[j] = from_float<T>(to_float(x[j]) + to_float(branch[j]));
        sum += to_float(total[j]);
      }
    }
    x = total;
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < width; ++j) sum += to_float(x[j]);
  }
  const float mean = sum / static_cast<float>(width);
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t j = 0; j < width; ++j) {
    const float centred = to_float(x[j]) - mean;
    squares += centred * centred;
  }
  const float inverse = 1 / std::sqrt(squares / static_cast<float>(width) + p.eps);
  const float* weight = p.weight;
  const float* bias = p.bias;
  Out* normed = p.normed + row * width;
#pragma omp simd
  for (int64_t j = 0; j < width; ++j) {
    normed[j] = from_float<Out>((to_float(x[j]) - mean) * inverse * weight[j] + bias[j]);
  }
  p.statistics[row] = mean;
  p.statistics[p.rows + row] = inverse;
}

// Writes dx of a row whose means are `sum` and `along`, and with kSums adds it to d_branch_bias [width].
template <bool kTotal, bool kSums, class T, class Out>
[[gnu::always_inline]] inline void gradient_row(const AddLayerNormBackward<T, Out>& p, int64_t row, float sum,
                                                float along, float* d_branch_bias) {
  const int64_t width = p.width;
  const Out* upstream = p.d_normed + row * width;
  const T* total = p.total + row * width;
  const T* d_total = kTotal ? p.d_total + row * width : nullptr;
  const float* weight = p.weight;
  const float mean = p.statistics[row], inverse = p.statistics[p.rows + row];
  T* dx = p.dx + row * width;
#pragma omp simd
  for (int64_t j = 0; j < width; ++j) {
    const float normalised = (to_float(total[j]) - mean) * inverse;
    float gradient = inverse * (to_float(upstream[j]) * weight[j] - sum - normalised * along);
    if constexpr (kTotal) gradient += to_float(d_total[j]);
    dx[j] = from_float<T>(gradient);
    if constexpr (kSums) d_branch_bias[j] += gradient;
  }
}

// part: [sums, width] sums over rows: the gradients of weight, bias and branch_bias; unused without sums.
template <class T, class Out>
[[gnu::always_inline]] inline void backward_row(const AddLayerNormBackward<T, Out>& p, int64_t row, float* part) {
  const int64_t width = p.width;
  const Out* upstream = p.d_normed + row * width;
  const T* total = p.total + row * width;
  const float* weight = p.weight;
  const float mean = p.statistics[row], inverse = p.statistics[p.rows + row];
  float sum = 0, along = 0;
#pragma omp simd reduction(+ : sum, along)
  for (int64_t j = 0; j < width; ++j) {
    const float scaled = to_float(upstream[j]) * weight[j];
    sum += scaled;
    along += scaled * ((to_float(total[j]) - mean) * inverse);
  }
  sum /= static_cast<float>(width);
  along /= static_cast<float>(width);
  if (p.sums == 3) {
    if (p.d_total != nullptr) {
      gradient_row<true, true>(p, row, sum, along, part + 2 * width);
    } else {
      gradient_row<false, true>(p, row, sum, along, part + 2 * width);
    }
  } else if (p.d_total != nullptr) {
    gradient_row<true, false>(p, row, sum, along, nullptr);
  } else {
    gradient_row<false, false>(p, row, sum, along, nullptr);
  }
  if (p.sums == 0) return;
  float* d_bias = part + width;
#pragma omp simd
  for (int64_t j = 0; j < width; ++j) {
    part[j] += to_float(upstream[j]) * ((to_float(total[j]) - mean) * inverse);
    d_bias[j] += to_float(upstream[j]);
  }
}

// One function per combination of dtypes: a template cannot have clones.
#define SCF_ADD_LAYER_NORM(T, Out)                                                                                \
  SCF_CLONES void forward_rows(const AddLayerNormForward<T, Out>& p, int64_t begin, int64_t end) {                \
    for (int64_t row = begin; row < end; ++row) forward_row(p, row);                                              \
  }                                                                                                               \
  SCF_CLONES void backward_rows(const AddLayerNormBackward<T, Out>& p, int64_t begin, int64_t end, float* part) { \
    for (int64_t row = begin; row < end; ++row) backward_row(p, row, part);                                       \
  }
SCF_ADD_LAYER_NORM(float, float)
SCF_ADD_LAYER_NORM(BFloat16, BFloat16)
SCF_ADD_LAYER_NORM(BFloat16, float)
#undef SCF_ADD_LAYER_NORM

}  // namespace

int64_t add_layer_norm_parts(int64_t rows) { return std::min((rows + kPartRows - 1) / kPartRows, kMaxParts); }

template <class T, class Out>
void add_layer_norm_forward_cpu(const AddLayerNormForward<T, Out>& problem, const Parallel& parallel) {
  parallel(problem.rows, kGrain, [&](int64_t begin, int64_t end) { forward_rows(problem, begin, end); });
}

template <class T, class Out>
void add_layer_norm_backward_cpu(const AddLayerNormBackward<T, Out>& problem, const Parallel& parallel) {
  if (problem.sums == 0) {
    parallel(problem.rows, kGrain, [&](int64_t begin, int64_t end) { backward_rows(problem, begin, end, nullptr); });
    return;
  }
  const int64_t parts = add_layer_norm_parts(problem.rows), sums = problem.sums * problem.width;
  parallel(parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      float* part = problem.parts + k * sums;
      std::fill_n(part, sums, 0.0f);
      backward_rows(problem, problem.rows * k / parts, problem.rows * (k + 1) / parts, part);
    }
  });
  std::fill_n(problem.d_sums, sums, 0.0f);
  for (int64_t k = 0; k < parts; ++k) {
    for (int64_t j = 0; j < sums; ++j) problem.d_sums[j] += problem.parts[k * sums + j];
  }
}

#define SCF_ADD_LAYER_NORM(T, Out)                                                               \
  template void add_layer_norm_forward_cpu(const AddLayerNormForward<T, Out>&, const Parallel&); \
  template void add_layer_norm_backward_cpu(const AddLayerNormBackward<T, Out>&, const Parallel&);
SCF_ADD_LAYER_NORM(float, float)
SCF_ADD_LAYER_NORM(BFloat16, BFloat16)
SCF_ADD_LAYER_NORM(BFloat16, float)
#undef SCF_ADD_LAYER_NORM

}  // namespace scf
