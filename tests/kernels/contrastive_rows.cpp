// Runs the kernels of kernels/contrastive/contrastive.cu, and their launchers, on the CPU against float64.
//
// Usage: contrastive_rows [MUTATION], as contrastive_tiles.cpp.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <utility>

#include "cuda_on_cpu.h"

// The source of the kernels is compiled as C++: blocks run one after another, so that shared memory can be static.
#define USE_CUDA
#undef __shared__
#undef __global__
#undef __launch_bounds__
#undef __grid_constant__
#define __shared__ static
#define __global__ static
#define __launch_bounds__(...)
#define __grid_constant__
#define __syncthreads emulation::sync_block
#define cudaLaunchKernelEx run_grid
#define cudaGetErrorString(error) "an error"
#define cudaGetLastError() static_cast<void>(0)

static thread_local dim3 threadIdx, blockIdx, blockDim;

template <class Value>
inline Value __ldg(const Value* p) {
  return *p;
}

template <class... Parameters, class... Arguments>
inline cudaError_t run_grid(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                            const Arguments&... arguments) {
  for (unsigned block = 0; block < config->gridDim.x; ++block) {
    const unsigned across = config->blockDim.x;
    emulation::run_block(static_cast<int>(across * config->blockDim.y), [&](int thread) {
      threadIdx = dim3(static_cast<unsigned>(thread) % across, static_cast<unsigned>(thread) / across, 0);
      blockIdx = dim3(block, 0, 0);
      blockDim = config->blockDim;
      kernel(static_cast<Parameters>(arguments)...);
    });
  }
  return cudaSuccess;
}

#include "kernels/contrastive/contrastive.cu"

namespace {

using namespace scf;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
int failed = 0;

// NaN must be NaN; infinities must be equal.
void near(double got, double want, double allowed, const std::string& where) {
  const bool good = std::isnan(want)   ? std::isnan(got)
                    : std::isinf(want) ? got == want
                                       : std::abs(got - want) <= allowed;
  if (!good && failed++ < 5) std::printf("%s: got %g, expected %g\n", where.c_str(), got, want);
}

std::string place(const char* what, int64_t i) { return std::string(what) + " " + std::to_string(i); }

// Rows of features in bfloat16, `stride` apart, from `shift` entries after an aligned address.
struct Features {
  int64_t rows, width, stride;
  std::vector<uint16_t> memory;
  int64_t shift;

  Features(int64_t rows, int64_t width, int64_t stride, int64_t shift, unsigned seed, float size)
      : rows(rows), width(width), stride(stride), memory(rows * stride + width + 16, 0x7fc0), shift(0) {
    while (reinterpret_cast<uintptr_t>(memory.data() + this->shift) % 16 != 0) ++this->shift;
    this->shift += shift;
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0, size);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t d = 0; d < width; ++d) set(i, d, normal(random));
  }
  const uint16_t* data() const { return memory.data() + shift; }
  void set(int64_t i, int64_t d, float value) { memory[shift + i * stride + d] = float_to_bfloat16(value); }
  double at(int64_t i, int64_t d) const { return bfloat16_to_float(memory[shift + i * stride + d]); }
  double dot(int64_t i, const Features& other, int64_t j) const {
    double sum = 0;
    for (int64_t d = 0; d < width; ++d) sum += at(i, d) * other.at(j, d);
    return sum;
  }
  std::vector<float> norms(bool normalize = true) const {
    std::vector<float> out(rows + 1, -7);
    const char* error = inverse_norms_cuda({data(), rows, width, stride, normalize, out.data()}, nullptr);
    near(error != nullptr, 0, 0, "launch");
    near(out[rows], -7, 0, "past the norms");
    return out;
  }
};

void check_norms() {
  for (auto [width, stride, shift] : {std::tuple{5, 5, 0}, {64, 72, 0}, {64, 65, 1}, {520, 520, 0}, {519, 528, 0}}) {
    const Features x(9, width, stride, shift, 1, 3);
    const std::vector<float> norms = x.norms(), ones = x.norms(false);
    for (int i = 0; i < 9; ++i) {
      const double want = 1 / std::sqrt(x.dot(i, x, i));
      near(norms[i], want, 1e-6 * want, place("norm", i));
      near(ones[i], 1, 0, place("not normalised", i));
    }
  }
  Features x(6, 300, 304, 0, 1, 1);
  for (int i = 0; i < 6; ++i)
    for (int d = 0; d < 300; ++d) x.set(i, d, 0);
  x.set(1, 299, kNaN), x.set(2, 0, kInfinity), x.set(3, 290, 0x1p-100f), x.set(4, 256, 0x1p20f), x.set(5, 7, 0x1p21f);
  const double want[] = {1e12f, kNaN, kNaN, kNaN, 0x1p-20, kNaN};
  const std::vector<float> norms = x.norms();
  for (int i = 0; i < 6; ++i) near(norms[i], want[i], 0, place("special norm", i));
}

