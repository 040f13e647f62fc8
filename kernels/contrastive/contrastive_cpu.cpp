#include "kernels/contrastive/contrastive_cpu.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "kernels/clones.h"
#include "kernels/fast_exp.h"

namespace scf {
namespace {

// Rows that share one vector of partial column sums, so that the order of summation is fixed.
constexpr int64_t kBlock = 32;
// Numbers per thread: about 10 microseconds of work.
constexpr int64_t kGrain = 1 << 15;
constexpr double kEps = 1e-12;  // smallest norm, as in torch.nn.functional.normalize
// Largest distance of a log-sum from the offset: exp(66.7) = 1e29. Also in contrastive_cpu.py.
constexpr double kRange = 66.7;

int64_t grain(int64_t numbers) { return std::max<int64_t>(kGrain / std::max<int64_t>(numbers, 1), 1); }

// Float sums of a row are split into lanes: fast, accurate, and the same for every width of vectors. The last, partial
// group of lanes is padded, because a single exponential takes as long as a vector of them.
constexpr int64_t kLanes = 16;
using Lanes = std::array<float, kLanes>;

Lanes padded(const float* x, int64_t count) {
  Lanes lanes{};
  std::copy_n(x, count, lanes.data());
  return lanes;
}

double sum(const Lanes& lanes) { return std::accumulate(lanes.begin(), lanes.end(), 0.0); }

SCF_CLONES double dot(const float* a, const float* b, int64_t count) {
  Lanes sums[4] = {};
  int64_t k = 0;
  for (; k + 4 * kLanes <= count; k += 4 * kLanes) {
    for (int64_t part = 0; part < 4; ++part) {
#pragma omp simd
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        sums[part][lane] += a[k + part * kLanes + lane] * b[k + part * kLanes + lane];
      }
    }
  }
  double rest = 0;
  for (; k < count; ++k) rest += static_cast<double>(a[k]) * b[k];
  return rest + sum(sums[0]) + sum(sums[1]) + sum(sums[2]) + sum(sums[3]);
}

// One expression for both passes, so that they see the same exponentials.
[[gnu::always_inline]] inline float shifted_logit(float product, float by_row, float by_text, float offset) {
  return product * by_row * by_text - offset;
}

[[gnu::always_inline]] inline void exponential_lanes(float* values, const float* by_text, const float* weight,
                                                     float by_row, float offset, float* columns, Lanes& sums) {
#pragma omp simd
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    const float e = fast_exp(shifted_logit(values[lane], by_row, by_text[lane], offset));
    values[lane] = e;
    columns[lane] += e;
    sums[lane] += e * weight[lane];
  }
}

// Returns the weighted sum of the row's exponentials, and adds them to `columns`.
SCF_CLONES double exponential_row(float* values, const float* by_text, const float* weight, int64_t texts, float by_row,
                                  float offset, float* columns) {
  Lanes sums{};
  int64_t u = 0;
  for (; u + kLanes <= texts; u += kLanes) {
    exponential_lanes(values + u, by_text + u, weight + u, by_row, offset, columns + u, sums);
  }
  if (const int64_t rest = texts - u; rest > 0) {
    Lanes last = padded(values + u, rest), column = padded(columns + u, rest);
    exponential_lanes(last.data(), padded(by_text + u, rest).data(), padded(weight + u, rest).data(), by_row, offset,
                      column.data(), sums);
    std::copy_n(last.data(), rest, values + u);
    std::copy_n(column.data(), rest, columns + u);
  }
  return sum(sums);
}

SCF_CLONES void add_columns(const float* partial, int64_t count, double* sums) {
#pragma omp simd
  for (int64_t u = 0; u < count; ++u) sums[u] += partial[u];
}

struct RowFactors {
  float a, b;
};

SCF_CLONES void gradient_row(const float* exponentials, const float* text_a, const float* text_b, int64_t texts,
                             RowFactors row, float* out) {
#pragma omp simd
  for (int64_t u = 0; u < texts; ++u) out[u] = exponentials[u] * (row.a * text_a[u] + row.b * text_b[u]);
}

