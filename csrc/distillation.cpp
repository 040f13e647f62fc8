// Checks and allocation for kernels/distillation; compiled once for the CPU library, once more for the CUDA one.
#include "kernels/distillation/distillation.h"

#include <tuple>

#include "check.h"
#include "parallel.h"

namespace scf {
namespace {

std::tuple<Tensor, Tensor, Tensor> distillation_forward(const Tensor& student,              // [S, D]
                                                        const Tensor& teacher,              // [T, D]
                                                        const Tensor& student_index,        // [P]
                                                        const Tensor& teacher_index,        // [P]
                                                        const Tensor& weight,               // [P]
                                                        const Tensor& student_temperature,  // []
                                                        double teacher_temperature, bool with_gradient) {
  check_tensor(student, "student", 2, ScalarType::Float);
  check_tensor(teacher, "teacher", 2, ScalarType::Float);
  check_size(teacher, "teacher", 1, student.size(1));
  check_tensor(student_index, "student_index", 1, ScalarType::Long);
  check_tensor(teacher_index, "teacher_index", 1, ScalarType::Long);
  check_tensor(weight, "weight", 1, ScalarType::Float);
  check_size(teacher_index, "teacher_index", 0, student_index.size(0));
  check_size(weight, "weight", 0, student_index.size(0));
  check_tensor(student_temperature, "student_temperature", 0, ScalarType::Float);

  const int64_t rows = student.size(0);
  Tensor loss = empty_like_device(student, {rows}, ScalarType::Float);
  Tensor d_student = empty_like_device(student, {with_gradient ? rows : 0, student.size(1)}, ScalarType::Float);
  Tensor d_temperature = empty_like_device(student, {rows}, ScalarType::Float);

  DistillationProblem problem{
      .student = student.const_data_ptr<float>(),
      .teacher = teacher.const_data_ptr<float>(),
      .student_index = student_index.const_data_ptr<int64_t>(),
      .teacher_index = teacher_index.const_data_ptr<int64_t>(),
      .weight = weight.const_data_ptr<float>(),
      .student_temperature = student_temperature.const_data_ptr<float>(),
      .teacher_temperature = static_cast<float>(teacher_temperature),
      .students = rows,
      .teachers = teacher.size(0),
      .pairs = student_index.size(0),
      .width = student.size(1),
      .loss = loss.mutable_data_ptr<float>(),
      .d_student = with_gradient ? d_student.mutable_data_ptr<float>() : nullptr,
      .d_temperature = d_temperature.mutable_data_ptr<float>(),
  };
#ifdef USE_CUDA
  const char* error = distillation_forward_cuda(problem, current_stream(student));
  STD_TORCH_CHECK(error == nullptr, "distillation_forward: ", error);
#else
  // Scratch: each teacher row's clamped softmax, computed once however many pairs it is in.
  Tensor scratch = empty_like_device(student, {distillation_scratch(problem)}, ScalarType::Float);
  Tensor order = empty_like_device(student, {rows + 1 + problem.pairs}, ScalarType::Long);
  problem.scratch = scratch.mutable_data_ptr<float>();
  problem.order = order.mutable_data_ptr<int64_t>();
  distillation_forward_cpu(problem, torch_threads());
#endif
  return {loss, d_student, d_temperature};
}

}  // namespace
}  // namespace scf

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(scenarioclip_fast_C, CUDA, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(scenarioclip_fast_C, CPU, m) {
#endif
  m.impl("distillation_forward", TORCH_BOX(&scf::distillation_forward));
}
