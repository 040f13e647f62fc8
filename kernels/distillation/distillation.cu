// One block per student row, which finds the row's pairs without a sort; sums are deterministic. Each warp processes
// one pair at a time. Teacher rows are read again for each pair; they stay in L2 (1,000 rows of 512 floats are 2 MB).
// The last block to finish adds up the contributions of all rows in row order.
#include <cstdint>

#include "kernels/device_check.h"
#include "kernels/distillation/distillation.h"
#include "kernels/distillation/pair.h"

namespace scf {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kBlocks = 8;  // per multiprocessor, with 64 registers: 1,056 rows at once on an H100
// Shared memory: the row, and each warp's sums over its pairs.
constexpr int kRows = 1 + kWarps;
constexpr int kStaticShared = 48 * 1024;  // available to a block without cudaFuncSetAttribute

struct Sum {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {
  // NaN propagates, so that it reaches the loss.
  __device__ float operator()(float a, float b) const { return (a > b || a != a) ? a : b; }
};

// Returns the same value in every thread of the warp.
template <class T, class Op>
__device__ T warp_reduce(T value, Op op) {
  for (int offset = 16; offset > 0; offset >>= 1) value = op(value, __shfl_xor_sync(~0u, value, offset));
  return value;
}

// Returns the same value in every thread of the block.
template <class T, class Op>
__device__ T block_reduce(T value, Op op, T* shared /* [kWarps] */) {
  value = warp_reduce(value, op);
  __syncthreads();  // readers of the previous reduction are done
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  value = shared[0];
  for (int w = 1; w < kWarps; ++w) value = op(value, shared[w]);
  return value;
}

// Adds the pair's sums to those of its warp, and scale * p to targets [width]; the row is in shared memory.
__device__ void add_pair(const DistillationProblem& p, int64_t pair, const float* row,
                         float inverse_student_temperature, float* targets, PairSums& sums) {
  const int width = static_cast<int>(p.width), lane = threadIdx.x % 32;
  const int64_t teacher_row = p.teacher_index[pair];
  SCF_DEVICE_CHECK(teacher_row >= 0 && teacher_row < p.teachers);
  const float* teacher = p.teacher + teacher_row * p.width;
  const float inverse_temperature = 1 / p.teacher_temperature;
  float largest = -INFINITY;
  for (int j = lane; j < width; j += 32) largest = Max()(teacher[j], largest);
  largest = warp_reduce(largest, Max());
  float sum = 0;
  for (int j = lane; j < width; j += 32) sum += expf((teacher[j] - largest) * inverse_temperature);
  sum = warp_reduce(sum, Sum());
  const float inverse_sum = 1 / sum, log_sum = largest * inverse_temperature + logf(sum);
  const float scale = p.weight[pair] / static_cast<float>(width);
  PairSums lane_sums;
  for (int j = lane; j < width; j += 32) {
    const float target = clamped_target(expf((teacher[j] - largest) * inverse_temperature), inverse_sum);
    lane_sums.mass += target;
    lane_sums.entropy += target * clamped_log_target(teacher[j] * inverse_temperature - log_sum);
    lane_sums.cross += target * row[j];
    targets[j] += scale * target;
  }
  sums.mass += scale * warp_reduce(lane_sums.mass, Sum());
  sums.entropy += scale * warp_reduce(lane_sums.entropy, Sum());
  sums.cross += scale * warp_reduce(lane_sums.cross, Sum()) * inverse_student_temperature;
}

__global__ void __launch_bounds__(kThreads, kBlocks) distillation(const __grid_constant__ DistillationProblem p) {
  extern __shared__ float dynamic[];  // [kRows, width]
  __shared__ float reduction[kWarps];
  __shared__ double reduction_64[kWarps];
  __shared__ unsigned matches[kWarps];
  __shared__ bool last;
  const int width = static_cast<int>(p.width), warp = threadIdx.x / 32;
  const int64_t s = blockIdx.x;
  const float temperature = p.student_temperature ? *p.student_temperature : p.student_temperature_value;
  const float inverse_temperature = 1 / temperature;
  float loss = 0, d_temperature = 0;

  // The grid has one block even without rows, to write zeros.
  if (s < p.students) {
    float* row = dynamic;
    float* targets = row + width;  // [kWarps, width]
    for (int j = threadIdx.x; j < width; j += kThreads) {
      row[j] = p.student[s * p.width + j];
      for (int w = 0; w < kWarps; ++w) targets[w * width + j] = 0;
    }
    PairSums sums;
    int found = 0;
    for (int64_t first = 0; first < p.pairs; first += kThreads) {
      const int64_t candidate = first + threadIdx.x;
      const unsigned ballot = __ballot_sync(~0u, candidate < p.pairs && p.student_index[candidate] == s);
      __syncthreads();  // the row is loaded, and the matches of the previous round have been read
      if (threadIdx.x % 32 == 0) matches[warp] = ballot;
      __syncthreads();
      for (int w = 0; w < kWarps; ++w) {
        for (unsigned remaining = matches[w]; remaining != 0; remaining &= remaining - 1, ++found) {
          if (found % kWarps == warp) {
            add_pair(p, first + w * 32 + __ffs(remaining) - 1, row, inverse_temperature, targets + warp * width, sums);
          }
        }
      }
    }
    // Every lane of a warp holds the same sums: add them once.
    const bool is_lane_0 = threadIdx.x % 32 == 0;
    sums.mass = block_reduce(is_lane_0 ? sums.mass : 0, Sum(), reduction);
    sums.entropy = block_reduce(is_lane_0 ? sums.entropy : 0, Sum(), reduction);
    sums.cross = block_reduce(is_lane_0 ? sums.cross : 0, Sum(), reduction);

    float largest = -INFINITY;
    for (int j = threadIdx.x; j < width; j += kThreads) largest = Max()(row[j], largest);
    largest = block_reduce(largest, Max(), reduction);
    float sum = 0;
    for (int j = threadIdx.x; j < width; j += kThreads) sum += expf((row[j] - largest) * inverse_temperature);
    sum = block_reduce(sum, Sum(), reduction);
    const float inverse_sum = 1 / sum, log_sum = largest * inverse_temperature + logf(sum);
    float mean = 0;
    for (int j = threadIdx.x; j < width; j += kThreads) {
      const float probability = expf((row[j] - largest) * inverse_temperature) * inverse_sum;
      mean += probability * row[j];
      float target = 0;
      for (int w = 0; w < kWarps; ++w) target += targets[w * width + j];
      // A row without pairs may hold any values, including infinities.
      const float gradient = found == 0 ? 0 : row_d_student(sums.mass, probability, target, temperature);
      if (p.d_student != nullptr) p.d_student[s * p.width + j] = gradient;
    }
    mean = block_reduce(mean, Sum(), reduction) * inverse_temperature;
    if (found > 0) {
      loss = row_loss(sums, log_sum, temperature);
      d_temperature = row_d_temperature(sums, log_sum, mean, temperature);
    }
  }

  float* losses = p.scratch;
  float* d_temperatures = losses + p.students;
  if (threadIdx.x == 0) {
    if (s < p.students) {
      losses[s] = loss;
      d_temperatures[s] = d_temperature;
    }
    __threadfence();
    // Wraps back to 0 at the last block, for the next launch.
    last = atomicInc(reinterpret_cast<unsigned*>(p.finished), gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  double total = 0, d_total = 0;
  for (int64_t i = threadIdx.x; i < p.students; i += kThreads) {
    total += __ldcg(losses + i);  // from L2: other blocks have written them
    d_total += __ldcg(d_temperatures + i);
  }
  total = block_reduce(total, Sum(), reduction_64);
  d_total = block_reduce(d_total, Sum(), reduction_64);
  if (threadIdx.x == 0) {
    *p.loss = static_cast<float>(total);
    *p.d_temperature = static_cast<float>(d_total);
  }
}

}  // namespace

const char* distillation_forward_cuda(const DistillationProblem& problem, cudaStream_t stream) {
  const int64_t shared = kRows * problem.width * static_cast<int64_t>(sizeof(float));
  if (shared > kStaticShared - 1024 && cudaFuncSetAttribute(distillation, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                            static_cast<int>(shared)) != cudaSuccess) {
    cudaGetLastError();  // clear the error: it is reported here, not by the next call
    return "the width is too large: five float32 rows exceed the shared memory of a block; use backend=\"reference\"";
  }
  const auto blocks = static_cast<unsigned>(problem.students > 0 ? problem.students : 1);
  distillation<<<blocks, kThreads, shared, stream>>>(problem);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace scf
