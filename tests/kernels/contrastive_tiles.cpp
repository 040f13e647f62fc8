// Runs the tile functions of kernels/contrastive/hopper/tile.h on the CPU against float64, with the accumulator layouts
// of the tensor cores: one thread per CUDA thread; shuffles, votes and barriers are emulated.
//
// Usage: contrastive_tiles [MUTATION]. Prints a line per case that fails and returns their number. A generated copy of
// the headers may replace expressions by wrong ones where `mutation` has their number (test_contrastive_hopper.py).
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <random>
#include <string>

#include "cuda_on_cpu.h"

constexpr int kThreads = 128;
using std::min;

#include "kernels/contrastive/hopper/tile.h"

// stmatrix: lane l gives the address of row l % 8 of matrix l / 8, and holds two entries of row l / 4 of each matrix.
struct EmulatedMatrixStore {
  using SRegisters = uint32_t[4];
  using DRegisters = cute::uint128_t[1];
  static void copy(const uint32_t& a, const uint32_t& b, const uint32_t& c, const uint32_t& d, cute::uint128_t& row) {
    static cute::uint128_t* rows[kThreads];
    const int thread = emulation::this_thread, lane = thread % 32, warp = thread - lane;
    rows[thread] = &row;
    emulation::sync_warp();
    const uint32_t words[4] = {a, b, c, d};
    for (int matrix = 0; matrix < 4; ++matrix) {
      reinterpret_cast<uint32_t*>(rows[warp + matrix * 8 + lane / 4])[lane % 4] = words[matrix];
    }
    emulation::sync_warp();
  }
};

template <>
struct cute::Copy_Traits<EmulatedMatrixStore> : cute::Copy_Traits<cute::SM90_U32x4_STSM_N> {};

namespace {

using namespace scf;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kNowhere = INT64_MAX / 2;

struct Case {
  std::string name;
  int rows, texts;
  float scale = 10;
  enum { kOnes, kNumbers, kCounts } weight = kOnes;
  bool index = false;
  int64_t first = 0;
  std::function<void(struct Data&)> change = nullptr;  // after the random data, before everything derived from it
};

// Dot products and everything else of one problem, with guards of NaN around the outputs.
struct Data {
  int rows, texts;
  std::vector<double> dots;  // [rows, texts] features' dot products, of float32 values
  std::vector<float> inv_x, inv_y, numbers;
  std::vector<int32_t> counts;
  std::vector<int64_t> index;
  float scale;
  Operands operands{};
  Positives positives;
  TextWeight weight;

  explicit Data(const Case& c) : rows(c.rows), texts(c.texts), scale(c.scale) {
    std::mt19937 random(7);
    std::uniform_real_distribution<float> unit(-1, 1);
    inv_x.resize(rows), inv_y.resize(texts), numbers.resize(texts), counts.resize(texts), index.resize(rows);
    for (float& v : inv_x) v = std::exp2(4 * unit(random));
    for (float& v : inv_y) v = std::exp2(4 * unit(random));
    for (float& v : numbers) v = std::max(0.0f, 1.5f * unit(random));
    for (int32_t& v : counts) v = static_cast<int32_t>(random() % 4);
    for (int64_t& v : index) v = static_cast<int64_t>(random() % texts) - c.first;
    dots.resize(static_cast<size_t>(rows) * texts);
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < texts; ++j) set_cosine(i, j, unit(random));
    if (c.change) c.change(*this);
    operands.inv_x = inv_x.data(), operands.inv_y = inv_y.data(), operands.scale = &scale;
    operands.rows = rows, operands.texts = texts;
    positives = {c.index ? index.data() : nullptr, c.first};
    if (c.weight == Case::kNumbers) weight.numbers = numbers.data();
    if (c.weight == Case::kCounts) weight.counts = counts.data();
  }
  double& dot(int i, int j) { return dots[static_cast<size_t>(i) * texts + j]; }
  void set_cosine(int i, int j, double cosine) {
    dot(i, j) = static_cast<float>(cosine / (static_cast<double>(inv_x[i]) * inv_y[j]));
  }
  double cosine(int i, int j) { return dot(i, j) * inv_x[i] * inv_y[j]; }
  double k2() const { return static_cast<float>(scale * static_cast<float>(kLog2e)); }
  double logit(int i, int j) { return cosine(i, j) * k2(); }
  double weight_of_text(int j) const {
    return weight.numbers ? numbers[j] : weight.counts ? static_cast<double>(counts[j]) : 1.0;
  }
  int64_t positive_of(int i) const { return (positives.index ? index[i] : i) + positives.first; }
  // Products and sums of float32 numbers as large as the logits.
  double tolerance() {
    double largest = 0;
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < texts; ++j)
        if (std::isfinite(logit(i, j))) largest = std::max(largest, std::abs(logit(i, j)));
    return 0x1p-24 * (4 * largest + 64);
  }
};

