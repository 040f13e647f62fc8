// Argument checks of the compiled ops. The public functions have validated user input already, so an error here means
// that an op was called directly.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>

#ifdef USE_CUDA
#include <cuda_runtime.h>
#endif

namespace scf {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#ifdef USE_CUDA
constexpr bool kCuda = true;
#else
constexpr bool kCuda = false;
#endif

// The largest size of a tensor without elements, so that sizes of outputs do not overflow.
constexpr int64_t kMaxEmptySize = 1 << 24;

// Requires the memory of all elements to exist: a storage may have been resized or released. `last`: the offset of the
// last element from the first.
inline void check_storage(const Tensor& tensor, const char* name, int64_t last) {
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  const auto size = static_cast<int64_t>(tensor.element_size());
  STD_TORCH_CHECK(last < bytes / size - tensor.storage_offset(), name, ": got a tensor with a storage of ", bytes,
                  " bytes, expected one that holds all of its elements");
}

// Requires a tensor of `dim` dimensions and of `dtype`, by default on this library's device.
inline void check_kind(const Tensor& tensor, const char* name, int64_t dim, ScalarType dtype, bool on_cuda = kCuda) {
  STD_TORCH_CHECK(on_cuda ? tensor.is_cuda() : tensor.is_cpu(), name, ": got a tensor on ",
                  tensor.is_cuda()  ? "a CUDA device"
                  : tensor.is_cpu() ? "the CPU"
                                    : "another device",
                  ", expected ", on_cuda ? "a CUDA device" : "the CPU");
  STD_TORCH_CHECK(tensor.dim() == dim, name, ": got ", tensor.dim(), " dimensions, expected ", dim);
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": got dtype number ", static_cast<int>(tensor.scalar_type()),
                  ", expected ", static_cast<int>(dtype), " of torch::headeronly::ScalarType");
}

// The same, and contiguous.
inline void check_tensor(const Tensor& tensor, const char* name, int64_t dim, ScalarType dtype, bool on_cuda = kCuda) {
  check_kind(tensor, name, dim, dtype, on_cuda);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": got a non-contiguous tensor, expected a contiguous one");
  if (const int64_t count = tensor.numel(); count > 0) {
    check_storage(tensor, name, count - 1);
  } else {
    // Other sizes are bounded by memory.
    for (int64_t d = 0; d < dim; ++d) {
      STD_TORCH_CHECK(tensor.size(d) <= kMaxEmptySize, name, ": got size ", tensor.size(d), " in dimension ", d,
                      " of a tensor without elements, expected at most 2^24");
    }
  }
}

inline void check_size(const Tensor& tensor, const char* name, int64_t dim, int64_t expected) {
  STD_TORCH_CHECK(tensor.size(dim) == expected, name, ": got size ", tensor.size(dim), " in dimension ", dim,
                  ", expected ", expected);
}

inline void check_positive(double value, const char* name) {
  STD_TORCH_CHECK(value > 0 && std::isfinite(value), name, ": got ", value, ", expected a finite number above 0");
}

// Requires indices, in host memory, in [0, limit).
inline void check_indices(const int64_t* index, int64_t count, const char* name, int64_t limit) {
  uint64_t highest = 0;  // as unsigned numbers, negative ones are above all others
  for (int64_t k = 0; k < count; ++k) highest = std::max(highest, static_cast<uint64_t>(index[k]));
  STD_TORCH_CHECK(count == 0 || highest < static_cast<uint64_t>(limit), name, ": got ", static_cast<int64_t>(highest),
                  ", expected numbers from 0 to ", limit - 1);
}

// The memory of an argument.
struct Memory {
  const char* name;
  uintptr_t begin = 0, end = 0;

  Memory(const char* name, const void* data, int64_t bytes)
      : name(name), begin(reinterpret_cast<uintptr_t>(data)), end(begin + static_cast<uintptr_t>(bytes)) {}

  // From the first to the last element; strides are not negative.
  Memory(const char* name, const Tensor& tensor) : Memory(name, tensor.const_data_ptr(), 0) {
    if (tensor.numel() == 0) return;
    int64_t last = 0;
    for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
    end += static_cast<uintptr_t>(last + 1) * tensor.element_size();
  }
};

inline void check_apart(const Memory& written, const Memory& other) {
  const bool overlap = std::max(written.begin, other.begin) < std::min(written.end, other.end);
  STD_TORCH_CHECK(!overlap, written.name, ": shares memory with ", other.name, ", expected memory of its own");
}

// Requires what an op writes to share no memory with anything else, because it is read meanwhile.
inline void check_apart(std::initializer_list<Memory> written, std::initializer_list<Memory> read) {
  for (const Memory* one = written.begin(); one != written.end(); ++one) {
    for (const Memory* other = one + 1; other != written.end(); ++other) check_apart(*one, *other);
    for (const Memory& other : read) check_apart(*one, other);
  }
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
