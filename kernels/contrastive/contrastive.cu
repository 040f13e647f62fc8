// The kernels of the backend "cuda" beside the tiles of logits (hopper/): norms, log-sums, factors of the gradients,
// and the gradients of the features. No atomics; sums have a fixed order.
#include <cstdint>

#include "kernels/contrastive/arithmetic.h"
#include "kernels/contrastive/contrastive.h"
#include "kernels/device_check.h"

namespace scf {
namespace {

constexpr unsigned kAll = 0xffffffff;
constexpr int kVector = 8;  // bfloat16 in 16 bytes

__device__ bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Eight entries from `first`, zeros past the end; one load where `vector`: the row is aligned and the eight lie in it.
__device__ void load_entries(const uint16_t* row, int64_t first, int64_t width, bool vector,
                             float (&entries)[kVector]) {
  if (vector) {
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(row + first));
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      entries[i] = bfloat16_to_float(static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16)));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      entries[i] = first + i < width ? bfloat16_to_float(__ldg(row + first + i)) : 0.0f;
    }
  }
}

__device__ float warp_sum(float value) {
  for (int bit = 16; bit > 0; bit /= 2) value += __shfl_xor_sync(kAll, value, bit);
  return value;
}

// Calls f(entry of a, entry of b) for this lane's share of two rows.
template <class F>
__device__ void for_each_entry(const uint16_t* a, const uint16_t* b, int64_t width, F f) {
  const bool both = aligned(a) && aligned(b);
  for (int64_t first = threadIdx.x % 32 * kVector; first < width; first += 32 * kVector) {
    const bool vector = both && first + kVector <= width;
    float left[kVector], right[kVector];
    load_entries(a, first, width, vector, left);
    load_entries(b, first, width, vector, right);
#pragma unroll
    for (int i = 0; i < kVector; ++i) f(left[i], right[i]);
  }
}

constexpr int kNormWarps = 4;

// A row per warp.
__global__ void __launch_bounds__(kNormWarps * 32) inverse_norms(const __grid_constant__ InverseNormsProblem p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kNormWarps + threadIdx.x / 32;
  if (row >= p.rows) return;
  float squares = 0;
  bool nonzero = false;  // squares of tiny entries vanish
  if (p.normalize) {
    const uint16_t* x = p.x + row * p.stride;
    for_each_entry(x, x, p.width, [&](float a, float) {
      squares = fmaf(a, a, squares);
      nonzero |= a != 0;
    });
  }
  squares = warp_sum(squares);
  nonzero = __any_sync(kAll, nonzero);
  if (threadIdx.x % 32 == 0) p.out[row] = inverse_norm(squares, nonzero, p.normalize);
}

constexpr int kSumRows = 32, kSumSlices = 8;

// 32 rows per block. Each of the eight warps adds every eighth part of all rows; then the warps' sums are added.
__global__ void __launch_bounds__(kSumRows* kSumSlices) finish_sums(const __grid_constant__ FinishSumsProblem p) {
  __shared__ double sums[kSumSlices][kSumRows];
  __shared__ double offsets[kSumRows];  // in base 2, to which the first row of sums is relative
  __shared__ RunningSum running[kSumSlices];
  __shared__ bool in_range[kSumRows];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Operands& operands = p.operands;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kSumRows;
  const int64_t row = first_row + lane;
  const float k2 = logit_scale(*operands.scale);
  double sum = 0;
  if (row < operands.rows) {
    for (int64_t part = warp; part < p.count; part += kSumSlices) sum += p.parts[part * operands.rows + row];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp == 0) {
    for (int slice = 1; slice < kSumSlices; ++slice) sum += sums[slice][lane];
    sums[0][lane] = sum;
    offsets[lane] = sum_offset(k2);
    in_range[lane] = row >= operands.rows || sum_in_range(sum);
  }
  __syncthreads();
  // Rare: once more with a running maximum. Each warp takes every eighth text.
  for (int i = 0; i < kSumRows; ++i) {
    if (in_range[i]) continue;
    const int64_t own = first_row + i;
    const uint16_t* x = operands.x + own * operands.x_stride;
    const float row_factor = operands.inv_x[own] * k2;
    RunningSum terms;
    for (int64_t text = warp; text < operands.texts; text += kSumSlices) {
      float dot = 0;
      for_each_entry(x, operands.y + text * operands.y_stride, operands.width,
                     [&](float a, float b) { dot = fmaf(a, b, dot); });
      terms.add(warp_sum(dot) * operands.inv_y[text] * row_factor, weight_of(p.weight, text));
    }
    if (lane == 0) running[warp] = terms;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int slice = 1; slice < kSumSlices; ++slice) terms.merge(running[slice]);
      sums[0][i] = terms.terms;
      offsets[i] = terms.top;
    }
    __syncthreads();
  }
  if (warp == 0 && row < operands.rows) {
    p.lse[row] = natural_log_sum(log2(sums[0][lane]) + offsets[lane], k2);
    if (p.positive != nullptr) p.positive[row] = positive_logit(p.own_exponent[row], k2);
  }
}