template <int kRows, int kColumns>
auto tensor_core() {
  using namespace cute;
  using Atom = SM90::GMMA::MMA_64x128x16_F32BF16BF16_SS<SM90::GMMA::Major::K, SM90::GMMA::Major::K>;
  auto mma = make_tiled_mma(MMA_Atom<Atom>{}, Layout<Shape<_1, _1, _1>>{});
  static_assert(size(decltype(mma){}) == kThreads);
  return mma;
}

// Calls body(tile_row, tile_column, accumulators, mma, thread) on every thread for every tile of a grid of clusters of
// 2 x 2, with the dot products in the accumulators; TMA fills zeros past the ends.
template <class Body, class After>
void for_each_tile(Data& data, Body body, After after) {
  auto mma = tensor_core<kTileRows, kTileTexts>();
  const auto tiles = [](int count, int side) { return (count + 2 * side - 1) / (2 * side) * 2; };
  emulation::run_block(kThreads, [&](int t) {
    for (int tile_row = 0; tile_row < tiles(data.rows, kTileRows); ++tile_row) {
      for (int tile_column = 0; tile_column < tiles(data.texts, kTileTexts); ++tile_column) {
        const auto shape = cute::make_shape(cute::Int<kTileRows>{}, cute::Int<kTileTexts>{});
        auto accumulators = cute::partition_fragment_C(mma, shape);
        auto at = mma.get_thread_slice(t).partition_C(cute::make_identity_tensor(shape));
        for (int i = 0; i < cute::size(accumulators); ++i) {
          const int row = tile_row * kTileRows + get<0>(at(i)), column = tile_column * kTileTexts + get<1>(at(i));
          accumulators(i) = row < data.rows && column < data.texts ? static_cast<float>(data.dot(row, column)) : 0.0f;
        }
        body(tile_row, tile_column, accumulators, mma, t);
        for (int i = 0; i < cute::size(accumulators); ++i) {
          after(tile_row * kTileRows + get<0>(at(i)), tile_column * kTileTexts + get<1>(at(i)), accumulators(i));
        }
        emulation::sync_block();
      }
    }
  });
}

const auto block_sync = [] { emulation::sync_block(); };

struct Check {
  const Case& c;
  const char* what;
  int wrong = 0;
  std::string first{};

  // NaN must be NaN; infinities must be equal.
  void near(double got, double want, double allowed, const std::string& where) {
    const bool good = std::isnan(want)   ? std::isnan(got)
                      : std::isinf(want) ? got == want
                                         : std::abs(got - want) <= allowed;
    if (good) return;
    if (wrong++ == 0) first = where + ": got " + std::to_string(got) + ", expected " + std::to_string(want);
  }
  int report() const {
    if (wrong) std::printf("%s of %s: %d wrong, %s\n", what, c.name.c_str(), wrong, first.c_str());
    return wrong > 0;
  }
};

std::string place(int i, int j) { return std::to_string(i) + ", " + std::to_string(j); }