[[gnu::always_inline]] inline void gradient_lanes(const float* products, const float* by_text, const float* text_a,
                                                  const float* text_b, float by_row, float offset, RowFactors row,
                                                  float* out) {
#pragma omp simd
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    const float e = fast_exp(shifted_logit(products[lane], by_row, by_text[lane], offset));
    out[lane] = e * (row.a * text_a[lane] + row.b * text_b[lane]);
  }
}

SCF_CLONES void gradient_row_of_products(const float* products, const float* by_text, const float* text_a,
                                         const float* text_b, int64_t texts, float by_row, float offset, RowFactors row,
                                         float* out) {
  int64_t u = 0;
  for (; u + kLanes <= texts; u += kLanes) {
    gradient_lanes(products + u, by_text + u, text_a + u, text_b + u, by_row, offset, row, out + u);
  }
  if (const int64_t rest = texts - u; rest > 0) {
    Lanes last = padded(products + u, rest);
    gradient_lanes(last.data(), padded(by_text + u, rest).data(), padded(text_a + u, rest).data(),
                   padded(text_b + u, rest).data(), by_row, offset, row, last.data());
    std::copy_n(last.data(), rest, out + u);
  }
}

SCF_CLONES void finish_row(const float* x, float factor, float projection, int64_t width, float* d) {
#pragma omp simd
  for (int64_t k = 0; k < width; ++k) d[k] = factor * (d[k] - projection * x[k]);
}

double largest(const double* x, int64_t count, double found) {
  for (int64_t k = 0; k < count; ++k) found = std::max(found, std::abs(x[k]));
  return found;
}

}  // namespace

void contrastive_inverse_cpu(const float* x, int64_t rows, int64_t width, float* inverse, const Parallel& parallel) {
  parallel(rows, grain(width), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const double norm = std::sqrt(dot(x + i * width, x + i * width, width));
      inverse[i] = static_cast<float>(1 / (norm < kEps ? kEps : norm));  // NaN propagates
    }
  });
}

void contrastive_exponentials_cpu(const ContrastiveTile& tile, const ContrastiveLogits& logits,
                                  const float* weight,  // [U]
                                  float* values, int64_t stride, double* row_sum, double* col_sum, double* positive,
                                  const Parallel& parallel) {
  const int64_t blocks = (tile.rows + kBlock - 1) / kBlock;
  const auto partial = std::make_unique_for_overwrite<float[]>(blocks * tile.texts);
  const float* by_text = logits.by_text + tile.first_text;
  parallel(blocks, grain(kBlock * tile.texts), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      float* columns = partial.get() + block * tile.texts;
      std::fill_n(columns, tile.texts, 0.0f);
      for (int64_t i = block * kBlock; i < std::min((block + 1) * kBlock, tile.rows); ++i) {
        const int64_t row = tile.first_row + i, own = tile.positive(i);
        float* row_values = values + i * stride;
        const float by_row = logits.scale * logits.by_row[row];
        if (own >= 0) positive[row] = static_cast<double>(row_values[own] * by_row) * by_text[own];
        row_sum[row] +=
            exponential_row(row_values, by_text, weight + tile.first_text, tile.texts, by_row, logits.offset, columns);
      }
    }
  });
  parallel(tile.texts, grain(blocks), [&](int64_t begin, int64_t end) {
    for (int64_t block = 0; block < blocks; ++block) {
      add_columns(partial.get() + block * tile.texts + begin, end - begin, col_sum + tile.first_text + begin);
    }
  });
}

