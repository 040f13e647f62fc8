// Launchers of the distillation loss: see README.md for the formula. Raw pointers and sizes, no torch headers.
#pragma once

#include <cstdint>

#include "kernels/parallel.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#elif defined(USE_CUDA)
#include <driver_types.h>
#endif

namespace scf {

struct DistillationProblem {
  const float* student;              // [students, width]
  const float* teacher;              // [teachers, width]
  const int64_t* student_index;      // [pairs]
  const int64_t* teacher_index;      // [pairs]
  const float* weight;               // [pairs]
  const float* student_temperature;  // [], or null: use student_temperature_value
  float student_temperature_value;
  float teacher_temperature;
  int64_t students;
  int64_t teachers;
  int64_t pairs;
  int64_t width;
  float* loss;               // []
  float* d_student;          // [students, width], or null if no gradient is requested
  float* d_temperature;      // []
  float* scratch;            // [distillation_scratch(problem)]
  int64_t* order = nullptr;  // CPU: [students + 1 + pairs]
  int* finished = nullptr;   // CUDA: [] number of finished blocks; 0 before and after the kernel
};

// In floats: the contribution of each student row to the loss and to d_temperature and, on the CPU, the teacher
// targets.
inline int64_t distillation_scratch(const DistillationProblem& p, bool cuda) {
  return 2 * p.students + (cuda ? 0 : p.teachers * (p.width + 2));
}

void distillation_forward_cpu(const DistillationProblem& problem, Parallel parallel);

#if defined(__CUDACC__) || defined(USE_CUDA)
// Null on success, otherwise CUDA's error message.
const char* distillation_forward_cuda(const DistillationProblem& problem, cudaStream_t stream);
#endif

}  // namespace scf
