// Checks and allocation for kernels/add_layer_norm; compiled for the CPU library only.
#include "kernels/add_layer_norm/add_layer_norm.h"

#include <cmath>
#include <optional>
#include <tuple>

#include "check.h"
#include "parallel.h"

namespace scf {
namespace {

template <class T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
T* data_of(Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

void check_rows(const Tensor& x, const char* name, const Tensor& like, ScalarType dtype) {
  check_tensor(x, name, 2, dtype);
  check_size(x, name, 0, like.size(0));
  check_size(x, name, 1, like.size(1));
}

void check_weights(const Tensor& weight, const char* name, int64_t width) {
  check_tensor(weight, name, 1, ScalarType::Float);
  check_size(weight, name, 0, width);
}

// Calls body<T, Out>() for the dtypes of the rows and of the normalised rows.
template <class F>
void with_types(ScalarType rows, ScalarType normed, F&& body) {
  if (rows == ScalarType::Float && normed == ScalarType::Float) {
    body.template operator()<float, float>();
  } else if (rows == ScalarType::BFloat16 && normed == ScalarType::BFloat16) {
    body.template operator()<BFloat16, BFloat16>();
  } else {
    STD_TORCH_CHECK(rows == ScalarType::BFloat16 && normed == ScalarType::Float,
                    "expected float32 or bfloat16 rows, normalised in the same dtype or in float32");
    body.template operator()<BFloat16, float>();
  }
}

// Returns the sum [rows, width] ([0] without a branch), the normalised rows, and their statistics [2, rows].
std::tuple<Tensor, Tensor, Tensor> add_layer_norm_forward(const Tensor& x, const std::optional<Tensor>& branch,
                                                          const Tensor& weight, const Tensor& bias,
                                                          const std::optional<Tensor>& branch_bias, double eps,
                                                          ScalarType dtype) {
  check_tensor(x, "x", 2, x.scalar_type());
  if (branch) check_rows(*branch, "branch", x, x.scalar_type());
  const int64_t rows = x.size(0), width = x.size(1);
  check_weights(weight, "weight", width);
  check_weights(bias, "bias", width);
  if (branch_bias) check_weights(*branch_bias, "branch_bias", width);
  STD_TORCH_CHECK(branch || !branch_bias, "branch: got None with a branch_bias, expected a tensor");
  STD_TORCH_CHECK(eps >= 0 && std::isfinite(eps), "eps: got ", eps, ", expected a finite number of at least 0");
  Tensor total =
      branch ? empty_like_device(x, {rows, width}, x.scalar_type()) : empty_like_device(x, {0}, x.scalar_type());
  Tensor normed = empty_like_device(x, {rows, width}, dtype);
  Tensor statistics = empty_like_device(x, {2, rows}, ScalarType::Float);
  with_types(x.scalar_type(), dtype, [&]<class T, class Out>() {
    add_layer_norm_forward_cpu<T, Out>({.x = data<T>(x),
                                        .branch = branch ? data<T>(*branch) : nullptr,
                                        .weight = data<float>(weight),
                                        .bias = data<float>(bias),
                                        .branch_bias = branch_bias ? data<float>(*branch_bias) : nullptr,
                                        .total = branch ? data_of<T>(total) : nullptr,
                                        .normed = data_of<Out>(normed),
                                        .statistics = data_of<float>(statistics),
                                        .rows = rows,
                                        .width = width,
                                        .eps = static_cast<float>(eps)},
                                       torch_threads());
  });
  return {total, normed, statistics};
}

// Returns the gradient of x and branch, and those of weight, bias and, for 3 sums, branch_bias: [sums, width].
std::tuple<Tensor, Tensor> add_layer_norm_backward(const std::optional<Tensor>& d_total, const Tensor& d_normed,
                                                   const Tensor& total, const Tensor& weight, const Tensor& statistics,
                                                   int64_t sums) {
  check_tensor(total, "total", 2, total.scalar_type());
  STD_TORCH_CHECK(sums == 0 || sums == 2 || sums == 3, "sums: got ", sums, ", expected 0, 2 or 3");
  const int64_t rows = total.size(0), width = total.size(1);
  if (d_total) check_rows(*d_total, "d_total", total, total.scalar_type());
  check_rows(d_normed, "d_normed", total, d_normed.scalar_type());
  check_weights(weight, "weight", width);
  check_tensor(statistics, "statistics", 2, ScalarType::Float);
  check_size(statistics, "statistics", 0, 2);
  check_size(statistics, "statistics", 1, rows);
  Tensor dx = empty_like_device(total, {rows, width}, total.scalar_type());
  Tensor d_sums = empty_like_device(total, {sums, width}, ScalarType::Float);
  Tensor parts = empty_like_device(total, {add_layer_norm_parts(rows), sums, width}, ScalarType::Float);
  with_types(total.scalar_type(), d_normed.scalar_type(), [&]<class T, class Out>() {
    add_layer_norm_backward_cpu<T, Out>({.d_total = d_total ? data<T>(*d_total) : nullptr,
                                         .d_normed = data<Out>(d_normed),
                                         .total = data<T>(total),
                                         .weight = data<float>(weight),
                                         .statistics = data<float>(statistics),
                                         .dx = data_of<T>(dx),
                                         .parts = data_of<float>(parts),
                                         .d_sums = data_of<float>(d_sums),
                                         .rows = rows,
                                         .width = width,
                                         .sums = sums},
                                        torch_threads());
  });
  return {dx, d_sums};
}

}  // namespace
}  // namespace scf

STABLE_TORCH_LIBRARY_IMPL(scenarioclip_fast_C, CPU, m) {
  m.impl("add_layer_norm_forward", TORCH_BOX(&scf::add_layer_norm_forward));
  m.impl("add_layer_norm_backward", TORCH_BOX(&scf::add_layer_norm_backward));
}
