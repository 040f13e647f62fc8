// Hostile arguments of the ops of the backend "cuda": each must give its error. Prints a line per check that fails, and
// returns their number.
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "kernels/contrastive/arguments.h"
#include "kernels/contrastive/hopper/schedule.h"

namespace {

using namespace scf;

alignas(16) uint16_t memory[64];
int failed = 0;

Argument tensor(const char* name, Type type, std::initializer_list<int64_t> sizes) {
  Argument a{.name = name, .data = memory, .type = type, .device = 1, .dim = static_cast<int64_t>(sizes.size())};
  int64_t d = 0;
  for (int64_t size : sizes) a.size[d++] = size;
  if (a.dim == 2) a.stride[0] = a.size[1];
  return a;
}

void expect(const std::string& name, const std::string& got, const std::string& wanted) {
  const bool good = wanted.empty() ? got.empty() : got.find(wanted) != std::string::npos;
  if (good) return;
  std::printf("%s: got \"%s\", expected \"%s\"\n", name.c_str(), got.c_str(), wanted.c_str());
  ++failed;
}

template <class Arguments>
struct Change {
  std::string wanted;  // in the error; empty: none
  std::function<void(Arguments&)> change;
};

template <class Arguments, class Check>
void check_all(const std::string& op, const Arguments& valid, Check check, const std::vector<Change<Arguments>>& list) {
  expect(op, check(valid), "");
  for (const Change<Arguments>& change : list) {
    Arguments changed = valid;
    change.change(changed);
    expect(op + " [" + change.wanted + "]", check(changed), change.wanted);
  }
}

constexpr int64_t kRows = 130, kTexts = 257, kWidth = 24;

OperandArguments valid_operands() {
  return {tensor("x", Type::kBfloat16, {kRows, kWidth}), tensor("y", Type::kBfloat16, {kTexts, kWidth}),
          tensor("inv_x", Type::kFloat, {kRows}), tensor("inv_y", Type::kFloat, {kTexts}),
          tensor("scale", Type::kFloat, {1})};
}

const void* shifted(int64_t bytes) { return reinterpret_cast<const char*>(memory) + bytes; }

void check_sums_arguments() {
  using A = SumsArguments;
  const A valid{valid_operands(),
                tensor("index", Type::kLong, {kRows}),
                -3,
                tensor("weight", Type::kInt, {kTexts}),
                tensor("row_parts", Type::kFloat, {3, kRows}),
                tensor("col_parts", Type::kFloat, {2, kTexts}),
                tensor("own_exponent", Type::kFloat, {kRows})};
  SumsProblem problem{};
  const auto check = [&](const A& a) { return check_sums(a, 90, problem); };
  const std::vector<Change<A>> list = {
      {"", [](A& a) { a.index = a.weight = Argument{}; }},
      {"", [](A& a) { a.weight.type = Type::kFloat; }},
      {"", [](A& a) { a.operands.x.stride[0] = 32, a.operands.y.stride[0] = 40; }},
      {"x: got a tensor on the CPU, expected a CUDA device", [](A& a) { a.operands.x.device = -1; }},
      {"y: got a tensor on device 0, expected device 1", [](A& a) { a.operands.y.device = 0; }},
      {"index: got a tensor on the CPU", [](A& a) { a.index.device = -1; }},
      {"own_exponent: got a tensor on device 2", [](A& a) { a.own_exponent.device = 2; }},
      {"x: got float32, expected bfloat16", [](A& a) { a.operands.x.type = Type::kFloat; }},
      {"y: got another type, expected bfloat16", [](A& a) { a.operands.y.type = Type::kOther; }},
      {"inv_x: got bfloat16, expected float32", [](A& a) { a.operands.inv_x.type = Type::kBfloat16; }},
      {"scale: got float64, expected float32", [](A& a) { a.operands.scale.type = Type::kDouble; }},
      {"index: got int32, expected int64", [](A& a) { a.index.type = Type::kInt; }},
      {"weight: got int64, expected float32", [](A& a) { a.weight.type = Type::kLong; }},
      {"x: got 1 dimensions, expected 2", [](A& a) { a.operands.x.dim = 1; }},
      {"row_parts: got 3 dimensions", [](A& a) { a.row_parts.dim = 3; }},
      {"scale: got 0 dimensions", [](A& a) { a.operands.scale.dim = 0; }},
      {"y: got size 16 in dimension 1, expected 24", [](A& a) { a.operands.y.size[1] = 16; }},
      {"inv_x: got size 129 in dimension 0, expected 130", [](A& a) { a.operands.inv_x.size[0] = 129; }},
      {"inv_y: got size 130 in dimension 0, expected 257", [](A& a) { a.operands.inv_y.size[0] = kRows; }},
      {"scale: got size 2", [](A& a) { a.operands.scale.size[0] = 2; }},
      {"index: got size 257 in dimension 0, expected 130", [](A& a) { a.index.size[0] = kTexts; }},
      {"weight: got size 130 in dimension 0, expected 257", [](A& a) { a.weight.size[0] = kRows; }},
      {"row_parts: got size 2 in dimension 0, expected 3", [](A& a) { a.row_parts.size[0] = 2; }},
      {"row_parts: got size 131 in dimension 1", [](A& a) { a.row_parts.size[1] = kRows + 1; }},
      {"col_parts: got size 3 in dimension 0, expected 2", [](A& a) { a.column_parts.size[0] = 3; }},
      {"col_parts: got size 256 in dimension 1, expected 257", [](A& a) { a.column_parts.size[1] = 256; }},
      {"own_exponent: got size 1", [](A& a) { a.own_exponent.size[0] = 1; }},
      {"x: got entries of a row that are 130 apart", [](A& a) { a.operands.x.stride[1] = kRows; }},
      {"inv_y: got a non-contiguous tensor", [](A& a) { a.operands.inv_y.stride[0] = 2; }},
      {"index: got a non-contiguous tensor", [](A& a) { a.index.stride[0] = 0; }},
      {"row_parts: got a non-contiguous tensor", [](A& a) { a.row_parts.stride[0] = kRows + 8; }},
      {"x: got rows that do not begin at a multiple of 16 bytes", [](A& a) { a.operands.x.data = shifted(2); }},
      {"y: got rows that do not begin at a multiple of 16 bytes", [](A& a) { a.operands.y.data = shifted(8); }},
      {"x: got rows 28 entries apart", [](A& a) { a.operands.x.stride[0] = 28; }},
      {"y: got rows 0 entries apart", [](A& a) { a.operands.y.stride[0] = 0; }},
      {"x: got rows 16 entries apart, expected a multiple of 8, at least their width",
       [](A& a) { a.operands.x.stride[0] = 16; }},
      {"x: got rows of 20 entries, expected a positive multiple of 8",
       [](A& a) { a.operands.x.size[1] = a.operands.y.size[1] = 20; }},
      {"x: got rows of 0 entries", [](A& a) { a.operands.x.size[1] = a.operands.y.size[1] = 0; }},
      {"first: got 1099511627776", [](A& a) { a.first = int64_t{1} << 40; }},
      {"row_parts: got size 3 in dimension 0, expected 16777184",
       [](A& a) { a.operands.y.size[0] = a.operands.inv_y.size[0] = a.weight.size[0] = (int64_t{1} << 31) - 4097; }},
      {"got 16777216 rows and 16777216 texts, expected less than 2^44 logits",
       [](A& a) {
         for (Argument* t : {&a.operands.x, &a.operands.y, &a.operands.inv_x, &a.operands.inv_y}) t->size[0] = 1 << 24;
       }},
      {"y: got 2147479552 rows, expected less than 2^31 - 4096",
       [](A& a) { a.operands.y.size[0] = a.operands.inv_y.size[0] = (int64_t{1} << 31) - 4096; }},
      {"got None, expected a tensor", [](A& a) { a.own_exponent = Argument{}; }},
  };
  check_all<A>("sums", valid, check, list);
  for (int capability : {0, 80, 89, 100, 120}) {
    expect("sums", check_sums(valid, capability, problem), ", expected 9.0");
  }

  // What the launcher is given.
  expect("problem", check(valid), "");
  const Operands& operands = problem.operands;
  expect("sizes", operands.rows == kRows && operands.texts == kTexts && operands.width == kWidth ? "" : "wrong", "");
  expect("strides", operands.x_stride == kWidth && operands.y_stride == kWidth ? "" : "wrong", "");
  expect("weight", problem.weight.counts != nullptr && problem.weight.numbers == nullptr ? "" : "wrong", "");
  expect("first", problem.positives.first == -3 && problem.positives.index != nullptr ? "" : "wrong", "");
  // A single row has any stride; TMA needs a valid one. No rows and no texts are problems that launch nothing.
  A single = valid;
  for (Argument* a : {&single.operands.x, &single.operands.inv_x, &single.index, &single.own_exponent}) a->size[0] = 1;
  single.operands.x.stride[0] = 3;
  single.row_parts.size[1] = single.row_parts.stride[0] = single.column_parts.size[0] = 1;
  expect("a single row", check(single), "");
  expect("its stride", problem.operands.x_stride == kWidth ? "" : "wrong", "");
  A empty = valid;
  for (Argument* a : {&empty.operands.x, &empty.operands.inv_x, &empty.index, &empty.own_exponent}) a->size[0] = 0;
  empty.row_parts.size[1] = empty.column_parts.size[0] = 0;
  expect("no rows", check(empty), "");
}

void check_gradients_arguments() {
  using A = GradientsArguments;
  const A valid{valid_operands(),
                tensor("index", Type::kLong, {kRows}),
                0,
                tensor("rows", Type::kFloat, {kRows, 8}),
                tensor("texts", Type::kFloat, {kTexts, 8}),
                tensor("out", Type::kBfloat16, {kRows, 264})};
  GradientsProblem problem{};
  const auto check = [&](const A& a) { return check_gradients(a, 90, problem); };
  const std::vector<Change<A>> list = {
      {"", [](A& a) { a.out.size[1] = kTexts; }},
      {"", [](A& a) { a.operands.inv_x = a.operands.inv_y = a.operands.scale = a.index = Argument{}; }},
      {"out: got rows of 256 entries, expected at least 257", [](A& a) { a.out.size[1] = 256; }},
      {"out: got rows 257 entries apart", [](A& a) { a.out.size[1] = a.out.stride[0] = kTexts; }},
      {"out: got rows 256 entries apart", [](A& a) { a.out.stride[0] = 256; }},
      {"out: got rows that do not begin at a multiple of 16 bytes", [](A& a) { a.out.data = shifted(4); }},
      {"out: got float32, expected bfloat16", [](A& a) { a.out.type = Type::kFloat; }},
      {"out: got size 129 in dimension 0, expected 130", [](A& a) { a.out.size[0] = 129; }},
      {"out: got entries of a row that are 2 apart", [](A& a) { a.out.stride[1] = 2; }},
      {"out: got a tensor on device 0", [](A& a) { a.out.device = 0; }},
      {"rows: got size 4 in dimension 1, expected 8", [](A& a) { a.rows.size[1] = 4; }},
      {"rows: got size 257 in dimension 0, expected 130", [](A& a) { a.rows.size[0] = kTexts; }},
      {"rows: got a non-contiguous tensor", [](A& a) { a.rows.stride[0] = 16; }},
      {"rows: got a tensor that is not aligned to 16 bytes", [](A& a) { a.rows.data = shifted(4); }},
      {"texts: got a tensor that is not aligned to 16 bytes", [](A& a) { a.texts.data = shifted(8); }},
      {"texts: got float64", [](A& a) { a.texts.type = Type::kDouble; }},
      {"x: got rows that do not begin", [](A& a) { a.operands.x.data = shifted(2); }},
  };
  check_all<A>("gradients", valid, check, list);
  expect("gradients", check_gradients(valid, 80, problem), "got a device of compute capability 8.0, expected 9.0");
}

void check_finish_sums_arguments() {
  using A = FinishSumsArguments;
  const A valid{tensor("parts", Type::kFloat, {7, kRows}), valid_operands(),
                tensor("weight", Type::kFloat, {kTexts}),  tensor("own_exponent", Type::kFloat, {kRows}),
                tensor("lse", Type::kDouble, {kRows}),     tensor("positive", Type::kDouble, {kRows})};
  FinishSumsProblem problem{};
  const auto check = [&](const A& a) { return check_finish_sums(a, problem); };
  const std::vector<Change<A>> list = {
      // Rows of any alignment and stride.
      {"", [](A& a) { a.operands.x.data = shifted(2), a.operands.x.stride[0] = 0, a.operands.y.stride[0] = 23; }},
      {"", [](A& a) { a.weight = a.own_exponent = a.positive = Argument{}; }},
      {"", [](A& a) { a.parts.size[0] = 0; }},
      {"got only one of own_exponent and positive", [](A& a) { a.own_exponent = Argument{}; }},
      {"got only one of own_exponent and positive", [](A& a) { a.positive = Argument{}; }},
      {"parts: got size 131 in dimension 1, expected 130", [](A& a) { a.parts.size[1] = kRows + 1; }},
      {"parts: got a non-contiguous tensor", [](A& a) { a.parts.stride[1] = 7, a.parts.stride[0] = 1; }},
      {"lse: got float32, expected float64", [](A& a) { a.lse.type = Type::kFloat; }},
      {"positive: got size 1", [](A& a) { a.positive.size[0] = 1; }},
      {"weight: got size 130", [](A& a) { a.weight.size[0] = kRows; }},
      {"x: got entries of a row that are 2 apart", [](A& a) { a.operands.x.stride[1] = 2; }},
      {"inv_x: got size 3", [](A& a) { a.operands.inv_x.size[0] = 3; }},
  };
  check_all<A>("finish_sums", valid, check, list);
}

void check_factors_arguments() {
  using A = FactorsArguments;
  const A valid{tensor("row_lse", Type::kDouble, {kRows}),
                tensor("col_lse", Type::kDouble, {kTexts}),
                tensor("positive", Type::kDouble, {kRows}),
                tensor("grad_row", Type::kDouble, {kRows}),
                tensor("grad_col", Type::kDouble, {kTexts}),
                tensor("grad_positive", Type::kDouble, {kRows}),
                tensor("inv_x", Type::kFloat, {kRows}),
                tensor("inv_y", Type::kFloat, {kTexts}),
                tensor("scale", Type::kFloat, {1}),
                tensor("index", Type::kLong, {kRows}),
                0,
                tensor("weight", Type::kInt, {kTexts}),
                18,
                tensor("rows", Type::kFloat, {kRows, 8}),
                tensor("texts", Type::kFloat, {kTexts, 8}),
                tensor("positive_gain", Type::kFloat, {kRows})};
  FactorsProblem problem{};
  const auto check = [&](const A& a) { return check_factors(a, problem); };
  const std::vector<Change<A>> list = {
      {"row_lse: got float32, expected float64", [](A& a) { a.row_lse.type = Type::kFloat; }},
      {"positive: got size 131 in dimension 0, expected 130", [](A& a) { a.positive.size[0] = kRows + 1; }},
      {"grad_row: got size 257", [](A& a) { a.grad_row.size[0] = kTexts; }},
      {"grad_col: got size 130", [](A& a) { a.grad_column.size[0] = kRows; }},
      {"grad_positive: got a non-contiguous tensor", [](A& a) { a.grad_positive.stride[0] = 0; }},
      {"inv_x: got float64", [](A& a) { a.inv_x.type = Type::kDouble; }},
      {"inv_y: got size 130", [](A& a) { a.inv_y.size[0] = kRows; }},
      {"exponent: got 65", [](A& a) { a.exponent = 65; }},
      {"exponent: got -9223372036854775808", [](A& a) { a.exponent = INT64_MIN; }},
      {"rows: got size 257 in dimension 0, expected 130", [](A& a) { a.rows.size[0] = kTexts; }},
      {"texts: got a tensor that is not aligned", [](A& a) { a.texts.data = shifted(4); }},
      {"positive_gain: got a tensor on the CPU", [](A& a) { a.positive_gain.device = -1; }},
  };
  check_all<A>("factors", valid, check, list);
}

void check_finish_arguments() {
  using A = FinishArguments;
  const A rows{tensor("features", Type::kBfloat16, {kRows, 20}),
               tensor("inverse", Type::kFloat, {kRows}),
               tensor("product", Type::kFloat, {kRows, 20}),
               tensor("partners", Type::kBfloat16, {kTexts, 20}),
               tensor("index", Type::kLong, {kRows}),
               Argument{},
               0,
               tensor("gain", Type::kFloat, {kRows}),
               tensor("scale", Type::kFloat, {1}),
               18,
               true,
               tensor("out", Type::kBfloat16, {kRows, 20}),
               tensor("dots", Type::kFloat, {kRows}),
               false};
  A texts = rows;
  texts.index = tensor("order", Type::kLong, {kTexts});
  texts.offsets = tensor("offsets", Type::kLong, {kRows + 1});
  texts.gain = tensor("gain", Type::kFloat, {kTexts});
  texts.of_texts = true;
  FinishProblem problem{};
  const auto check = [&](const A& a) { return check_finish(a, problem); };
  check_all<A>("finish rows", rows, check,
               {
                   {"", [](A& a) { a.index = Argument{}; }},
                   {"", [](A& a) { a.features.data = shifted(2), a.partners.stride[0] = 21; }},
                   {"gain: got size 257 in dimension 0, expected 130", [](A& a) { a.gain.size[0] = kTexts; }},
                   {"index: got size 257", [](A& a) { a.index.size[0] = kTexts; }},
                   {"product: got size 24 in dimension 1, expected 20", [](A& a) { a.product.size[1] = 24; }},
                   {"product: got bfloat16, expected float32", [](A& a) { a.product.type = Type::kBfloat16; }},
                   {"partners: got size 24 in dimension 1, expected 20", [](A& a) { a.partners.size[1] = 24; }},
                   {"out: got a non-contiguous tensor", [](A& a) { a.out.stride[0] = 24; }},
                   {"out: got size 1 in dimension 0", [](A& a) { a.out.size[0] = 1; }},
                   {"dots: got float64", [](A& a) { a.dots.type = Type::kDouble; }},
                   {"exponent: got 100", [](A& a) { a.exponent = 100; }},
                   {"features: got rows of 8200 entries, expected at most 8192",
                    [](A& a) {
                      for (Argument* t : {&a.features, &a.product, &a.partners, &a.out}) {
                        t->size[1] = t->stride[0] = 8200;
                      }
                    }},
               });
  expect("rows", problem.order == nullptr && !problem.gain_of_partner ? "" : "wrong", "");
  check_all<A>("finish texts", texts, check,
               {
                   {"", [](A& a) { a.index = a.offsets = Argument{}; }},
                   {"got only one of order and offsets", [](A& a) { a.index = Argument{}; }},
                   {"got only one of order and offsets", [](A& a) { a.offsets = Argument{}; }},
                   {"offsets: got size 130 in dimension 0, expected 131", [](A& a) { a.offsets.size[0] = kRows; }},
                   {"order: got int32", [](A& a) { a.index.type = Type::kInt; }},
                   {"gain: got size 130 in dimension 0, expected 257", [](A& a) { a.gain.size[0] = kRows; }},
               });
  expect("texts", check(texts), "");
  expect("texts", problem.order != nullptr && problem.gain_of_partner && !problem.positives.index ? "" : "wrong", "");
}

void check_inverse_norms_arguments() {
  struct A {
    Argument x, out;
  };
  const A valid{tensor("x", Type::kBfloat16, {kRows, 5}), tensor("out", Type::kFloat, {kRows})};
  InverseNormsProblem problem{};
  check_all<A>("inverse_norms", valid, [&](const A& a) { return check_inverse_norms(a.x, true, a.out, problem); },
               {
                   {"", [](A& a) { a.x.stride[0] = 0, a.x.data = shifted(2); }},
                   {"x: got float32", [](A& a) { a.x.type = Type::kFloat; }},
                   {"x: got entries of a row that are 3 apart", [](A& a) { a.x.stride[1] = 3; }},
                   {"out: got size 1", [](A& a) { a.out.size[0] = 1; }},
                   {"out: got a non-contiguous tensor", [](A& a) { a.out.stride[0] = 2; }},
               });
}

// Groups of clusters, and what the scheduler then adds: it rounds the clusters of both sides up to whole groups.
void check_schedule() {
  for (int64_t rows : {1, 128, 257, 8192, 8448, 32700, 33000, 65536, 100001, 262144}) {
    for (int64_t texts : {1, 700, 8192, 8448, 50000, 262144}) {
      const int64_t together = hopper::clusters_together(rows, texts);
      const auto rounded = [](int64_t count, int64_t group) { return tiles(count, 256 * group) * group; };
      const int64_t grid = rounded(rows, together) * rounded(texts, together),
                    least = rounded(rows, 1) * rounded(texts, 1);
      const bool good = together == 1 || together == 2 || together == 4 || together == 8;
      expect("groups", good ? "" : std::to_string(together), "");
      expect("tiles past the end", 20 * grid <= 21 * least ? "" : std::to_string(rows), "");
    }
  }
  for (int64_t side : {2048, 8192, 32768, 65536, 262144}) {
    expect("whole groups", std::to_string(hopper::clusters_together(side, side)), "8");
  }
}

}  // namespace

int main() {
  check_schedule();
  check_sums_arguments();
  check_gradients_arguments();
  check_finish_sums_arguments();
  check_factors_arguments();
  check_finish_arguments();
  check_inverse_norms_arguments();
  return failed;
}
