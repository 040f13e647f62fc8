// Bindings of kernels/contrastive.
#include "kernels/contrastive/contrastive.h"

#include <optional>
#include <string>

#include "check.h"

#ifdef USE_CUDA
#include <torch/csrc/stable/accelerator.h>

#include "kernels/contrastive/arguments.h"

// The backend "cuda": arguments are checked in kernels/contrastive/arguments.h. What tensors on the device hold is not
// read here: the kernels skip positives and partners that do not exist, and check offsets (kernels/device_check.h).
namespace scf {
namespace {

using OptionalTensor = std::optional<Tensor>;

Type type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16:
      return Type::kBfloat16;
    case ScalarType::Float:
      return Type::kFloat;
    case ScalarType::Double:
      return Type::kDouble;
    case ScalarType::Int:
      return Type::kInt;
    case ScalarType::Long:
      return Type::kLong;
    default:
      return Type::kOther;
  }
}

Argument argument(const Tensor& tensor, const char* name) {
  Argument out{.name = name,
               .data = tensor.data_ptr(),
               .type = type_of(tensor),
               .device = tensor.is_cuda() ? tensor.get_device_index() : -1,
               .dim = tensor.dim()};
  for (int64_t d = 0; d < out.dim && d < 2; ++d) {
    out.size[d] = tensor.size(d);
    out.stride[d] = tensor.stride(d);
  }
  if (tensor.numel() > 0 && out.dim <= 2) {
    check_storage(tensor, name, (out.size[0] - 1) * out.stride[0] + (out.size[1] - 1) * out.stride[1]);
  }
  return out;
}

Argument argument(const OptionalTensor& tensor, const char* name) {
  return tensor ? argument(*tensor, name) : Argument{};
}

template <class Launch>
void run(const char* op, const std::string& error, const Tensor& on, Launch launch) {
  STD_TORCH_CHECK(error.empty(), op, ": ", error);
  const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
  const char* failure = launch(current_stream(on));
  STD_TORCH_CHECK(failure == nullptr, op, ": ", failure);
}

void contrastive_inverse_norms(const Tensor& x,  // [N, D]
                               bool normalize,
                               const Tensor& out) {  // [N]
  InverseNormsProblem problem;
  run("contrastive_inverse_norms", check_inverse_norms(argument(x, "x"), normalize, argument(out, "out"), problem), x,
      [&](cudaStream_t stream) { return inverse_norms_cuda(problem, stream); });
}

void contrastive_finish_sums(const Tensor& parts,                 // [tiles, N]
                             const Tensor& x,                     // [N, D]
                             const Tensor& y,                     // [U, D]
                             const Tensor& inv_x,                 // [N]
                             const Tensor& inv_y,                 // [U]
                             const Tensor& scale,                 // [1]
                             const OptionalTensor& weight,        // [U]
                             const OptionalTensor& own_exponent,  // [N]
                             const Tensor& lse,                   // [N]
                             const OptionalTensor& positive) {    // [N]
  FinishSumsProblem problem;
  const FinishSumsArguments arguments{
      .parts = argument(parts, "parts"),
      .operands = {argument(x, "x"), argument(y, "y"), argument(inv_x, "inv_x"), argument(inv_y, "inv_y"),
                   argument(scale, "scale")},
      .weight = argument(weight, "weight"),
      .own_exponent = argument(own_exponent, "own_exponent"),
      .lse = argument(lse, "lse"),
      .positive = argument(positive, "positive"),
  };
  run("contrastive_finish_sums", check_finish_sums(arguments, problem), x,
      [&](cudaStream_t stream) { return finish_sums_cuda(problem, stream); });
}

void contrastive_factors(const Tensor& row_lse,        // [N]
                         const Tensor& col_lse,        // [U]
                         const Tensor& positive,       // [N]
                         const Tensor& grad_row,       // [N]
                         const Tensor& grad_col,       // [U]
                         const Tensor& grad_positive,  // [N]
                         const Tensor& inv_x,          // [N]
                         const Tensor& inv_y,          // [U]
                         const Tensor& scale,          // [1]
                         const OptionalTensor& index,  // [N]
                         int64_t first,
                         const OptionalTensor& weight,  // [U]
                         int64_t exponent,
                         const Tensor& rows,             // [N, 8]
                         const Tensor& texts,            // [U, 8]
                         const Tensor& positive_gain) {  // [N]
  FactorsProblem problem;
  const FactorsArguments arguments{
      .row_lse = argument(row_lse, "row_lse"),
      .column_lse = argument(col_lse, "col_lse"),
      .positive = argument(positive, "positive"),
      .grad_row = argument(grad_row, "grad_row"),
      .grad_column = argument(grad_col, "grad_col"),
      .grad_positive = argument(grad_positive, "grad_positive"),
      .inv_x = argument(inv_x, "inv_x"),
      .inv_y = argument(inv_y, "inv_y"),
      .scale = argument(scale, "scale"),
      .index = argument(index, "index"),
      .first = first,
      .weight = argument(weight, "weight"),
      .exponent = exponent,
      .rows = argument(rows, "rows"),
      .texts = argument(texts, "texts"),
      .positive_gain = argument(positive_gain, "positive_gain"),
  };
  run("contrastive_factors", check_factors(arguments, problem), row_lse,
      [&](cudaStream_t stream) { return factors_cuda(problem, stream); });
}