int check_sums(const Case& c) {
  Data data(c);
  const int row_tiles = (data.rows + kTileRows - 1) / kTileRows,
            text_tiles = (data.texts + kTileTexts - 1) / kTileTexts;
  // A tile more than there are, which must stay untouched.
  std::vector<float> row_parts(static_cast<size_t>(text_tiles + 1) * data.rows, kNaN);
  std::vector<float> column_parts(static_cast<size_t>(row_tiles + 1) * data.texts, kNaN), exponent(data.rows + 1, kNaN);
  const float untouched = -12345;
  std::fill(row_parts.end() - data.rows, row_parts.end(), untouched);
  std::fill(column_parts.end() - data.texts, column_parts.end(), untouched);
  std::fill(exponent.begin(), exponent.end(), untouched);
  const SumsProblem problem{data.operands,    data.positives,      data.weight,
                            row_parts.data(), column_parts.data(), exponent.data()};
  static SumScratch<kTileRows, kTileTexts, 4> scratch;
  for_each_tile(
      data,
      [&](int tile_row, int tile_column, auto& accumulators, auto mma, int thread) {
        sum_tile<kTileRows, kTileTexts, 4>(problem, tile_row, tile_column, accumulators, mma, thread, scratch,
                                           block_sync);
      },
      [](int, int, float) {});
  const double tolerance = data.tolerance(), offset = sum_offset(static_cast<float>(data.k2()));
  Check check{c, "sums"};
  // Terms are flushed or denormal below 2^-126.
  for (int i = 0; i < data.rows; ++i) {
    for (int tile = 0; tile < text_tiles; ++tile) {
      double sum = 0;
      for (int j = tile * kTileTexts; j < std::min(data.texts, (tile + 1) * kTileTexts); ++j)
        sum +=
            data.weight_of_text(j) > 0x1p20 ? kInfinity : data.weight_of_text(j) * std::exp2(data.logit(i, j) - offset);
      const float found = row_parts[static_cast<size_t>(tile) * data.rows + i];
      if (std::isinf(sum)) {
        check.near(std::isfinite(found), 0, 0, "row with a heavy text " + place(i, tile));
      } else {
        check.near(found, sum, tolerance * sum + 0x1p-98, "row " + place(i, tile));
      }
    }
    const int64_t column = data.positive_of(i);
    if (column >= 0 && column < data.texts) {
      const double logit = data.logit(i, static_cast<int>(column));
      // Three roundings at the size of the logit and of the offset.
      check.near(exponent[i], logit - offset, 0x1p-22 * (std::abs(logit) + offset), "exponent " + std::to_string(i));
    } else {
      check.near(exponent[i], untouched, 0, "exponent " + std::to_string(i));
    }
  }
  for (int j = 0; j < data.texts; ++j) {
    for (int tile = 0; tile < row_tiles; ++tile) {
      double sum = 0;
      for (int i = tile * kTileRows; i < std::min(data.rows, (tile + 1) * kTileRows); ++i)
        sum += std::exp2(data.logit(i, j) - offset);
      check.near(column_parts[static_cast<size_t>(tile) * data.texts + j], sum, tolerance * sum + 0x1p-118,
                 "column " + place(tile, j));
    }
  }
  for (int i = 0; i < data.rows; ++i) check.near(row_parts[row_parts.size() - 1 - i], untouched, 0, "past the rows");
  for (int j = 0; j < data.texts; ++j)
    check.near(column_parts[column_parts.size() - 1 - j], untouched, 0, "past the columns");
  check.near(exponent[data.rows], untouched, 0, "past the exponents");
  return check.report();
}