void check_sums(bool counts, float scale) {
  constexpr int64_t kRows = 35, kTexts = 21, kWidth = 37, kParts = 11;
  const Features x(kRows, kWidth, kWidth, 0, 2, 2), y(kTexts, kWidth, 40, 0, 3, 1);
  const std::vector<float> inv_x = x.norms(), inv_y = y.norms();
  std::vector<float> numbers(kTexts), exponent(kRows);
  std::vector<int32_t> integers(kTexts);
  for (int64_t j = 0; j < kTexts; ++j) integers[j] = j % 3, numbers[j] = 0.5f * static_cast<float>(j % 4);
  TextWeight weight;
  if (counts) {
    weight.counts = integers.data();
  } else {
    weight.numbers = numbers.data();
  }
  const double k2 = logit_scale(scale), offset = sum_offset(static_cast<float>(k2));
  // The parts of some rows are useless, so that these are recomputed.
  std::vector<float> parts(kParts * kRows);
  std::vector<double> want(kRows);
  for (int64_t i = 0; i < kRows; ++i) {
    double sum = 0, by_logit = 0;
    for (int64_t part = 0; part < kParts; ++part)
      sum += parts[part * kRows + i] = static_cast<float>(1 + i + part * part);
    for (int64_t j = 0; j < kTexts; ++j)
      by_logit += weight_of(weight, j) * std::exp2(x.dot(i, y, j) * inv_x[i] * inv_y[j] * k2);
    want[i] = (std::log2(sum) + offset) * kLn2;
    if (i % 8 == 3) {
      parts[i % kParts * kRows + i] = i == 3 ? kInfinity : i == 11 ? kNaN : 0x1.8p127f;
      want[i] = std::log(by_logit);
    }
    if (i == 27) {
      for (int64_t part = 0; part < kParts; ++part) parts[part * kRows + i] = 0;
    }
    exponent[i] = static_cast<float>(i) / kRows;
  }
  std::vector<double> lse(kRows + 1, -7), positive(kRows + 1, -7);
  const Operands operands{x.data(), y.data(), inv_x.data(), inv_y.data(), &scale, kRows, kTexts, kWidth, kWidth, 40};
  finish_sums_cuda({parts.data(), kParts, operands, weight, exponent.data(), lse.data(), positive.data()}, nullptr);
  for (int64_t i = 0; i < kRows; ++i) {
    near(lse[i], want[i], i % 8 == 3 ? 1e-5 * scale : 1e-12, place("log-sum", i));
    near(positive[i], (static_cast<double>(exponent[i]) + offset) * kLn2, 1e-12, place("positive", i));
  }
  near(lse[kRows], -7, 0, "past the log-sums");
  near(positive[kRows], -7, 0, "past the positives");
  // No parts and no texts at all: no terms.
  Operands none = operands;
  none.texts = 0;
  finish_sums_cuda({parts.data(), 0, none, {}, nullptr, lse.data(), nullptr}, nullptr);
  for (int64_t i = 0; i < kRows; ++i) near(lse[i], -INFINITY, 0, place("no terms", i));
}

void check_factors() {
  constexpr int64_t kRows = 130, kTexts = 140;
  std::mt19937 random(5);
  std::uniform_real_distribution<double> unit(0.1, 1);
  const auto numbers = [&](int64_t count) {
    std::vector<double> out(count);
    for (double& v : out) v = unit(random);
    return out;
  };
  const std::vector<double> row_lse = numbers(kRows), text_lse = numbers(kTexts), positive = numbers(kRows);
  const std::vector<double> grad_row = numbers(kRows), grad_text = numbers(kTexts), grad_positive = numbers(kRows);
  std::vector<float> inv_x(kRows), inv_y(kTexts), gain(kRows + 1, -7);
  for (float& v : inv_x) v = static_cast<float>(unit(random));
  for (float& v : inv_y) v = static_cast<float>(unit(random));
  std::vector<int32_t> counts(kTexts);
  for (int64_t j = 0; j < kTexts; ++j) counts[j] = static_cast<int32_t>(j % 5);
  std::vector<GradientRow> rows(kRows + 1, GradientRow{-7, 0, 0, 0, 0, 0, 0, 0});
  std::vector<GradientText> texts(kTexts + 1, GradientText{-7, 0, 0, 0, 0, 0, {}});
  const float scale = 80, k2 = logit_scale(scale);
  const FactorsProblem p{row_lse.data(),
                         text_lse.data(),
                         positive.data(),
                         grad_row.data(),
                         grad_text.data(),
                         grad_positive.data(),
                         inv_x.data(),
                         inv_y.data(),
                         &scale,
                         {nullptr, 5},
                         {nullptr, counts.data()},
                         kRows,
                         kTexts,
                         4,
                         rows.data(),
                         texts.data(),
                         gain.data()};
  factors_cuda(p, nullptr);
  for (int64_t i = 0; i < kRows; ++i) {
    const GradientRow want = gradient_row(row_lse[i], grad_row[i], inv_x[i], k2, 4);
    near(std::memcmp(&rows[i], &want, sizeof want), 0, 0, place("row", i));
    near(gain[i], positive_gain(p, i), 0, place("gain", i));
  }
  for (int64_t j = 0; j < kTexts; ++j) {
    const GradientText want = gradient_text(text_lse[j], grad_text[j], inv_y[j], static_cast<float>(counts[j]), k2, 4);
    near(std::memcmp(&texts[j], &want, sizeof want), 0, 0, place("text", j));
  }
  near(rows[kRows].factor, -7, 0, "past the rows");
  near(texts[kTexts].inverse, -7, 0, "past the texts");
  near(gain[kRows], -7, 0, "past the gains");
}