constexpr int kFactorThreads = 128;

// Rows in the first blocks, texts in the others.
__global__ void __launch_bounds__(kFactorThreads)
    factors(const __grid_constant__ FactorsProblem p, int64_t row_blocks) {
  const bool of_rows = blockIdx.x < row_blocks;
  const int64_t i = (blockIdx.x - (of_rows ? 0 : row_blocks)) * kFactorThreads + threadIdx.x;
  if (i >= (of_rows ? p.rows : p.texts)) return;
  const float k2 = logit_scale(*p.scale);
  if (of_rows) {
    p.row_out[i] = gradient_row(p.row_lse[i], p.grad_row[i], p.inv_x[i], k2, p.exponent);
    p.positive_gain[i] = positive_gain(p, i);
  } else {
    p.text_out[i] =
        gradient_text(p.column_lse[i], p.grad_column[i], p.inv_y[i], weight_of(p.weight, i), k2, p.exponent);
  }
}

constexpr int kFinishGroups = 4, kFinishGroupThreads = 128;

// A row per block, eight entries per thread. Groups of threads share the partners of a row, of which a text may have
// thousands.
template <int kGroups>
__global__ void __launch_bounds__(kGroups == 1 ? kFinishWidth / kFinishEntries : kGroups * kFinishGroupThreads)
    finish(const __grid_constant__ FinishProblem p) {
  __shared__ float shared[32];
  __shared__ float partial[kGroups][kFinishEntries][kGroups == 1 ? 1 : kFinishGroupThreads];
  const int64_t row = blockIdx.x, first = threadIdx.x * kFinishEntries;
  const bool whole = first + kFinishEntries <= p.width;
  float gradient[kFinishEntries] = {}, entries[kFinishEntries] = {};
  const int64_t begin = p.order != nullptr ? p.offsets[row] : 0, end = p.order != nullptr ? p.offsets[row + 1] : 1;
  SCF_DEVICE_CHECK(p.order == nullptr || (begin >= 0 && end <= p.order_size));
#pragma unroll 4
  for (int64_t position = begin + threadIdx.y; position < end; position += kGroups) {
    const int64_t partner = p.order != nullptr ? p.order[position] : positive_column(p.positives, row);
    const bool exists = partner >= 0 && partner < p.partner_rows;
    // Without a branch, so that the loads of several partners overlap.
    const float gain = exists ? p.gain[p.gain_of_partner ? partner : row] : 0.0f;
    const uint16_t* other = exists ? p.partners + partner * p.partner_stride : p.features;
    load_entries(other, first, p.width, whole && aligned(other), entries);
#pragma unroll
    for (int i = 0; i < kFinishEntries; ++i) gradient[i] = exists ? fmaf(gain, entries[i], gradient[i]) : gradient[i];
  }
  if constexpr (kGroups > 1) {
#pragma unroll
    for (int i = 0; i < kFinishEntries; ++i) partial[threadIdx.y][i][threadIdx.x] = gradient[i];
    __syncthreads();
    if (threadIdx.y > 0) return;
    for (int group = 1; group < kGroups; ++group) {
#pragma unroll
      for (int i = 0; i < kFinishEntries; ++i) gradient[i] += partial[group][i][threadIdx.x];
    }
  }
  const float* product = p.product + row * p.width;
  if (whole && aligned(product)) {
#pragma unroll
    for (int i = 0; i < kFinishEntries; i += 4) {
      const float4 four = __ldg(reinterpret_cast<const float4*>(product + first + i));
      gradient[i] += four.x, gradient[i + 1] += four.y, gradient[i + 2] += four.z, gradient[i + 3] += four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kFinishEntries; ++i) gradient[i] += first + i < p.width ? product[first + i] : 0.0f;
  }
  const uint16_t* features = p.features + row * p.feature_stride;
  load_entries(features, first, p.width, whole && aligned(features), entries);
  float dot = 0;
#pragma unroll
  for (int i = 0; i < kFinishEntries; ++i) dot = fmaf(entries[i], gradient[i], dot);
  dot = warp_sum(dot);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = dot;
  __syncthreads();
  dot = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) dot += shared[warp];
  if (threadIdx.x == 0) p.dots[row] = ldexpf(dot, -p.exponent);
  const float inverse = p.inverse[row], factor = ldexpf(*p.scale, -p.exponent);
  uint16_t* out = p.out + row * p.width;
  uint32_t words[kFinishEntries / 2];
