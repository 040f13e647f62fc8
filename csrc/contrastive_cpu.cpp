// Checks for the CPU kernels of kernels/contrastive; compiled for the CPU library only.
#include "kernels/contrastive/contrastive_cpu.h"

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "check.h"
#include "parallel.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace scf {
namespace {

void check_vector(const Tensor& vector, const char* name, ScalarType dtype, int64_t size) {
  check_tensor(vector, name, 1, dtype);
  check_size(vector, name, 0, size);
}

// Requires a float32 matrix on the CPU whose rows are contiguous, and if it is written, apart.
void check_rows(const Tensor& matrix, const char* name, bool written) {
  STD_TORCH_CHECK(matrix.is_cpu() && matrix.dim() == 2 && matrix.scalar_type() == ScalarType::Float, name,
                  ": expected a float32 matrix on the CPU");
  STD_TORCH_CHECK(matrix.stride(1) == 1 || matrix.size(1) <= 1, name, ": expected rows of stride 1");
  const int64_t rows = matrix.size(0), width = matrix.size(1);
  if (rows == 0 || width == 0) return;
  STD_TORCH_CHECK(!written || rows == 1 || matrix.stride(0) >= width, name, ": got rows ", matrix.stride(0),
                  " numbers apart, expected at least their width ", width);
  check_storage(matrix, name, (rows - 1) * matrix.stride(0) + width - 1);
}

// A tile whose matrix has been checked.
ContrastiveTile checked_tile(const Tensor& values, const std::optional<Tensor>& index, int64_t first_row,
                             int64_t first_text, const Tensor& by_row, const Tensor& by_text) {
  check_vector(by_row, "by_row", ScalarType::Float, by_row.numel());
  check_vector(by_text, "by_text", ScalarType::Float, by_text.numel());
  if (index) check_vector(*index, "index", ScalarType::Long, by_row.numel());
  const int64_t rows = values.size(0), texts = values.size(1);
  STD_TORCH_CHECK(first_row >= 0 && rows <= by_row.numel() && first_row <= by_row.numel() - rows && first_text >= 0 &&
                      texts <= by_text.numel() && first_text <= by_text.numel() - texts,
                  "values: got a tile outside the level");
  const int64_t* positives = index ? index->const_data_ptr<int64_t>() : nullptr;
  if (index) check_indices(positives + first_row, rows, "index", by_text.numel());
  return {first_row, first_text, rows, texts, positives};
}

ContrastiveLogits logits_of(const Tensor& by_row, const Tensor& by_text, double scale, double offset) {
  return {by_row.const_data_ptr<float>(), by_text.const_data_ptr<float>(), static_cast<float>(scale),
          static_cast<float>(offset)};
}

template <class T>
Memory vector_memory(const char* name, const T* data, int64_t count) {
  return {name, data, count * static_cast<int64_t>(sizeof(T))};
}

Memory matrix_memory(const char* name, const float* data, const ContrastiveTile& tile, int64_t stride) {
  return vector_memory(name, data, tile.rows > 0 && tile.texts > 0 ? (tile.rows - 1) * stride + tile.texts : 0);
}

// Returns one over the norm of each row of all matrices [N, D], in one vector; ones without `normalize`.
Tensor contrastive_inverse(const std::vector<Tensor>& matrices, bool normalize) {
  STD_TORCH_CHECK(!matrices.empty(), "matrices: got none, expected at least one");
  int64_t rows = 0;
  for (const Tensor& matrix : matrices) {
    check_tensor(matrix, "matrices", 2, ScalarType::Float);
    rows += matrix.size(0);
  }
  Tensor inverse = empty_like_device(matrices[0], {rows}, ScalarType::Float);
  float* next = inverse.mutable_data_ptr<float>();
  for (const Tensor& matrix : matrices) {
    if (normalize) {
      contrastive_inverse_cpu(matrix.const_data_ptr<float>(), matrix.size(0), matrix.size(1), next, torch_threads());
    } else {
      std::fill_n(next, matrix.size(0), 1.0f);
    }
    next += matrix.size(0);
  }
  return inverse;
}

// weight may be None: ones.
class Weights {
 public:
  Weights(const std::optional<Tensor>& weight, int64_t texts) {
    if (weight) {
      check_vector(*weight, "weight", ScalarType::Float, texts);
      data_ = weight->const_data_ptr<float>();
    } else {
      ones_.assign(texts, 1.0f);
      data_ = ones_.data();
    }
  }