void check_finish(int64_t width, int64_t shift, bool of_texts, bool index, bool normalize) {
  constexpr int64_t kRows = 7, kPartners = 30, kFirst = -2;
  constexpr int kExponent = 3;
  const Features f(kRows, width, width + shift, shift, 11, 2), other(kPartners, width, width + 8, shift, 12, 1);
  const std::vector<float> inverse = f.norms(normalize);
  std::mt19937 random(13);
  std::normal_distribution<float> normal;
  std::vector<float> product(kRows * width), gain(of_texts ? kPartners : kRows), dots(kRows + 1, -7);
  for (float& v : product) v = normal(random);
  for (float& v : gain) v = normal(random);
  const std::vector<int64_t> of_row = {2, 31, 1, 33, 3, 32, 2};  // plus `first`: 31 and 2 are the last and the first
  std::vector<int64_t> order(kPartners);
  for (int64_t k = 0; k < kPartners; ++k) order[k] = k * 7 % kPartners;
  const std::vector<int64_t> offsets = {0, 21, 21, 24, 25, 25, 29, 30};
  const float scale = 12;
  std::vector<uint16_t> out(kRows * width + 1, 77);
  FinishProblem p{};
  p.features = f.data(), p.inverse = inverse.data(), p.product = product.data(), p.partners = other.data();
  p.gain = gain.data(), p.gain_of_partner = of_texts, p.scale = &scale;
  p.rows = kRows, p.partner_rows = kPartners, p.width = width, p.feature_stride = f.stride;
  p.partner_stride = other.stride, p.exponent = kExponent, p.normalize = normalize;
  p.out = out.data(), p.dots = dots.data();
  p.positives.first = kFirst;
  if (index && of_texts) {
    p.order = order.data(), p.offsets = offsets.data(), p.order_size = static_cast<int64_t>(order.size());
  } else if (index) {
    p.positives.index = of_row.data();
  }
  finish_cuda(p, nullptr);
  for (int64_t i = 0; i < kRows; ++i) {
    std::vector<double> want(product.begin() + i * width, product.begin() + (i + 1) * width);
    const auto add = [&](int64_t partner, double factor) {
      if (partner < 0 || partner >= kPartners) return;
      for (int64_t d = 0; d < width; ++d) want[d] += factor * other.at(partner, d);
    };
    if (index && of_texts) {
      for (int64_t k = offsets[i]; k < offsets[i + 1]; ++k) add(order[k], gain[order[k]]);
    } else {
      const int64_t partner = (index ? of_row[i] : i) + kFirst;
      if (partner >= 0 && partner < kPartners) add(partner, gain[of_texts ? partner : i]);
    }
    double dot = 0, size = 0;
    for (int64_t d = 0; d < width; ++d) dot += want[d] * f.at(i, d), size += std::abs(want[d] * f.at(i, d));
    near(dots[i], std::ldexp(dot, -kExponent), 1e-6 * size, place("dot", i));
    for (int64_t d = 0; d < width; ++d) {
      const double share = normalize ? f.at(i, d) * inverse[i] * inverse[i] * dot : 0;
      const double value = std::ldexp(scale * (want[d] - share), -kExponent);
      // bfloat16 rounds by at most 2^-8 of a number; the rest are float32 sums.
      near(bfloat16_to_float(out[i * width + d]), value, 0x1p-8 * std::abs(value) + 1e-5 * (1 + std::abs(share)),
           place("gradient", i * width + d));
    }
  }
  near(dots[kRows], -7, 0, "past the dots");
  near(out[kRows * width], 77, 0, "past the gradients");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) mutation = std::atoi(argv[1]);
  std::vector<std::function<void()>> checks = {check_norms, check_factors};
  for (int64_t width : {5, 260}) {
    for (int64_t shift : {0, 3}) {
      for (int form = 0; form < 8; ++form) {
        checks.push_back([=] { check_finish(width, shift, form & 1, form & 2, form & 4); });
      }
    }
  }
  checks.push_back([] { check_sums(false, 7); });
  checks.push_back([] { check_sums(true, 90); });
  for (const auto& check : checks) {
    check();
    if (failed && mutation) break;
  }
  return failed > 0;
}
