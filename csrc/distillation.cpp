// Checks and allocation for kernels/distillation; compiled for the CPU library and, with USE_CUDA, for the CUDA one.
#include "kernels/distillation/distillation.h"

#include <optional>
#include <tuple>

#include "check.h"
#include "parallel.h"

#ifdef USE_CUDA
#include <torch/csrc/stable/accelerator.h>
#endif

namespace scf {
namespace {

#ifdef USE_CUDA
using torch::stable::accelerator::DeviceGuard;
#endif

// Returns the loss [] and all derivatives in one tensor, so that one multiplication scales them: with respect to the
// student [students * width], if requested, and to the temperature [1] at the end.
std::tuple<Tensor, Tensor> distillation_forward(const Tensor& student,                             // [S, D]
                                                const Tensor& teacher,                             // [T, D]
                                                const Tensor& student_index,                       // [P]
                                                const Tensor& teacher_index,                       // [P]
                                                const Tensor& weight,                              // [P]
                                                const std::optional<Tensor>& student_temperature,  // []
                                                double student_temperature_value, double teacher_temperature,
                                                bool with_gradient, const std::optional<Tensor>& finished) {
  check_tensor(student, "student", 2, ScalarType::Float);
  check_tensor(teacher, "teacher", 2, ScalarType::Float);
  check_size(teacher, "teacher", 1, student.size(1));
  check_tensor(student_index, "student_index", 1, ScalarType::Long);
  check_tensor(teacher_index, "teacher_index", 1, ScalarType::Long);
  check_tensor(weight, "weight", 1, ScalarType::Float);
  check_size(teacher_index, "teacher_index", 0, student_index.size(0));
  check_size(weight, "weight", 0, student_index.size(0));
  if (student_temperature) {
    check_tensor(*student_temperature, "student_temperature", 0, ScalarType::Float);
  } else {
    check_positive(student_temperature_value, "student_temperature_value");
  }
  check_positive(teacher_temperature, "teacher_temperature");
#ifndef USE_CUDA  // values on a device are not read on the host; the kernel checks the indices that it uses
  STD_TORCH_CHECK(!student_temperature || !(*student_temperature->const_data_ptr<float>() <= 0),
                  "student_temperature: got a number that is not above 0");
  check_indices(student_index.const_data_ptr<int64_t>(), student_index.numel(), "student_index", student.size(0));
  check_indices(teacher_index.const_data_ptr<int64_t>(), teacher_index.numel(), "teacher_index", teacher.size(0));
#endif

  const int64_t rows = student.size(0), student_derivatives = with_gradient ? rows * student.size(1) : 0;
  Tensor loss = empty_like_device(student, {}, ScalarType::Float);
  Tensor derivatives = empty_like_device(student, {student_derivatives + 1}, ScalarType::Float);

  DistillationProblem problem{
      .student = student.const_data_ptr<float>(),
      .teacher = teacher.const_data_ptr<float>(),
      .student_index = student_index.const_data_ptr<int64_t>(),
      .teacher_index = teacher_index.const_data_ptr<int64_t>(),
      .weight = weight.const_data_ptr<float>(),
      .student_temperature = student_temperature ? student_temperature->const_data_ptr<float>() : nullptr,
      .student_temperature_value = static_cast<float>(student_temperature_value),
      .teacher_temperature = static_cast<float>(teacher_temperature),
      .students = rows,
      .teachers = teacher.size(0),
      .pairs = student_index.size(0),
      .width = student.size(1),
      .loss = loss.mutable_data_ptr<float>(),
      .d_student = with_gradient ? derivatives.mutable_data_ptr<float>() : nullptr,
      .d_temperature = derivatives.mutable_data_ptr<float>() + student_derivatives,
      .scratch = nullptr,
  };
  Tensor scratch = empty_like_device(student, {distillation_scratch(problem, kCuda)}, ScalarType::Float);
  problem.scratch = scratch.mutable_data_ptr<float>();
#ifdef USE_CUDA
  STD_TORCH_CHECK(finished.has_value(), "finished: got None, expected a zeroed counter on the device");
  check_tensor(*finished, "finished", 0, ScalarType::Int);
  problem.finished = finished->mutable_data_ptr<int>();
  const DeviceGuard guard(student.get_device_index());
  const char* error = distillation_forward_cuda(problem, current_stream(student));
  STD_TORCH_CHECK(error == nullptr, "distillation_forward: ", error);
#else
  STD_TORCH_CHECK(!finished.has_value(), "finished: got a tensor, expected None on the CPU");
  Tensor order = empty_like_device(student, {rows + 1 + problem.pairs}, ScalarType::Long);
  problem.order = order.mutable_data_ptr<int64_t>();
  distillation_forward_cpu(problem, torch_threads());
#endif
  return {loss, derivatives};
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
