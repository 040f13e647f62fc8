// Checks and allocation for kernels/quick_gelu; compiled for the CPU library only.
#include "kernels/quick_gelu/quick_gelu.h"

#include <optional>
#include <tuple>

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

// Requires a float32 bias for the last dimension of x; returns that dimension's size.
int64_t check_bias(const Tensor& bias, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() > 0, "x: got no dimensions, expected rows for the bias");
  const int64_t width = x.size(x.dim() - 1);
  check_tensor(bias, "bias", 1, ScalarType::Float);
  check_size(bias, "bias", 0, width);
  return width;
}

template <class T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
T* data_of(Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

template <class T>
void forward_into(Tensor& out, const Tensor& x, const std::optional<Tensor>& bias) {
  if (!bias) {
    quick_gelu_forward_cpu(data<T>(x), data_of<T>(out), x.numel(), torch_threads());
    return;
  }
  const int64_t width = check_bias(*bias, x);
  quick_gelu_bias_forward_cpu<T>({.x = data<T>(x),
                                  .bias = data<float>(*bias),
                                  .out = data_of<T>(out),
                                  .rows = width > 0 ? x.numel() / width : 0,
                                  .width = width},
                                 torch_threads());
}

Tensor quick_gelu_forward(const Tensor& x, const std::optional<Tensor>& bias) {
  const bool single = is_float(x, "x");
  Tensor out = torch::stable::empty_like(x);
  if (single) {
    forward_into<float>(out, x, bias);
  } else {
    forward_into<BFloat16>(out, x, bias);
  }
  return out;
}

// Returns the gradient of the bias: [width], or [0] without `with_sums`.
template <class T>
Tensor backward_into(Tensor& out, const Tensor& grad, const Tensor& x, const std::optional<Tensor>& bias,
                     bool with_sums) {
  if (!bias) {
    quick_gelu_backward_cpu(data<T>(grad), data<T>(x), data_of<T>(out), x.numel(), torch_threads());
    return empty_like_device(x, {0}, ScalarType::Float);
  }
  const int64_t width = check_bias(*bias, x), rows = width > 0 ? x.numel() / width : 0;
  Tensor d_bias = empty_like_device(x, {with_sums ? width : 0}, ScalarType::Float);
  Tensor parts = empty_like_device(x, {with_sums ? quick_gelu_parts(rows) : 0, width}, ScalarType::Float);
  quick_gelu_bias_backward_cpu<T>({.grad = data<T>(grad),
                                   .x = data<T>(x),
                                   .bias = data<float>(*bias),
                                   .out = data_of<T>(out),
                                   .parts = data_of<float>(parts),
                                   .d_bias = with_sums ? data_of<float>(d_bias) : nullptr,
                                   .rows = rows,
                                   .width = width},
                                  torch_threads());
  return d_bias;
}

std::tuple<Tensor, Tensor> quick_gelu_backward(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& bias,
                                               bool with_sums) {
  const bool single = is_float(x, "x");
  check_tensor(grad, "grad", x.dim(), x.scalar_type());
  for (int64_t d = 0; d < x.dim(); ++d) check_size(grad, "grad", d, x.size(d));
  Tensor out = torch::stable::empty_like(x);
  const Tensor d_bias = single ? backward_into<float>(out, grad, x, bias, with_sums)
                               : backward_into<BFloat16>(out, grad, x, bias, with_sums);
  return {out, d_bias};
}

}  // namespace
}  // namespace scf

STABLE_TORCH_LIBRARY_IMPL(scenarioclip_fast_C, CPU, m) {
  m.impl("quick_gelu_forward", TORCH_BOX(&scf::quick_gelu_forward));
  m.impl("quick_gelu_backward", TORCH_BOX(&scf::quick_gelu_backward));
}