  const float* data() const { return data_; }

 private:
  std::vector<float> ones_;
  const float* data_;
};

void contrastive_exponentials(Tensor values,                        // [n, u] a tile
                              const Tensor& by_row,                 // [N]
                              const Tensor& by_text,                // [U]
                              const std::optional<Tensor>& weight,  // [U]
                              const std::optional<Tensor>& index,   // [N]
                              int64_t first_row, int64_t first_text, double scale, double offset,
                              Tensor row_sum,     // [N]
                              Tensor col_sum,     // [U]
                              Tensor positive) {  // [N]
  check_rows(values, "values", true);
  const ContrastiveTile tile = checked_tile(values, index, first_row, first_text, by_row, by_text);
  check_vector(row_sum, "row_sum", ScalarType::Double, by_row.numel());
  check_vector(col_sum, "col_sum", ScalarType::Double, by_text.numel());
  check_vector(positive, "positive", ScalarType::Double, by_row.numel());
  const Weights weights(weight, by_text.numel());
  const ContrastiveLogits logits = logits_of(by_row, by_text, scale, offset);
  float* data = values.mutable_data_ptr<float>();
  double* rows = row_sum.mutable_data_ptr<double>();
  double* columns = col_sum.mutable_data_ptr<double>();
  double* positives = positive.mutable_data_ptr<double>();
  const int64_t n = by_row.numel(), u = by_text.numel();
  check_apart({matrix_memory("values", data, tile, values.stride(0)), vector_memory("row_sum", rows, n),
               vector_memory("col_sum", columns, u), vector_memory("positive", positives, n)},
              {vector_memory("by_row", logits.by_row, n), vector_memory("by_text", logits.by_text, u),
               vector_memory("index", tile.index, index ? n : 0), vector_memory("weight", weights.data(), u)});
  contrastive_exponentials_cpu(tile, logits, weights.data(), data, values.stride(0), rows, columns, positives,
                               torch_threads());
}

ContrastiveFactors factors_of(float* data, int64_t rows, int64_t texts) {
  float* by_text = data + 3 * rows;
  return {data, data + rows, data + 2 * rows, by_text, by_text + texts, by_text + 2 * texts};
}

// Returns all factors in one tensor, their magnitude, and whether they are in range.
std::tuple<Tensor, double, bool> contrastive_factors(const Tensor& row_lse,                // [N]
                                                     const Tensor& col_lse,                // [U]
                                                     const Tensor& grad_row,               // [N]
                                                     const Tensor& grad_col,               // [U]
                                                     const Tensor& grad_logit,             // [N]
                                                     const Tensor& by_row,                 // [N]
                                                     const Tensor& by_text,                // [U]
                                                     const std::optional<Tensor>& weight,  // [U]
                                                     double offset) {
  const int64_t rows = by_row.numel(), texts = by_text.numel();
  check_vector(row_lse, "row_lse", ScalarType::Double, rows);
  check_vector(col_lse, "col_lse", ScalarType::Double, texts);
  check_vector(grad_row, "grad_row", ScalarType::Double, rows);
  check_vector(grad_col, "grad_col", ScalarType::Double, texts);
  check_vector(grad_logit, "grad_logit", ScalarType::Double, rows);
  check_vector(by_row, "by_row", ScalarType::Float, rows);
  check_vector(by_text, "by_text", ScalarType::Float, texts);
  const ContrastiveGradients gradients{row_lse.const_data_ptr<double>(), col_lse.const_data_ptr<double>(),
                                       grad_row.const_data_ptr<double>(), grad_col.const_data_ptr<double>(),
                                       grad_logit.const_data_ptr<double>()};
  Tensor factors = empty_like_device(by_row, {3 * (rows + texts)}, ScalarType::Float);
  double magnitude = 1;
  const bool in_range = contrastive_factors_cpu(
      gradients, logits_of(by_row, by_text, 1, offset), Weights(weight, by_text.numel()).data(), rows, texts,
      factors_of(factors.mutable_data_ptr<float>(), rows, texts), magnitude, torch_threads());
  return {factors, magnitude, in_range};
}

void contrastive_gradients(const Tensor& source,  // [n, u] a tile: exponentials if kept, else products
                           bool kept,
                           const Tensor& factors,               // [3 (N + U)]
                           const Tensor& by_row,                // [N]
                           const Tensor& by_text,               // [U]
                           const std::optional<Tensor>& index,  // [N]
                           int64_t first_row, int64_t first_text, double scale, double offset,
                           Tensor out) {  // [n, u]
  check_rows(source, "source", false);
  const ContrastiveTile tile = checked_tile(source, index, first_row, first_text, by_row, by_text);
  check_rows(out, "out", true);
  check_size(out, "out", 0, tile.rows);
  check_size(out, "out", 1, tile.texts);
  check_vector(factors, "factors", ScalarType::Float, 3 * (by_row.numel() + by_text.numel()));
  // The factors are only read.
  float* data = const_cast<float*>(factors.const_data_ptr<float>());
  const ContrastiveLogits logits = logits_of(by_row, by_text, scale, offset);
  const float* values = source.const_data_ptr<float>();
  float* result = out.mutable_data_ptr<float>();
  const int64_t n = by_row.numel(), u = by_text.numel();
  const Memory read = matrix_memory("source", values, tile, source.stride(0)),
               written = matrix_memory("out", result, tile, out.stride(0));
  if (values != result || source.stride(0) != out.stride(0)) check_apart(written, read);
  check_apart({written},
              {vector_memory("factors", data, 3 * (n + u)), vector_memory("by_row", logits.by_row, n),
               vector_memory("by_text", logits.by_text, u), vector_memory("index", tile.index, index ? n : 0)});
  contrastive_gradients_cpu(tile, logits, factors_of(data, n, u), kept, values, source.stride(0), result, out.stride(0),
                            torch_threads());
}

double contrastive_finish(const Tensor& x,        // [N, D]
                          const Tensor& inverse,  // [N]
                          double factor, bool normalize,
                          Tensor d) {  // [N, D]
  check_tensor(x, "x", 2, ScalarType::Float);
  check_tensor(d, "d", 2, ScalarType::Float);
  check_size(d, "d", 0, x.size(0));
  check_size(d, "d", 1, x.size(1));
  check_vector(inverse, "inverse", ScalarType::Float, x.size(0));
  check_apart({{"d", d}}, {{"x", x}, {"inverse", inverse}});
  return contrastive_finish_cpu(x.const_data_ptr<float>(), inverse.const_data_ptr<float>(), static_cast<float>(factor),
                                normalize, x.size(0), x.size(1), d.mutable_data_ptr<float>(), torch_threads());
}

// Asks for large pages before the first use of new memory: page faults of 4 KiB take longer than filling the memory.
void contrastive_large_pages(Tensor memory) {
  check_tensor(memory, "memory", memory.dim(), ScalarType::Float);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 1 << 21;
  const auto data = reinterpret_cast<uintptr_t>(memory.mutable_data_ptr<float>());
  const uintptr_t begin = (data + kPage - 1) / kPage * kPage,
                  end = (data + memory.numel() * sizeof(float)) / kPage * kPage;
  // A hint: the memory can be used if it fails.
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace
}  // namespace scf

STABLE_TORCH_LIBRARY_IMPL(scenarioclip_fast_C, CPU, m) {
  m.impl("contrastive_cpu_inverse", TORCH_BOX(&scf::contrastive_inverse));
  m.impl("contrastive_cpu_exponentials", TORCH_BOX(&scf::contrastive_exponentials));
  m.impl("contrastive_cpu_factors", TORCH_BOX(&scf::contrastive_factors));
  m.impl("contrastive_cpu_gradients", TORCH_BOX(&scf::contrastive_gradients));
  m.impl("contrastive_cpu_finish", TORCH_BOX(&scf::contrastive_finish));
  m.impl("contrastive_cpu_large_pages", TORCH_BOX(&scf::contrastive_large_pages));
}