int check_gradients(const Case& c) {
  constexpr int kExponent = 5;
  Data data(c);
  const float k2 = static_cast<float>(data.k2());
  std::mt19937 random(9);
  std::uniform_real_distribution<double> unit(0, 1);
  std::vector<double> row_lse(data.rows), text_lse(data.texts), row_grad(data.rows), text_grad(data.texts);
  for (double& v : row_grad) v = (unit(random) - 0.2) / 32;
  for (double& v : text_grad) v = (unit(random) - 0.2) / 32;
  for (int i = 0; i < data.rows; ++i) {
    double top = -INFINITY, sum = 0;
    for (int j = 0; j < data.texts; ++j)
      if (data.weight_of_text(j) > 0 || std::isnan(data.logit(i, j))) top = std::max(data.logit(i, j), top);
    for (int j = 0; j < data.texts; ++j) {
      const double term = data.weight_of_text(j) * std::exp2(data.logit(i, j) - top);
      if (data.weight_of_text(j) > 0 || std::isnan(data.logit(i, j))) sum += term;
    }
    row_lse[i] = (std::log2(sum) + top) * kLn2;
  }
  for (int j = 0; j < data.texts; ++j) {
    double top = -INFINITY, sum = 0;
    for (int i = 0; i < data.rows; ++i) top = std::max(top, data.logit(i, j));
    for (int i = 0; i < data.rows; ++i) sum += std::exp2(data.logit(i, j) - top);
    text_lse[j] = (std::log2(sum) + top) * kLn2;
  }
  std::vector<GradientRow> row(data.rows);
  std::vector<GradientText> text(data.texts);
  for (int i = 0; i < data.rows; ++i) row[i] = gradient_row(row_lse[i], row_grad[i], data.inv_x[i], k2, kExponent);
  for (int j = 0; j < data.texts; ++j)
    text[j] = gradient_text(text_lse[j], text_grad[j], data.inv_y[j], static_cast<float>(data.weight_of_text(j)), k2,
                            kExponent);
  GradientsProblem problem{};
  problem.operands = data.operands, problem.positives = data.positives;
  problem.operands.inv_x = problem.operands.inv_y = nullptr;
  problem.row = row.data(), problem.text = text.data();
  const int width = (data.texts + kTileTexts - 1) / kTileTexts * kTileTexts;
  std::vector<float> out(static_cast<size_t>(data.rows) * width, kNaN);
  static GradientScratch<kTileRows, kTileTexts, 4> scratch;
  for_each_tile(
      data,
      [&](int tile_row, int tile_column, auto& accumulators, auto mma, int thread) {
        if (tile_row * kTileRows >= data.rows || tile_column * kTileTexts >= data.texts) return;
        gradient_tile<kTileRows, kTileTexts, 4>(problem, tile_row, tile_column, accumulators, mma, thread, scratch,
                                                block_sync);
      },
      [&](int i, int j, float value) {
        if (i < data.rows && j < width) out[static_cast<size_t>(i) * width + j] = value;
      });
  const double tolerance = data.tolerance();
  Check check{c, "gradients"};
  for (int i = 0; i < data.rows; ++i) {
    for (int j = 0; j < width; ++j) {
      const float got = out[static_cast<size_t>(i) * width + j];
      if (j >= data.texts) {
        // Never stored. Not NaN where the row is finite.
        if (std::isfinite(data.inv_x[i])) check.near(got, 0, 0, "past the end " + place(i, j));
        continue;
      }
      const double logit = data.logit(i, j), weight = data.weight_of_text(j);
      const double inverse = std::ldexp(static_cast<double>(data.inv_x[i]) * data.inv_y[j], kExponent);
      const double by_row =
          weight == 0 && !std::isnan(logit) ? 0 : row_grad[i] * weight * std::exp2(logit - row_lse[i] * kLog2e);
      const double by_text = text_grad[j] * std::exp2(logit - text_lse[j] * kLog2e);
      const double want = j == data.positive_of(i) ? 0 : (by_row + by_text) * inverse;
      // Terms below 2^-26 of their sums may be lost.
      const double size = (std::abs(by_row) + std::abs(by_text)) * inverse;
      const double lost = 0x1p-26 * (std::abs(row_grad[i]) * weight + std::abs(text_grad[j])) * inverse;
      check.near(got, want, j == data.positive_of(i) ? 0 : tolerance * size + lost, place(i, j));
    }
  }
  return check.report();
}