bool contrastive_factors_cpu(const ContrastiveGradients& g, const ContrastiveLogits& logits,
                             const float* weight,  // [U]
                             int64_t rows, int64_t texts, const ContrastiveFactors& factors, double& magnitude,
                             const Parallel& parallel) {
  const double top = largest(g.grad_row, rows, largest(g.grad_col, texts, largest(g.grad_logit, rows, 0)));
  int exponent = 0;
  if (std::isfinite(top)) std::frexp(top, &exponent);
  exponent = std::clamp(exponent, -1000, 1000);  // so that its inverse is finite
  magnitude = std::ldexp(1.0, exponent);
  const double inverse = std::ldexp(1.0, -exponent);
  const auto outside = [&](double log_sum) { return !(std::abs(log_sum - logits.offset) < kRange); };
  // The exponential of a heavy text may have underflowed where its share of the row's sum has not.
  double heaviest = 1;
  for (int64_t u = 0; u < texts; ++u) heaviest = std::max<double>(heaviest, weight[u]);
  const double lowest = logits.offset - kRange + std::log(heaviest);
  const auto row_outside = [&](double log_sum) { return outside(log_sum) || log_sum < lowest; };
  const auto row_exponential = [&](int64_t i) { return std::exp(logits.offset - g.row_lse[i]) * logits.by_row[i]; };
  // exp of double is a call of about 20 ns.
  parallel(rows, kGrain / 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      factors.row_a[i] = static_cast<float>(g.grad_row[i] * inverse * row_exponential(i));
      factors.row_b[i] = logits.by_row[i];
      factors.row_c[i] = static_cast<float>(g.grad_logit[i] * inverse * logits.by_row[i]);
    }
  });
  parallel(texts, kGrain / 64, [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) {
      const double by_text = logits.by_text[u];
      factors.text_a[u] = static_cast<float>(weight[u] * by_text);
      factors.text_b[u] =
          static_cast<float>(g.grad_col[u] * inverse * std::exp(logits.offset - g.col_lse[u]) * by_text);
      factors.text_c[u] = logits.by_text[u];
    }
  });
  const auto magnitude_of = [](const float* x, int64_t count) {
    double found = 0;
    for (int64_t k = 0; k < count; ++k) found = std::max<double>(found, std::abs(x[k]));
    return found;
  };
  const double limit = std::numeric_limits<float>::max() / 4;
  return std::none_of(g.row_lse, g.row_lse + rows, row_outside) &&
         std::none_of(g.col_lse, g.col_lse + texts, outside) &&
         magnitude_of(factors.row_a, rows) * magnitude_of(factors.text_a, texts) < limit &&
         magnitude_of(factors.row_b, rows) * magnitude_of(factors.text_b, texts) < limit;
}

void contrastive_gradients_cpu(const ContrastiveTile& tile, const ContrastiveLogits& logits,
                               const ContrastiveFactors& factors, bool kept, const float* source, int64_t source_stride,
                               float* out, int64_t out_stride, const Parallel& parallel) {
  const float *text_a = factors.text_a + tile.first_text, *text_b = factors.text_b + tile.first_text;
  parallel(tile.rows, grain(tile.texts), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = tile.first_row + i, own = tile.positive(i);
      const float* values = source + i * source_stride;
      float* result = out + i * out_stride;
      const RowFactors row_factors{factors.row_a[row], factors.row_b[row]};
      if (kept) {
        gradient_row(values, text_a, text_b, tile.texts, row_factors, result);
      } else {
        gradient_row_of_products(values, logits.by_text + tile.first_text, text_a, text_b, tile.texts,
                                 logits.scale * logits.by_row[row], logits.offset, row_factors, result);
      }
      if (own >= 0) result[own] += factors.row_c[row] * factors.text_c[tile.first_text + own];
    }
  });
}

double contrastive_finish_cpu(const float* x, const float* inverse, float factor, bool normalize, int64_t rows,
                              int64_t width, float* d, const Parallel& parallel) {
  std::vector<double> dots(rows);
  parallel(rows, grain(width), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* row = x + i * width;
      dots[i] = dot(row, d + i * width, width);
      const double projection = normalize ? dots[i] * inverse[i] * inverse[i] : 0.0;
      finish_row(row, factor, static_cast<float>(projection), width, d + i * width);
    }
  });
  return std::accumulate(dots.begin(), dots.end(), 0.0);
}

}  // namespace scf