void finish(const char* op, const FinishArguments& arguments, const Tensor& features) {
  FinishProblem problem;
  run(op, check_finish(arguments, problem), features,
      [&](cudaStream_t stream) { return finish_cuda(problem, stream); });
}

void contrastive_finish_rows(const Tensor& features,       // [N, D]
                             const Tensor& inverse,        // [N]
                             const Tensor& product,        // [N, D]
                             const Tensor& partners,       // [U, D]
                             const OptionalTensor& index,  // [N]
                             int64_t first,
                             const Tensor& gain,   // [N]
                             const Tensor& scale,  // [1]
                             int64_t exponent, bool normalize,
                             const Tensor& out,     // [N, D]
                             const Tensor& dots) {  // [N]
  finish("contrastive_finish_rows",
         {argument(features, "features"), argument(inverse, "inverse"), argument(product, "product"),
          argument(partners, "partners"), argument(index, "index"), Argument{}, first, argument(gain, "gain"),
          argument(scale, "scale"), exponent, normalize, argument(out, "out"), argument(dots, "dots"), false},
         features);
}

void contrastive_finish_texts(const Tensor& features,         // [U, D]
                              const Tensor& inverse,          // [U]
                              const Tensor& product,          // [U, D]
                              const Tensor& partners,         // [N, D]
                              const OptionalTensor& order,    // [N]
                              const OptionalTensor& offsets,  // [U + 1]
                              int64_t first,
                              const Tensor& gain,   // [N]
                              const Tensor& scale,  // [1]
                              int64_t exponent, bool normalize,
                              const Tensor& out,     // [U, D]
                              const Tensor& dots) {  // [U]
  finish("contrastive_finish_texts",
         {argument(features, "features"), argument(inverse, "inverse"), argument(product, "product"),
          argument(partners, "partners"), argument(order, "order"), argument(offsets, "offsets"), first,
          argument(gain, "gain"), argument(scale, "scale"), exponent, normalize, argument(out, "out"),
          argument(dots, "dots"), true},
         features);
}

#ifdef SCF_HOPPER
// Of the tensor's device: 90 for 9.0.
int capability(const Tensor& tensor) {
  if (!tensor.is_cuda()) return 0;
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, tensor.get_device_index());
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, tensor.get_device_index());
  return 10 * major + minor;
}

void contrastive_sums(const Tensor& x,              // [N, D]
                      const Tensor& y,              // [U, D]
                      const Tensor& inv_x,          // [N]
                      const Tensor& inv_y,          // [U]
                      const Tensor& scale,          // [1]
                      const OptionalTensor& index,  // [N]
                      int64_t first,
                      const OptionalTensor& weight,  // [U]
                      const Tensor& row_parts,       // [tiles, N]
                      const Tensor& col_parts,       // [tiles, U]
                      const Tensor& own_exponent) {  // [N]
  SumsProblem problem;
  const SumsArguments arguments{
      .operands = {argument(x, "x"), argument(y, "y"), argument(inv_x, "inv_x"), argument(inv_y, "inv_y"),
                   argument(scale, "scale")},
      .index = argument(index, "index"),
      .first = first,
      .weight = argument(weight, "weight"),
      .row_parts = argument(row_parts, "row_parts"),
      .column_parts = argument(col_parts, "col_parts"),
      .own_exponent = argument(own_exponent, "own_exponent"),
  };
  run("contrastive_sums", check_sums(arguments, capability(x), problem), x,
      [&](cudaStream_t stream) { return sums_hopper(problem, stream); });
}

void contrastive_gradients(const Tensor& x,              // [N, D]
                           const Tensor& y,              // [U, D]
                           const OptionalTensor& index,  // [N]
                           int64_t first,
                           const Tensor& rows,   // [N, 8]
                           const Tensor& texts,  // [U, 8]
                           const Tensor& out) {  // [N, at least U]
  GradientsProblem problem;
  const GradientsArguments arguments{
      .operands = {.x = argument(x, "x"), .y = argument(y, "y")},
      .index = argument(index, "index"),
      .first = first,
      .rows = argument(rows, "rows"),
      .texts = argument(texts, "texts"),
      .out = argument(out, "out"),
  };
  run("contrastive_gradients", check_gradients(arguments, capability(x), problem), x,
      [&](cudaStream_t stream) { return gradients_hopper(problem, stream); });
}
#endif

}  // namespace
}  // namespace scf

STABLE_TORCH_LIBRARY_IMPL(scenarioclip_fast_C, CUDA, m) {
  m.impl("contrastive_inverse_norms", TORCH_BOX(&scf::contrastive_inverse_norms));
  m.impl("contrastive_finish_sums", TORCH_BOX(&scf::contrastive_finish_sums));
  m.impl("contrastive_factors", TORCH_BOX(&scf::contrastive_factors));
  m.impl("contrastive_finish_rows", TORCH_BOX(&scf::contrastive_finish_rows));
  m.impl("contrastive_finish_texts", TORCH_BOX(&scf::contrastive_finish_texts));
#ifdef SCF_HOPPER
  m.impl("contrastive_sums", TORCH_BOX(&scf::contrastive_sums));
  m.impl("contrastive_gradients", TORCH_BOX(&scf::contrastive_gradients));
#endif
}
#endif  // USE_CUDA