// Logits far from their log-sums' usual place: the tile takes two exponentials.
void steep(Data& data) {
  std::mt19937 random(3);
  std::uniform_real_distribution<double> unit(-1, 1);
  for (float& v : data.inv_x) v = 1;
  for (float& v : data.inv_y) v = 1;
  for (int i = 0; i < data.rows; ++i)
    for (int j = 0; j < data.texts; ++j) data.set_cosine(i, j, 6 * unit(random) - (i % 3 == 0 ? 8 : 0));
}

// One text, which one warp stages, and one row.
void one_apart(Data& data) {
  for (int i = 0; i < data.rows; ++i) data.set_cosine(i, 70, -10);
  for (int j = 0; j < data.texts; ++j) data.set_cosine(40, j, -10);
}

// Texts of weight zero lie 200 above what the other texts give, in base 2.
void above(Data& data) {
  for (int j = 0; j < data.texts; ++j) {
    data.numbers[j] = j % 5 == 0 ? 0.0f : 0.5f;
    for (int i = 0; i < data.rows; ++i) data.set_cosine(i, j, j % 5 == 0 ? 20 : (i + j) % 7 * 0.1);
  }
}

// A weight that overflows the factor of an exponential that is zero.
void heavy(Data& data) {
  data.numbers[9] = 1e20f;
  data.inv_y[9] = 0x1p20f;
  for (int i = 0; i < data.rows; ++i)
    for (int j = 0; j < data.texts; ++j) data.set_cosine(i, j, j == 9 && i > 0 ? -1 : (i + j) % 7 * 0.01);
}

std::vector<Case> cases() {
  std::vector<Case> list;
  list.push_back({.name = "one row and one text", .rows = 1, .texts = 1});
  list.push_back({.name = "whole tiles", .rows = 256, .texts = 128, .weight = Case::kNumbers, .index = true});
  list.push_back(
      {.name = "ragged, a cluster past the end", .rows = 300, .texts = 261, .weight = Case::kCounts, .index = true});
  list.push_back({.name = "a text too heavy for the sums",
                  .rows = 130,
                  .texts = 260,
                  .weight = Case::kNumbers,
                  .change = [](Data& data) { data.numbers[5] = 0x1p21f, data.numbers[200] = 0x1p20f; }});
  list.push_back({.name = "one past a tile", .rows = 129, .texts = 257, .weight = Case::kNumbers});
  list.push_back({.name = "a block after the first row's texts", .rows = 130, .texts = 200, .first = 70});
  list.push_back({.name = "a block before", .rows = 200, .texts = 131, .first = -69});
  list.push_back({.name = "an index into another block", .rows = 140, .texts = 150, .index = true, .first = -1000});
  list.push_back({.name = "positives at the borders",
                  .rows = 256,
                  .texts = 130,
                  .weight = Case::kCounts,
                  .index = true,
                  .first = 3,
                  .change = [](Data& data) {
                    const int64_t borders[] = {0,   1,   7,  8,   63,  64,       126,       127,
                                               128, 129, -1, 130, 131, kNowhere, -kNowhere, (1LL << 32) + 5,
                                               255};
                    for (int i = 0; i < data.rows; ++i) data.index[i] = borders[i % std::size(borders)] - 3;
                  }});
  list.push_back({.name = "NaN and infinite rows", .rows = 135, .texts = 140, .index = true, .change = [](Data& data) {
                    for (int j = 0; j < data.texts; ++j) data.dot(17, j) = kNaN;
                    data.inv_x[17] = kNaN;
                  }});
  list.push_back({.name = "a NaN text",
                  .rows = 135,
                  .texts = 140,
                  .weight = Case::kNumbers,
                  .index = true,
                  .change = [](Data& data) {
                    for (int i = 0; i < data.rows; ++i) data.dot(i, 139) = kNaN;
                    data.inv_y[139] = kNaN;
                    data.numbers[139] = 0;
                  }});
  list.push_back({.name = "scale 100, cosines to -1",
                  .rows = 140,
                  .texts = 135,
                  .scale = 100,
                  .weight = Case::kCounts,
                  .index = true,
                  .change = [](Data& data) {
                    for (int i = 0; i < data.rows; ++i)
                      for (int j = 0; j < data.texts; ++j)
                        data.set_cosine(i, j, i == j ? 1 : i % 4 == 0 ? -1 : std::cos(i * 0.7 + j * 1.3));
                  }});
  list.push_back({.name = "norms far from one, zero rows",
                  .rows = 131,
                  .texts = 133,
                  .scale = 50,
                  .index = true,
                  .change = [](Data& data) {
                    for (int i = 0; i < data.rows; ++i) data.inv_x[i] = std::exp2(static_cast<float>(i % 41 - 20));
                    for (int j = 0; j < data.texts; ++j) data.inv_y[j] = std::exp2(static_cast<float>(20 - j % 41));
                    for (int i = 0; i < data.rows; ++i)
                      for (int j = 0; j < data.texts; ++j) data.set_cosine(i, j, std::sin(i * 1.1 + j * 0.3));
                    for (int j = 0; j < data.texts; ++j) data.dot(5, j) = 0;
                    for (int i = 0; i < data.rows; ++i) data.dot(i, 6) = 0;
                    data.inv_x[5] = data.inv_y[6] = 1e12f;
                  }});
  return list;
}

