// The schemas of all compiled ops. Kernels are registered in the file of their op. Fake kernels and autograd belong to
// the Python ops that call these (scenarioclip_fast/ops); nothing else should call them. Called with anything, they
// raise an error or return, without reading or writing out of bounds (tests/faults/test_raw_ops.py). Values on a device
// are the exception, because the host does not read them: kernels check the indices that they use, and an invalid one
// either has no effect or ends the kernel with an assertion (kernels/device_check.h).
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(scenarioclip_fast_C, m) {
  // The backend "cuda" of contrastive_loss. Outputs are allocated by the caller; kernels/contrastive/contrastive.h
  // describes the arguments. The last two need compute capability 9.0.
  m.def("contrastive_inverse_norms(Tensor x, bool normalize, Tensor(a!) out) -> ()");
  m.def(
      "contrastive_finish_sums(Tensor parts, Tensor x, Tensor y, Tensor inv_x, Tensor inv_y, Tensor scale, "
      "Tensor? weight, Tensor? own_exponent, Tensor(a!) lse, Tensor(b!)? positive) -> ()");
  m.def(
      "contrastive_factors(Tensor row_lse, Tensor col_lse, Tensor positive, Tensor grad_row, Tensor grad_col, "
      "Tensor grad_positive, Tensor inv_x, Tensor inv_y, Tensor scale, Tensor? index, int first, Tensor? weight, "
      "int exponent, Tensor(a!) rows, Tensor(b!) texts, Tensor(c!) positive_gain) -> ()");
  m.def(
      "contrastive_finish_rows(Tensor features, Tensor inverse, Tensor product, Tensor partners, Tensor? index, "
      "int first, Tensor gain, Tensor scale, int exponent, bool normalize, Tensor(a!) out, Tensor(b!) dots) -> ()");
  m.def(
      "contrastive_finish_texts(Tensor features, Tensor inverse, Tensor product, Tensor partners, Tensor? order, "
      "Tensor? offsets, int first, Tensor gain, Tensor scale, int exponent, bool normalize, Tensor(a!) out, "
      "Tensor(b!) dots) -> ()");
  m.def(
      "contrastive_sums(Tensor x, Tensor y, Tensor inv_x, Tensor inv_y, Tensor scale, Tensor? index, int first, "
      "Tensor? weight, Tensor(a!) row_parts, Tensor(b!) col_parts, Tensor(c!) own_exponent) -> ()");
  m.def(
      "contrastive_gradients(Tensor x, Tensor y, Tensor? index, int first, Tensor rows, Tensor texts, "
      "Tensor(a!) out) -> ()");
  // The element-wise passes of the backend "cpu" of contrastive_loss.
  m.def("contrastive_cpu_inverse(Tensor[] matrices, bool normalize) -> Tensor");
  m.def(
      "contrastive_cpu_exponentials(Tensor(a!) values, Tensor by_row, Tensor by_text, Tensor? weight, Tensor? index, "
      "int first_row, int first_text, float scale, float offset, Tensor(b!) row_sum, Tensor(c!) col_sum, "
      "Tensor(d!) positive) -> ()");
  m.def(
      "contrastive_cpu_factors(Tensor row_lse, Tensor col_lse, Tensor grad_row, Tensor grad_col, Tensor grad_logit, "
      "Tensor by_row, Tensor by_text, Tensor? weight, float offset) -> (Tensor, float, bool)");
  m.def(
      "contrastive_cpu_gradients(Tensor source, bool kept, Tensor factors, Tensor by_row, Tensor by_text, Tensor? "
      "index, "
      "int first_row, int first_text, float scale, float offset, Tensor(a!) out) -> ()");
  m.def("contrastive_cpu_finish(Tensor x, Tensor inverse, float factor, bool normalize, Tensor(a!) d) -> float");
  m.def("contrastive_cpu_large_pages(Tensor(a!) memory) -> ()");
  m.def(
      "distillation_forward(Tensor student, Tensor teacher, Tensor student_index, Tensor teacher_index, Tensor weight, "
      "Tensor? student_temperature, float student_temperature_value, float teacher_temperature, bool with_gradient, "
      "Tensor(a!)? finished) -> (Tensor, Tensor)");
  m.def("quick_gelu_forward(Tensor x, Tensor? bias) -> Tensor");
  m.def("quick_gelu_backward(Tensor grad, Tensor x, Tensor? bias, bool with_sums) -> (Tensor, Tensor)");
  m.def(
      "add_layer_norm_forward(Tensor x, Tensor? branch, Tensor weight, Tensor bias, Tensor? branch_bias, float eps, "
      "ScalarType dtype) -> (Tensor, Tensor, Tensor)");
  m.def(
      "add_layer_norm_backward(Tensor? d_total, Tensor d_normed, Tensor total, Tensor weight, Tensor statistics, "
      "int sums) -> (Tensor, Tensor)");
  m.def(
      "focused_region(Tensor image, Tensor subject_mask, Tensor object_mask, float sigma, int[] weights, bool "
      "published) "
      "-> Tensor");
  m.def(
      "render_views(Tensor[] images, Tensor plan, Tensor augment, Tensor mask_runs, Tensor mask_start, float[] mean, "
      "float[] std, float sigma, int[] weights, bool published, bool channels_last, Tensor(a!) out) -> ()");
}
