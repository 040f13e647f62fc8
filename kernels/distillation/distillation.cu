// One block per student row: it finds its own pairs, so that nothing is sorted, no atomics are used and the sums come
// out the same every time. Teacher rows are read again for each pair; they stay in L2 (1,000 rows of 512 floats are 2
// MB).
#include <cstdint>

#include "kernels/distillation/distillation.h"
#include "kernels/distillation/pair.h"

namespace scf {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kStaticShared = 48 * 1024;  // what a block may have without asking

struct Sum {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Max {
  // NaN wins, so that it reaches the loss.
  __device__ float operator()(float a, float b) const { return (a > b || a != a) ? a : b; }
};

// The same value in every thread.
template <class Op>
__device__ float block_reduce(float value, Op op, float* shared /* [kWarps] */) {
  for (int offset = 16; offset > 0; offset >>= 1) value = op(value, __shfl_xor_sync(~0u, value, offset));
  __syncthreads();  // the last reduction's readers are done
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  value = shared[0];
  for (int w = 1; w < kWarps; ++w) value = op(value, shared[w]);
  return value;
}

struct RowSoftmax {
  float largest;
  float inverse_sum;
  float log_sum;
};

__device__ RowSoftmax row_softmax(const float* row, int width, float temperature, float* shared) {
  float largest = -INFINITY;
  for (int j = threadIdx.x; j < width; j += kThreads) largest = Max()(row[j], largest);
  largest = block_reduce(largest, Max(), shared);
  float sum = 0;
  for (int j = threadIdx.x; j < width; j += kThreads) sum += expf((row[j] - largest) / temperature);
  sum = block_reduce(sum, Sum(), shared);
  return {largest, 1 / sum, largest / temperature + logf(sum)};
}

__global__ void __launch_bounds__(kThreads) distillation_rows(DistillationProblem p) {
  extern __shared__ float dynamic[];
  __shared__ float reduction[kWarps];
  __shared__ unsigned matches[kWarps];
  const int width = static_cast<int>(p.width);
  float* row = dynamic;                   // [width]
  float* probability = row + width;       // [width]
  float* gradient = probability + width;  // [width]
  const int64_t s = blockIdx.x;
  const float temperature = *p.student_temperature;

  for (int j = threadIdx.x; j < width; j += kThreads) {
    row[j] = p.student[s * p.width + j];
    gradient[j] = 0;
  }
  // Each thread reads back only what it wrote itself, but for the reductions, which synchronise.
  const RowSoftmax student = row_softmax(row, width, temperature, reduction);
  float mean = 0;
  for (int j = threadIdx.x; j < width; j += kThreads) {
    probability[j] = expf((row[j] - student.largest) / temperature) * student.inverse_sum;
    mean += probability[j] * row[j];
  }
  mean = block_reduce(mean, Sum(), reduction) / temperature;

  const float inverse_width = 1.0f / static_cast<float>(width);
  float loss = 0, d_temperature = 0;
  for (int64_t first = 0; first < p.pairs; first += kThreads) {
    const int64_t own = first + threadIdx.x;
    const unsigned ballot = __ballot_sync(~0u, own < p.pairs && p.student_index[own] == s);
    __syncthreads();  // everybody has read the last round's matches
    if (threadIdx.x % 32 == 0) matches[threadIdx.x / 32] = ballot;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) {
      for (unsigned left = matches[w]; left != 0; left &= left - 1) {
        const int64_t pair = first + w * 32 + __ffs(left) - 1;
        const float* target_row = p.teacher + p.teacher_index[pair] * p.width;
        const RowSoftmax teacher = row_softmax(target_row, width, p.teacher_temperature, reduction);
        const auto target = [&](int j) {
          return clamped_target(expf((target_row[j] - teacher.largest) / p.teacher_temperature), teacher.inverse_sum);
        };
        TargetSums sums;
        float cross = 0;
        for (int j = threadIdx.x; j < width; j += kThreads) {
          const float probability_j = target(j);
          sums.mass += probability_j;
          sums.entropy += probability_j * clamped_log_target(target_row[j] / p.teacher_temperature - teacher.log_sum);
          cross += probability_j * row[j];
        }
        sums.mass = block_reduce(sums.mass, Sum(), reduction);
        sums.entropy = block_reduce(sums.entropy, Sum(), reduction);
        cross = block_reduce(cross, Sum(), reduction) / temperature;
        const float scale = p.weight[pair] * inverse_width;
        loss += scale * pair_loss(sums, cross, student.log_sum, temperature);
        d_temperature += scale * pair_d_temperature(sums, cross, student.log_sum, mean, temperature);
        for (int j = threadIdx.x; j < width; j += kThreads) {
          gradient[j] += scale * pair_d_student(sums.mass, probability[j], target(j), temperature);
        }
      }
    }
  }
  if (threadIdx.x == 0) {
    p.loss[s] = loss;
    p.d_temperature[s] = d_temperature;
  }
  if (p.d_student != nullptr) {
    for (int j = threadIdx.x; j < width; j += kThreads) p.d_student[s * p.width + j] = gradient[j];
  }
}

}  // namespace

const char* distillation_forward_cuda(const DistillationProblem& problem, cudaStream_t stream) {
  if (problem.students == 0) return nullptr;
  const int64_t shared = 3 * problem.width * static_cast<int64_t>(sizeof(float));
  if (shared > kStaticShared - 1024) return "a row must have at most 4010 coordinates: use backend=\"reference\"";
  distillation_rows<<<static_cast<unsigned>(problem.students), kThreads, shared, stream>>>(problem);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace scf
