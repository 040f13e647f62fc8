// What one thread does with its part of a tile of accumulators x y^T. Depends on CuTe alone: the tests run this source
// on the CPU, with the accumulator layouts of the tensor cores.
#pragma once

#include <cutlass/bfloat16.h>

#include <cute/tensor.hpp>
// After tensor.hpp, on which it depends.
#include <cute/atom/mma_traits_sm90_gmma.hpp>

#include "kernels/contrastive/arithmetic.h"

namespace scf {

using cute::get;

template <class Value>
CUTE_DEVICE Value read(const Value* p) {
#ifdef __CUDA_ARCH__
  return __ldg(p);
#else
  return *p;
#endif
}

CUTE_DEVICE float fast_exp2(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

CUTE_DEVICE uint32_t bfloat16_pair(float low, float high) {
#ifdef __CUDA_ARCH__
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return float_to_bfloat16(low) | static_cast<uint32_t>(float_to_bfloat16(high)) << 16;
#endif
}

CUTE_DEVICE float read_weight(const TextWeight& weight, int64_t text) {
  if (weight.numbers != nullptr) return read(weight.numbers + text);
  return weight.counts != nullptr ? static_cast<float>(read(weight.counts + text)) : 1.0f;
}

// From the accumulators' ((2 columns, 2 rows, columns / 8), blocks of 64 rows, 1) to (rows, columns) of this thread.
template <class Layout>
CUTE_HOST_DEVICE constexpr auto rows_and_columns(const Layout& layout) {
  auto values = get<0>(layout);
  return cute::make_layout(cute::make_layout(get<1>(values), get<1>(layout)),
                           cute::make_layout(get<0>(values), get<2>(values), get<2>(layout)));
}

template <class Engine, class Layout>
CUTE_DEVICE auto as_rows_and_columns(cute::Tensor<Engine, Layout>& accumulators) {
  return cute::make_tensor(accumulators.data(), rows_and_columns(accumulators.layout()));
}

// The (row, column) in the tile of each of this thread's accumulators.
template <int kRows, int kColumns, class Mma>
CUTE_DEVICE auto coordinates(Mma mma, int thread) {
  auto tile = cute::make_identity_tensor(cute::make_shape(cute::Int<kRows>{}, cute::Int<kColumns>{}));
  auto part = mma.get_thread_slice(thread).partition_C(tile);
  return cute::make_tensor(part.data(), rows_and_columns(part.layout()));
}

// The column of a row's positive within a tile of `width` columns, or -1.
CUTE_DEVICE int positive_in_tile(const Positives& positives, int row, int first_column, int width) {
  int64_t column = positives.first - first_column;
  column += positives.index != nullptr ? read(positives.index + row) : row;
  return static_cast<uint64_t>(column) < static_cast<uint64_t>(width) ? static_cast<int>(column) : -1;
}

// The lanes of a warp that hold the same rows, and the number of lanes that hold the same columns.
constexpr int kLanesOfRow = 4, kLanesOfColumn = 8;

template <int kRows, int kColumns, int kWarps>
struct SumScratch {
  static constexpr int kParts = kWarps * kLanesOfColumn;
  alignas(16) float4 rows[kRows];        // factor and shift of the logits, column of the positive
  alignas(16) float2 columns[kColumns];  // one over the norm, and the weight
  // The column sums of each thread, without bank conflicts.
  alignas(16) float sums[kParts][kColumns + 8];
};

// Sums of exponentials over the rows and the columns of one tile, and the exponents of the positives in it.
// `sync` is a barrier of the threads that share the tile and the scratch memory.
template <int kRows, int kColumns, int kWarps, class Engine, class Layout, class Mma, class Sync>
CUTE_DEVICE void sum_tile(const SumsProblem& p, int tile_row, int tile_column,
                          cute::Tensor<Engine, Layout>& accumulators, Mma mma, int thread,
                          SumScratch<kRows, kColumns, kWarps>& scratch, const Sync& sync) {
  constexpr unsigned kAll = 0xffffffff;
  constexpr int kThreads = kWarps * 32;
  static_assert(kRows == kThreads && kColumns == kThreads, "each thread stages one row and one column");
  const Operands& operands = p.operands;
  const int first_row = tile_row * kRows, first_column = tile_column * kColumns;
  // The grid is rounded up to whole clusters, so that some tiles may lie past the end.
  const int rows = static_cast<int>(operands.rows), texts = static_cast<int>(operands.texts);
  if (first_row >= rows || first_column >= texts) return;
  auto acc = as_rows_and_columns(accumulators);
  auto at = coordinates<kRows, kColumns>(mma, thread);
  constexpr int kHeld = cute::size<0>(decltype(acc){}), kWide = cute::size<1>(decltype(acc){});
  static_assert(kHeld == kLanesOfRow, "each lane writes one row sum");
  const int lane = thread % 32, warp = thread / 32;

  const float k2 = logit_scale(read(operands.scale)), offset = sum_offset(k2);
  const int staged_row = first_row + thread, staged_column = first_column + thread;
  // The exponentials of rows past the end are zero: they belong to no column sum.
  float4 row_data = make_float4(0.0f, INFINITY, -1.0f, 0.0f);
  if (staged_row < rows) {
    const int own = positive_in_tile(p.positives, staged_row, first_column, min(kColumns, texts - first_column));
    row_data = make_float4(read(operands.inv_x + staged_row) * k2, offset, static_cast<float>(own), 0.0f);
  }
  scratch.rows[thread] = row_data;
  float2 column_data = make_float2(0.0f, 0.0f);
  if (staged_column < texts) {
    column_data =
        make_float2(read(operands.inv_y + staged_column), summed_weight(read_weight(p.weight, staged_column)));
  }
  scratch.columns[thread] = column_data;
  sync();

  float row_factor[kHeld], shift[kHeld], row_sum[kHeld], own[kHeld];
  bool any = false;
  CUTE_UNROLL
  for (int r = 0; r < kHeld; ++r) {
    const float4 row = scratch.rows[get<0>(at(r, 0))];
    row_factor[r] = row.x;
    shift[r] = row.y;
    own[r] = row.z;
    any |= row.z >= 0;
  }
  if (__any_sync(kAll, any)) {
    CUTE_UNROLL
    for (int r = 0; r < kHeld; ++r) {
      // From this accumulator, and rounded as in the sums below: another number could exceed the log-sum.
      float found = 0;
      bool here = false;
      CUTE_UNROLL
      for (int j = 0; j < kWide; ++j) {
        const bool hit = get<1>(at(r, j)) == static_cast<int>(own[r]);
        found = hit ? acc(r, j) : found;
        here |= hit;
      }
      if (here) {
        const float inverse = scratch.columns[static_cast<int>(own[r])].x;
        p.own_exponent[first_row + get<0>(at(r, 0))] = fmaf(found * inverse, row_factor[r], -shift[r]);
      }
    }
  }

  CUTE_UNROLL
  for (int j = 0; j < kWide; j += 2) {  // pairs of columns are adjacent
    const float4 staged = *reinterpret_cast<const float4*>(&scratch.columns[get<1>(at(0, j))]);
    float2 column_sum;
    CUTE_UNROLL
    for (int r = 0; r < kHeld; ++r) {
      const float left = fast_exp2(fmaf(acc(r, j) * staged.x, row_factor[r], -shift[r]));
      const float right = fast_exp2(fmaf(acc(r, j + 1) * staged.z, row_factor[r], -shift[r]));
      row_sum[r] = fmaf(right, staged.w, j == 0 ? left * staged.y : fmaf(left, staged.y, row_sum[r]));
      column_sum.x = r == 0 ? left : column_sum.x + left;
      column_sum.y = r == 0 ? right : column_sum.y + right;
    }
    const int part = warp * kLanesOfColumn + lane / kLanesOfRow;
    *reinterpret_cast<float2*>(&scratch.sums[part][get<1>(at(0, j))]) = column_sum;
  }

  // Four lanes hold the same four rows. Each step adds two of them and halves the rows that a lane holds.
  const bool odd = (lane & 1) != 0, upper = (lane & 2) != 0;
  const float low = (odd ? row_sum[1] : row_sum[0]) + __shfl_xor_sync(kAll, odd ? row_sum[0] : row_sum[1], 1);
  const float high = (odd ? row_sum[3] : row_sum[2]) + __shfl_xor_sync(kAll, odd ? row_sum[2] : row_sum[3], 1);
  const float sum_of_row = (upper ? high : low) + __shfl_xor_sync(kAll, upper ? low : high, 2);
  const int own_row = first_row + get<0>(at((odd ? 1 : 0) + (upper ? 2 : 0), 0));
  if (own_row < rows) p.row_parts[tile_column * operands.rows + own_row] = sum_of_row;
  sync();
  if (staged_column < texts) {
    float sum[4] = {};
    CUTE_UNROLL
    for (int part = 0; part < scratch.kParts; part += 4) {
      CUTE_UNROLL
      for (int k = 0; k < 4; ++k) sum[k] += scratch.sums[part + k][thread];
    }
    p.column_parts[tile_row * operands.texts + staged_column] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
}

template <int kRows, int kColumns, int kWarps>
struct GradientScratch {
  alignas(16) float4 rows[kRows];        // of a GradientRow, and the column of the positive
  alignas(16) float4 columns[kColumns];  // half of a GradientText
  alignas(16) int apart[kWarps];         // whether any row or text that a warp has read is apart
};

// Replaces the accumulators of one tile with H: see README.md. Columns past the end become zero.
template <int kRows, int kColumns, int kWarps, class Engine, class Layout, class Mma, class Sync>
CUTE_DEVICE void gradient_tile(const GradientsProblem& p, int tile_row, int tile_column,
                               cute::Tensor<Engine, Layout>& accumulators, Mma mma, int thread,
                               GradientScratch<kRows, kColumns, kWarps>& scratch, const Sync& sync) {
  constexpr unsigned kAll = 0xffffffff;
  constexpr int kThreads = kWarps * 32;
  static_assert(kRows == kThreads && kColumns == kThreads, "each thread stages one row and one column");
  const Operands& operands = p.operands;
  const int first_row = tile_row * kRows, first_column = tile_column * kColumns;
  const int rows = static_cast<int>(operands.rows), texts = static_cast<int>(operands.texts);
  auto acc = as_rows_and_columns(accumulators);
  auto at = coordinates<kRows, kColumns>(mma, thread);
  constexpr int kHeld = cute::size<0>(decltype(acc){}), kWide = cute::size<1>(decltype(acc){});
  const float4* row_halves = reinterpret_cast<const float4*>(p.row);
  const float4* text_halves = reinterpret_cast<const float4*>(p.text);

  const int staged_row = first_row + thread, staged_column = first_column + thread;
  float4 row_data = read(row_halves + 2 * static_cast<int64_t>(min(staged_row, rows - 1)));
  float4 text_data = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (staged_column < texts) text_data = read(text_halves + 2 * static_cast<int64_t>(staged_column));
  bool apart = row_data.w != 0 || text_data.w != 0;
  row_data.w = -1;
  if (staged_row < rows) {
    row_data.w = static_cast<float>(
        positive_in_tile(p.positives, staged_row, first_column, min(kColumns, texts - first_column)));
  }
  scratch.rows[thread] = row_data;
  scratch.columns[thread] = text_data;
  apart = __any_sync(kAll, apart);
  if (thread % 32 == 0) scratch.apart[thread / 32] = apart;
  sync();
  apart = false;  // the same for all threads, because they share barriers below
  CUTE_UNROLL
  for (int w = 0; w < kWarps; ++w) apart |= scratch.apart[w] != 0;
  float4 row[kHeld];
  float own[kHeld];
  bool any = false;
  CUTE_UNROLL
  for (int r = 0; r < kHeld; ++r) {
    row[r] = scratch.rows[get<0>(at(r, 0))];
    own[r] = row[r].w;
    any |= own[r] >= 0;
  }

  if (!apart) {
    CUTE_UNROLL
    for (int j = 0; j < kWide; ++j) {
      const float4 text = scratch.columns[get<1>(at(0, j))];
      CUTE_UNROLL
      for (int r = 0; r < kHeld; ++r) {
        acc(r, j) = fast_exp2(fmaf(acc(r, j) * text.x, row[r].x, -row[r].y)) * fmaf(row[r].z, text.y, text.z);
      }
    }
  } else {
    // Two exponentials, each relative to its own log-sum, which bounds it.
    sync();
    if (staged_column < texts) {
      const float4 rest = read(text_halves + 2 * static_cast<int64_t>(staged_column) + 1);
      scratch.columns[thread].z = rest.y;
      scratch.columns[thread].w = rest.x;
    }
    sync();
    CUTE_UNROLL
    for (int r = 0; r < kHeld; ++r) {
      const float factor = row[r].x;
      row[r] = read(row_halves +
                    2 * static_cast<int64_t>(min(first_row + static_cast<int>(get<0>(at(r, 0))), rows - 1)) + 1);
      row[r].w = factor;
    }
    CUTE_UNROLL
    for (int j = 0; j < kWide; ++j) {
      const float4 text = scratch.columns[get<1>(at(0, j))];
      CUTE_UNROLL
      for (int r = 0; r < kHeld; ++r) {
        const float logit = acc(r, j) * text.x * row[r].w;
        // A text without weight may exceed the row's log-sum without bound.
        const float by_row = text.y == 0 ? 0.0f : fast_exp2(logit - row[r].x) * row[r].y * text.y;
        acc(r, j) = fmaf(fast_exp2(logit - text.w), text.z, by_row) * row[r].z;
      }
    }
  }
  // The positives are added in float32 afterwards.
  if (__any_sync(kAll, any)) {
    CUTE_UNROLL
    for (int r = 0; r < kHeld; ++r) {
      CUTE_UNROLL
      for (int j = 0; j < kWide; ++j) {
        acc(r, j) = get<1>(at(r, j)) == static_cast<int>(own[r]) ? 0.0f : acc(r, j);
      }
    }
  }
}

// Rows of 64 entries, swizzled, as TMA takes them and matrix stores write them without bank conflicts.
template <int kRows, int kColumns>
using StagingLayout = decltype(cute::tile_to_shape(cute::GMMA::Layout_K_SW128_Atom<cutlass::bfloat16_t>{},
                                                   cute::Shape<cute::Int<kRows>, cute::Int<kColumns>>{}));

// Rounds a tile to bfloat16 and writes it to `staging`, shared memory of that layout.
template <class MatrixStore, class Engine, class Layout, class Mma, class Staging>
CUTE_DEVICE void stage_tile(const cute::Tensor<Engine, Layout>& accumulators, Mma mma, int thread, Staging&& staging) {
  auto copy = cute::make_tiled_copy_C(cute::Copy_Atom<MatrixStore, cutlass::bfloat16_t>{}, mma);
  auto slice = copy.get_slice(thread);
  auto rounded = cute::make_fragment_like<cutlass::bfloat16_t>(accumulators);
  auto pairs = cute::recast<uint32_t>(rounded);
  CUTE_UNROLL
  for (int i = 0; i < cute::size(pairs); ++i) pairs(i) = bfloat16_pair(accumulators(2 * i), accumulators(2 * i + 1));
  cute::copy(copy, slice.retile_S(rounded), slice.partition_D(staging));
}

}  // namespace scf