// Only their gradients: their sums are recomputed.
std::vector<Case> steep_cases() {
  std::vector<Case> list;
  list.push_back({.name = "steep",
                  .rows = 131,
                  .texts = 140,
                  .scale = 60,
                  .weight = Case::kNumbers,
                  .index = true,
                  .change = steep});
  list.push_back({.name = "a heavy text far below the log-sum",
                  .rows = 129,
                  .texts = 130,
                  .scale = 100,
                  .weight = Case::kNumbers,
                  .change = heavy});
  list.push_back({.name = "one row and one text apart", .rows = 130, .texts = 129, .index = true, .change = one_apart});
  list.push_back({.name = "texts of weight zero above the log-sum",
                  .rows = 129,
                  .texts = 133,
                  .weight = Case::kNumbers,
                  .index = true,
                  .change = above});
  return list;
}

// Every entry of a tile reaches its place in shared memory.
int check_staging() {
  const Case c{.name = "shared memory", .rows = kTileRows, .texts = kTileTexts};
  Check check{c, "staging"};
  Data data(c);
  alignas(1024) static cutlass::bfloat16_t memory[kTileRows * kTileTexts];
  const auto staged = cute::make_tensor(cute::make_smem_ptr(memory), StagingLayout<kTileRows, kTileTexts>{});
  for (bool rows : {true, false}) {  // numbers that bfloat16 holds
    for (int i = 0; i < kTileRows; ++i)
      for (int j = 0; j < kTileTexts; ++j) data.dot(i, j) = rows ? i : j;
    for_each_tile(
        data,
        [&](int tile_row, int tile_column, auto& accumulators, auto mma, int thread) {
          if (tile_row > 0 || tile_column > 0) return;
          stage_tile<EmulatedMatrixStore>(accumulators, mma, thread, staged);
        },
        [](int, int, float) {});
    for (int i = 0; i < kTileRows; ++i)
      for (int j = 0; j < kTileTexts; ++j) check.near(float(staged(i, j)), rows ? i : j, 0, place(i, j));
  }
  return check.report();
}

