#include <algorithm>

#include "kernels/clones.h"
#include "kernels/fast_exp.h"
#include "kernels/quick_gelu/quick_gelu.h"

namespace scf {
namespace {

constexpr int64_t kGrain = 1 << 14;  // elements per thread: about 10 microseconds
constexpr int64_t kPartRows = 64, kMaxParts = 64;
constexpr float kSlope = 1.702f;

[[gnu::always_inline]] inline float sigmoid(float x) { return 1 / (1 + fast_exp(-x)); }

// Elements of other types pass through floats in the cache: GCC vectorises the arithmetic of mixed widths badly.
constexpr int64_t kChunk = 512;

template <class T>
[[gnu::always_inline]] inline void load(const T* x, const float* bias, float* values, int64_t first, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) values[i] = to_float(x[first + i]);
  if (bias == nullptr) return;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) values[i] += bias[first + i];
}

// bias: of the range's elements, or null.
template <class T>
[[gnu::always_inline]] inline void forward_range(const T* x, const float* bias, T* out, int64_t begin, int64_t end) {
  float values[kChunk];
  for (int64_t first = begin; first < end; first += kChunk) {
    const int64_t count = end - first < kChunk ? end - first : kChunk;
    load(x, bias, values, first, count);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) values[i] *= sigmoid(kSlope * values[i]);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[first + i] = from_float<T>(values[i]);
  }
}

// bias: of the range's elements, or null; the gradients are added to `sums`, of the same elements, unless it is null.
template <class T>
[[gnu::always_inline]] inline void backward_range(const T* grad, const T* x, const float* bias, T* out, float* sums,
                                                  int64_t begin, int64_t end) {
  float values[kChunk], slopes[kChunk];
  for (int64_t first = begin; first < end; first += kChunk) {
    const int64_t count = end - first < kChunk ? end - first : kChunk;
    load(x, bias, values, first, count);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const float s = sigmoid(kSlope * values[i]);
      slopes[i] = s * (1 + kSlope * values[i] * (1 - s));
    }
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[first + i] = from_float<T>(to_float(grad[first + i]) * slopes[i]);
    if (sums == nullptr) continue;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) sums[first + i] += to_float(grad[first + i]) * slopes[i];
  }
}

// A template cannot have clones.
#define SCF_QUICK_GELU(T)                                                                                 \
  SCF_CLONES void forward_of(const T* x, T* out, int64_t begin, int64_t end) {                            \
    forward_range(x, nullptr, out, begin, end);                                                           \
  }                                                                                                       \
  SCF_CLONES void backward_of(const T* grad, const T* x, T* out, int64_t begin, int64_t end) {            \
    backward_range(grad, x, nullptr, out, nullptr, begin, end);                                           \
  }                                                                                                       \
  SCF_CLONES void forward_rows(const QuickGeluForward<T>& p, int64_t begin, int64_t end) {                \
    for (int64_t row = begin; row < end; ++row) {                                                         \
      forward_range(p.x + row * p.width, p.bias, p.out + row * p.width, 0, p.width);                      \
    }                                                                                                     \
  }                                                                                                       \
  SCF_CLONES void backward_rows(const QuickGeluBackward<T>& p, int64_t begin, int64_t end, float* part) { \
    for (int64_t row = begin; row < end; ++row) {                                                         \
      const int64_t start = row * p.width;                                                                \
      backward_range(p.grad + start, p.x + start, p.bias, p.out + start, part, 0, p.width);               \
    }                                                                                                     \
  }
SCF_QUICK_GELU(float)
SCF_QUICK_GELU(BFloat16)
#undef SCF_QUICK_GELU

int64_t row_grain(int64_t width) { return std::max<int64_t>(kGrain / std::max<int64_t>(width, 1), 1); }

}  // namespace

template <class T>
void quick_gelu_forward_cpu(const T* x, T* out, int64_t size, const Parallel& parallel) {
  parallel(size, kGrain, [&](int64_t begin, int64_t end) { forward_of(x, out, begin, end); });
}

template <class T>
void quick_gelu_backward_cpu(const T* grad, const T* x, T* out, int64_t size, const Parallel& parallel) {
  parallel(size, kGrain, [&](int64_t begin, int64_t end) { backward_of(grad, x, out, begin, end); });
}

int64_t quick_gelu_parts(int64_t rows) { return std::min((rows + kPartRows - 1) / kPartRows, kMaxParts); }

template <class T>
void quick_gelu_bias_forward_cpu(const QuickGeluForward<T>& problem, const Parallel& parallel) {
  parallel(problem.rows, row_grain(problem.width),
           [&](int64_t begin, int64_t end) { forward_rows(problem, begin, end); });
}

template <class T>
void quick_gelu_bias_backward_cpu(const QuickGeluBackward<T>& problem, const Parallel& parallel) {
  const int64_t rows = problem.rows, width = problem.width;
  if (problem.d_bias == nullptr) {
    parallel(rows, row_grain(width), [&](int64_t begin, int64_t end) { backward_rows(problem, begin, end, nullptr); });
    return;
  }
  const int64_t parts = quick_gelu_parts(rows);
  parallel(parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      float* part = problem.parts + k * width;
      std::fill_n(part, width, 0.0f);
      backward_rows(problem, rows * k / parts, rows * (k + 1) / parts, part);
    }
  });
  std::fill_n(problem.d_bias, width, 0.0f);
  for (int64_t k = 0; k < parts; ++k) {
    for (int64_t j = 0; j < width; ++j) problem.d_bias[j] += problem.parts[k * width + j];
  }
}

template void quick_gelu_forward_cpu(const float*, float*, int64_t, const Parallel&);
template void quick_gelu_forward_cpu(const BFloat16*, BFloat16*, int64_t, const Parallel&);
template void quick_gelu_backward_cpu(const float*, const float*, float*, int64_t, const Parallel&);
template void quick_gelu_backward_cpu(const BFloat16*, const BFloat16*, BFloat16*, int64_t, const Parallel&);
template void quick_gelu_bias_forward_cpu(const QuickGeluForward<float>&, const Parallel&);
template void quick_gelu_bias_forward_cpu(const QuickGeluForward<BFloat16>&, const Parallel&);
template void quick_gelu_bias_backward_cpu(const QuickGeluBackward<float>&, const Parallel&);
template void quick_gelu_bias_backward_cpu(const QuickGeluBackward<BFloat16>&, const Parallel&);

}  // namespace scf
