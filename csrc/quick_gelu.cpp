// Checks and allocation for kernels/quick_gelu; compiled for the CPU library only.
#include "kernels/quick_gelu/quick_gelu.h"

#include "check.h"
#include "parallel.h"

namespace scf {
namespace {

// Requires a contiguous float32 or bfloat16 tensor on the CPU; returns whether it is float32.
bool is_float(const Tensor& x, const char* name) {
  const bool single = x.scalar_type() == ScalarType::Float;
  check_tensor(x, name, x.dim(), single ? ScalarType::Float : ScalarType::BFloat16);
  return single;
}

template <class T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

Tensor quick_gelu_forward(const Tensor& x) {
  const bool single = is_float(x, "x");
  Tensor out = torch::stable::empty_like(x);
  if (single) {
    quick_gelu_forward_cpu(data<float>(x), static_cast<float*>(out.mutable_data_ptr()), x.numel(), torch_threads());
  } else {
    quick_gelu_forward_cpu(data<BFloat16>(x), static_cast<BFloat16*>(out.mutable_data_ptr()), x.numel(),
                           torch_threads());
  }
  return out;
}

Tensor quick_gelu_backward(const Tensor& grad, const Tensor& x) {
  const bool single = is_float(x, "x");
  check_tensor(grad, "grad", grad.dim(), x.scalar_type());
  STD_TORCH_CHECK(grad.numel() == x.numel(), "grad: got ", grad.numel(), " elements, expected ", x.numel());
  Tensor out = torch::stable::empty_like(x);
  if (single) {
    quick_gelu_backward_cpu(data<float>(grad), data<float>(x), static_cast<float*>(out.mutable_data_ptr()), x.numel(),
                            torch_threads());
  } else {
    quick_gelu_backward_cpu(data<BFloat16>(grad), data<BFloat16>(x), static_cast<BFloat16*>(out.mutable_data_ptr()),
                            x.numel(), torch_threads());
  }
  return out;
}

}  // namespace
}  // namespace scf

STABLE_TORCH_LIBRARY_IMPL(scenarioclip_fast_C, CPU, m) {
  m.impl("quick_gelu_forward", TORCH_BOX(&scf::quick_gelu_forward));
  m.impl("quick_gelu_backward", TORCH_BOX(&scf::quick_gelu_backward));
}
