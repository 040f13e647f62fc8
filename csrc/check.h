// Argument checks of the compiled ops. The public functions have validated user input already, so an error here means
// that an op was called directly.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#ifdef USE_CUDA
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#endif

namespace scf {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#ifdef USE_CUDA
constexpr bool kCuda = true;
#else
constexpr bool kCuda = false;
#endif

// Requires a contiguous tensor of `dim` dimensions and of `dtype`, by default on this library's device.
inline void check_tensor(const Tensor& tensor, const char* name, int64_t dim, ScalarType dtype, bool on_cuda = kCuda) {
  STD_TORCH_CHECK(tensor.is_cuda() == on_cuda, name, ": got a tensor on ",
                  tensor.is_cuda() ? "a CUDA device" : "the CPU", ", expected ", on_cuda ? "a CUDA device" : "the CPU");
  STD_TORCH_CHECK(tensor.dim() == dim, name, ": got ", tensor.dim(), " dimensions, expected ", dim);
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": got dtype number ", static_cast<int>(tensor.scalar_type()),
                  ", expected ", static_cast<int>(dtype), " of torch::headeronly::ScalarType");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": got a non-contiguous tensor, expected a contiguous one");
}

inline void check_size(const Tensor& tensor, const char* name, int64_t dim, int64_t expected) {
  STD_TORCH_CHECK(tensor.size(dim) == expected, name, ": got size ", tensor.size(dim), " in dimension ", dim,
                  ", expected ", expected);
}

inline Tensor empty_like_device(const Tensor& like, std::initializer_list<int64_t> size, ScalarType dtype) {
  return torch::stable::new_empty(like, size, dtype);
}

#ifdef USE_CUDA
// Returns torch's current stream on the tensor's device.
inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}
#endif

}  // namespace scf
