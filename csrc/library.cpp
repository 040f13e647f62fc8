// The schemas of all compiled ops. Kernels are registered in the file of their op. Fake kernels and autograd belong to
// the Python ops that call these (scenarioclip_fast/ops); nothing else may call them.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(scenarioclip_fast_C, m) {
  m.def(
      "distillation_forward(Tensor student, Tensor teacher, Tensor student_index, Tensor teacher_index, Tensor weight, "
      "Tensor? student_temperature, float student_temperature_value, float teacher_temperature, bool with_gradient, "
      "Tensor(a!)? finished) -> (Tensor, Tensor)");
  m.def(
      "focused_region(Tensor image, Tensor subject_mask, Tensor object_mask, float sigma, int[] weights, bool colours) "
      "-> Tensor");
  m.def(
      "render_views(Tensor[] images, Tensor plan, Tensor augment, Tensor mask_runs, Tensor mask_start, int size, "
      "float[] mean, float[] std, float sigma, int[] weights, bool colours, ScalarType dtype, bool channels_last) "
      "-> Tensor");
}