int check_arithmetic() {
  const Case c{.name = "rows and numbers", .rows = 0, .texts = 0};
  Check check{c, "arithmetic"};
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float value = bfloat16_to_float(static_cast<uint16_t>(bits));
    const uint16_t back = float_to_bfloat16(value);
    if (value != value) {
      check.near(bfloat16_to_float(back), kNaN, 0, "NaN");
    } else {
      check.near(back, bits, 0, "bfloat16");
    }
  }
  // Halfway between neighbours: to the even one. A little more: up.
  check.near(float_to_bfloat16(0x1.01p0f), 0x3f80, 0, "tie to even");
  check.near(float_to_bfloat16(0x1.03p0f), 0x3f82, 0, "tie to even, up");
  check.near(float_to_bfloat16(0x1.010002p0f), 0x3f81, 0, "above a tie");
  check.near(bfloat16_to_float(float_to_bfloat16(3.4e38f)), kInfinity, 0, "overflow");

  check.near(inverse_norm(9, true, true), 1 / 3.0, 1e-7, "norm 3");
  check.near(inverse_norm(9, true, false), 1, 0, "not normalised");
  check.near(inverse_norm(0, false, true), 1e12f, 0, "zero row");
  check.near(inverse_norm(0, true, true), kNaN, 0, "squares that vanish");
  check.near(inverse_norm(0x1p-40f, true, true), 0x1p20, 0, "smallest norm");
  check.near(inverse_norm(0x1p40f, true, true), 0x1p-20, 0, "largest norm");
  check.near(inverse_norm(0x0.ffp-40f, true, true), kNaN, 0, "below the smallest norm");
  check.near(inverse_norm(0x1.01p40f, true, true), kNaN, 0, "above the largest norm");
  check.near(inverse_norm(kNaN, true, true), kNaN, 0, "NaN row");

  // Running sums against float64, in two parts.
  std::mt19937 random(1);
  std::uniform_real_distribution<float> logits(-400, 400);
  for (int trial = 0; trial < 100; ++trial) {
    RunningSum parts[2];
    double top = -INFINITY, sum = 0;
    std::vector<std::pair<float, float>> terms;
    for (int i = 0; i < 40; ++i)
      terms.push_back({logits(random), i % 4 == 0 ? 0.0f : static_cast<float>(i % 3) + 0.5f});
    terms[0].first = 1000;  // of weight zero
    for (size_t i = 0; i < terms.size(); ++i) parts[i % 2].add(terms[i].first, terms[i].second);
    parts[0].merge(parts[1]);
    for (auto [logit, weight] : terms) top = weight > 0 ? std::max<double>(top, logit) : top;
    for (auto [logit, weight] : terms) sum += weight == 0 ? 0 : weight * std::exp2(logit - top);
    check.near(std::log2(static_cast<double>(parts[0].terms)) + static_cast<double>(parts[0].top), std::log2(sum) + top,
               1e-4, "running sum");
  }
  RunningSum none, poisoned;
  none.merge(RunningSum{});
  check.near(std::log2(none.terms) + none.top, -INFINITY, 0, "no terms");
  poisoned.add(3, 1);
  poisoned.add(kNaN, 0);
  poisoned.add(5, 1);
  check.near(poisoned.terms, kNaN, 0, "NaN of weight zero");
  check.near(sum_in_range(0x1p-81) + sum_in_range(kInfinity) + sum_in_range(kNaN), 0, 0, "out of range");
  check.near(sum_in_range(0x1p-80) + sum_in_range(0x1p127), 2, 0, "in range");
  check.near(natural_log_sum(10, 1), 10 * kLn2, 1e-15, "natural logarithm");
  check.near(natural_log_sum(10, 0), kNaN, 0, "scale 0");
  check.near(natural_log_sum(10, kNaN), kNaN, 0, "scale NaN");
  check.near(positive_logit(0.5f, 144) + positive_logit(2, 1), 46.5 * kLn2, 1e-13, "positive");
  check.near(sum_offset(144) + sum_offset(99), 44, 0, "offset of the sums");
  check.near(gradient_offset(144) + gradient_offset(85), 58, 0, "offset of the gradients");

  // The rounded log-sum and the corrected gain together give the exact factor.
  for (double lse : {-50.123456789, 0.0, 7.7, 63.987654321}) {
    const Gain gain = gain_of(lse, 3e-6, 20, 18);
    const double want = std::ldexp(3e-6, 18);
    const double relative = gain.gain * std::exp2(lse * kLog2e - static_cast<double>(gain.log_sum)) / want;
    check.near(relative, 1, 1e-7, "gain");
    check.near(gain.term / (want * std::exp2(20 - lse * kLog2e)), 1, 1e-7, "term");
  }
  check.near(gain_of(-INFINITY, 0.5, 20, 1).gain, 1, 0, "gain of no terms");
  const GradientRow row = gradient_row(10, 0.25, 0.5f, 144, 3);
  check.near(row.shift, 59, 1e-5, "shift");
  check.near(row.factor, 72, 0, "factor");
  check.near(row.apart, 0, 0, "near");
  // 58 + 1 - log_sum, with log-sums on both sides of the limits.
  check.near(gradient_row((59 + 79) * kLn2, 1, 0.5f, 144, 0).apart, 0, 0, "near, above");
  check.near(gradient_row((59 + 81) * kLn2, 1, 0.5f, 144, 0).apart, 1, 0, "apart, above");
  check.near(gradient_row((59 - 81) * kLn2, 1, 0.5f, 144, 0).apart, 1, 0, "apart, below");
  check.near(gradient_row(NAN, 1, 0.5f, 144, 0).apart, 1, 0, "a NaN log-sum");
  const GradientText text = gradient_text((58 - 81) * kLn2, 0.5, 0.25f, 3, 144, 4);
  check.near(text.apart, 1, 0, "text apart");
  check.near(text.weight, 0.75, 0, "weight of the text");
  check.near(text.gain, 2, 1e-6, "gain of the text");

  const double row_lse[] = {2, 3}, text_lse[] = {4, 5, 6}, positive[] = {1.5, 1.25}, grad_row[] = {0.5, 0.25};
  const double grad_text[] = {0.125, 0.75, 0.375}, grad_positive[] = {-1, -0.875};
  const float inv_x[] = {2, 4}, inv_y[] = {0.5f, 0.25f, 8}, weight[] = {3, 0, 7};
  const int64_t index[] = {1, 3};
  FactorsProblem p{};
  p.row_lse = row_lse, p.column_lse = text_lse, p.positive = positive;
  p.grad_row = grad_row, p.grad_column = grad_text, p.grad_positive = grad_positive;
  p.inv_x = inv_x, p.inv_y = inv_y, p.weight.numbers = weight, p.rows = 2, p.texts = 3, p.exponent = 4;
  const auto expected = [&](int i, int t) {
    return 16 * inv_x[i] * inv_y[t] *
           (grad_row[i] * weight[t] * std::exp(positive[i] - row_lse[i]) +
            grad_text[t] * std::exp(positive[i] - text_lse[t]) + grad_positive[i]);
  };
  for (int i = 0; i < 2; ++i) check.near(positive_gain(p, i), expected(i, i), 1e-6, "gain of a positive");
  p.positives = {index, 0};
  check.near(positive_gain(p, 0), expected(0, 1), 1e-6, "gain of an indexed positive");
  check.near(positive_gain(p, 1), 0, 0, "gain of an index out of range");
  p.positives.first = -1;
  check.near(positive_gain(p, 1), expected(1, 2), 1e-6, "gain of a shifted index");

  // d = s 2^-K (P - x (x . P)) with x = f / |f|.
  check.near(finished_entry(3, 5, 7, 0.5f, 2, true), 2 * (5 - 3 * 0.5 * 0.5 * 7), 1e-6, "finished entry");
  check.near(finished_entry(3, 5, 7, 1, 2, false), 10, 0, "finished entry, not normalised");
  return check.report();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) mutation = std::atoi(argv[1]);
  int failed = check_arithmetic() + check_staging();
  for (const Case& c : cases()) {
    if (failed && mutation) return failed;
    failed += check_sums(c);
    failed += check_gradients(c);
  }
  for (const Case& c : steep_cases()) failed += check_gradients(c);
  return failed;
}