#pragma unroll
  for (int i = 0; i < kFinishEntries; ++i) {
    const uint32_t bits = float_to_bfloat16(finished_entry(entries[i], gradient[i], dot, inverse, factor, p.normalize));
    if (i % 2 == 0) {
      words[i / 2] = bits;
    } else {
      words[i / 2] |= bits << 16;
    }
  }
  if (whole && aligned(out)) {
    *reinterpret_cast<uint4*>(out + first) = make_uint4(words[0], words[1], words[2], words[3]);
  } else {
#pragma unroll
    for (int i = 0; i < kFinishEntries; ++i) {
      if (first + i < p.width) out[first + i] = static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
    }
  }
}

int64_t blocks(int64_t count, int64_t each) { return (count + each - 1) / each; }

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, dim3 threads, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (blocks == 0) return nullptr;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = threads;
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // clear the error: it is reported here, not by the next call
  return cudaGetErrorString(error);
}

}  // namespace

const char* inverse_norms_cuda(const InverseNormsProblem& p, cudaStream_t stream) {
  return launch(inverse_norms, blocks(p.rows, kNormWarps), kNormWarps * 32, stream, p);
}

const char* finish_sums_cuda(const FinishSumsProblem& p, cudaStream_t stream) {
  return launch(finish_sums, blocks(p.operands.rows, kSumRows), kSumRows * kSumSlices, stream, p);
}

const char* factors_cuda(const FactorsProblem& p, cudaStream_t stream) {
  const int64_t of_rows = blocks(p.rows, kFactorThreads);
  return launch(factors, of_rows + blocks(p.texts, kFactorThreads), kFactorThreads, stream, p, of_rows);
}

const char* finish_cuda(const FinishProblem& p, cudaStream_t stream) {
  const int64_t warps = blocks(p.width, 32 * kFinishEntries), threads = 32 * (warps > 0 ? warps : 1);
  if (p.order != nullptr && threads <= kFinishGroupThreads) {
    return launch(finish<kFinishGroups>, p.rows, dim3(static_cast<unsigned>(threads), kFinishGroups), stream, p);
  }
  return launch(finish<1>, p.rows, dim3(static_cast<unsigned>(threads)), stream, p);
}

}  // namespace scf
