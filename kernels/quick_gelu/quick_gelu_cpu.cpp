#include "kernels/clones.h"
#include "kernels/fast_exp.h"
#include "kernels/quick_gelu/quick_gelu.h"

namespace scf {
namespace {

constexpr int64_t kGrain = 1 << 14;  // elements per thread: about 10 microseconds
constexpr float kSlope = 1.702f;

[[gnu::always_inline]] inline float sigmoid(float x) { return 1 / (1 + fast_exp(-x)); }

// Elements of other types pass through floats in the cache: GCC vectorises the arithmetic of mixed widths badly.
constexpr int64_t kChunk = 512;

template <class T>
[[gnu::always_inline]] inline void forward_range(const T* x, T* out, int64_t begin, int64_t end) {
  float values[kChunk];
  for (int64_t first = begin; first < end; first += kChunk) {
    const int64_t count = end - first < kChunk ? end - first : kChunk;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) values[i] = to_float(x[first + i]);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) values[i] *= sigmoid(kSlope * values[i]);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[first + i] = from_float<T>(values[i]);
  }
}

template <class T>
[[gnu::always_inline]] inline void backward_range(const T* grad, const T* x, T* out, int64_t begin, int64_t end) {
  float values[kChunk], slopes[kChunk];
  for (int64_t first = begin; first < end; first += kChunk) {
    const int64_t count = end - first < kChunk ? end - first : kChunk;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) values[i] = to_float(x[first + i]);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const float s = sigmoid(kSlope * values[i]);
      slopes[i] = s * (1 + kSlope * values[i] * (1 - s));
    }
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[first + i] = from_float<T>(to_float(grad[first + i]) * slopes[i]);
  }
}

// A template cannot have clones.
SCF_CLONES void forward_of(const float* x, float* out, int64_t begin, int64_t end) {
  forward_range(x, out, begin, end);
}
SCF_CLONES void forward_of(const BFloat16* x, BFloat16* out, int64_t begin, int64_t end) {
  forward_range(x, out, begin, end);
}
SCF_CLONES void backward_of(const float* grad, const float* x, float* out, int64_t begin, int64_t end) {
  backward_range(grad, x, out, begin, end);
}
SCF_CLONES void backward_of(const BFloat16* grad, const BFloat16* x, BFloat16* out, int64_t begin, int64_t end) {
  backward_range(grad, x, out, begin, end);
}

}  // namespace

template <class T>
void quick_gelu_forward_cpu(const T* x, T* out, int64_t size, const Parallel& parallel) {
  parallel(size, kGrain, [&](int64_t begin, int64_t end) { forward_of(x, out, begin, end); });
}

template <class T>
void quick_gelu_backward_cpu(const T* grad, const T* x, T* out, int64_t size, const Parallel& parallel) {
  parallel(size, kGrain, [&](int64_t begin, int64_t end) { backward_of(grad, x, out, begin, end); });
}

template void quick_gelu_forward_cpu(const float*, float*, int64_t, const Parallel&);
template void quick_gelu_forward_cpu(const BFloat16*, BFloat16*, int64_t, const Parallel&);
template void quick_gelu_backward_cpu(const float*, const float*, float*, int64_t, const Parallel&);
template void quick_gelu_backward_cpu(const BFloat16*, const BFloat16*, BFloat16*, int64_t, const Parallel&);

}  // namespace scf
