// The arguments of the backend "cuda" as plain data, checked and turned into the problems of contrastive.h: without
// torch or CUDA, so that tests run the checks without a GPU.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "kernels/contrastive/contrastive.h"

namespace scf {

enum class Type { kBfloat16, kFloat, kDouble, kInt, kLong, kOther };

inline const char* name_of(Type type) {
  constexpr const char* names[] = {"bfloat16", "float32", "float64", "int32", "int64", "another type"};
  return names[static_cast<int>(type)];
}

// A tensor of at most two dimensions.
struct Argument {
  const char* name = nullptr;  // null: None
  const void* data = nullptr;
  Type type = Type::kOther;
  int device = -1;  // -1: the CPU
  int64_t dim = 0;
  int64_t size[2] = {1, 1};
  int64_t stride[2] = {1, 1};

  explicit operator bool() const { return name != nullptr; }
};

// Collects the first error. Pointers are returned in any case, and used only if there is none.
class Checker {
 public:
  explicit Checker(const Argument& first) : device_(first.device) {}

  const std::string& error() const { return error_; }

  void require(bool good, const std::string& message) {
    if (!good && error_.empty()) error_ = message;
  }

  // -1 stands for any size.
  template <class Value>
  Value* contiguous(const Argument& a, Type type, std::initializer_list<int64_t> sizes) {
    check(a, type, sizes);
    int64_t expected = 1;
    for (int64_t d = a.dim - 1; d >= 0 && d < 2; --d) {
      require(a.stride[d] == expected || a.size[d] <= 1 || empty(a),
              std::string(a.name) + ": got a non-contiguous tensor, expected a contiguous one");
      expected *= a.size[d];
    }
    return static_cast<Value*>(const_cast<void*>(a.data));
  }

  // bfloat16 rows with any stride between them.
  const uint16_t* rows(const Argument& a, int64_t count, int64_t width) {
    check(a, Type::kBfloat16, {count, width});
    require(a.stride[1] == 1 || a.size[1] <= 1,
            text(a.name, ": got entries of a row that are ", a.stride[1], " apart, expected adjacent ones"));
    return static_cast<const uint16_t*>(a.data);
  }

  // The tensor memory accelerator takes only such rows.
  void tma(const Argument& a) {
    require(reinterpret_cast<uintptr_t>(a.data) % 16 == 0,
            std::string(a.name) + ": got rows that do not begin at a multiple of 16 bytes, expected aligned rows");
    require(a.size[0] <= 1 || (a.stride[0] % 8 == 0 && a.stride[0] >= a.size[1]),
            text(a.name, ": got rows ", a.stride[0], " entries apart, expected a multiple of 8, at least their width"));
    require(a.size[0] < kMostRows, text(a.name, ": got ", a.size[0], " rows, expected less than 2^31 - 4096"));
  }

  TextWeight weight(const Argument& a, int64_t texts) {
    if (!a) return {};
    if (a.type == Type::kInt) return {nullptr, contiguous<const int32_t>(a, Type::kInt, {texts})};
    return {contiguous<const float>(a, Type::kFloat, {texts}), nullptr};
  }

  Positives positives(const Argument& index, int64_t first, int64_t rows) {
    // The column of any row is then far from the limits of int64.
    constexpr int64_t limit = int64_t{1} << 40;
    require(first > -limit && first < limit, text("first: got ", first, ", expected less than 2^40"));
    return {index ? contiguous<const int64_t>(index, Type::kLong, {rows}) : nullptr, first};
  }

  void capability(int got) {
    require(got == 90, text("got a device of compute capability ", got / 10, ".", got % 10, ", expected 9.0"));
  }

  template <class... Parts>
  static std::string text(const Parts&... parts) {
    std::string out;
    ((out += string_of(parts)), ...);
    return out;
  }

 private:
  static constexpr int64_t kMostRows = (int64_t{1} << 31) - 4096;

  static std::string string_of(const char* part) { return part; }
  static std::string string_of(const std::string& part) { return part; }
  static std::string string_of(int64_t part) { return std::to_string(part); }
  static std::string string_of(int part) { return std::to_string(part); }

  static bool empty(const Argument& a) { return a.size[0] == 0 || a.size[1] == 0; }

  void check(const Argument& a, Type type, std::initializer_list<int64_t> sizes) {
    if (!a) return require(false, "got None, expected a tensor");
    require(a.device >= 0, text(a.name, ": got a tensor on the CPU, expected a CUDA device"));
    require(a.device == device_, text(a.name, ": got a tensor on device ", a.device, ", expected device ", device_));
    require(a.type == type, text(a.name, ": got ", name_of(a.type), ", expected ", name_of(type)));
    require(a.dim == static_cast<int64_t>(sizes.size()),
            text(a.name, ": got ", a.dim, " dimensions, expected ", static_cast<int64_t>(sizes.size())));
    int d = 0;
    for (int64_t size : sizes) {
      require(size < 0 || a.size[d] == size,
              text(a.name, ": got size ", a.size[d], " in dimension ", d, ", expected ", size));
      ++d;
    }
  }

  int device_;
  std::string error_;
};

struct OperandArguments {
  Argument x, y, inv_x, inv_y, scale;
};

inline Operands operands(Checker& check, const OperandArguments& a, bool norms = true) {
  Operands out{};
  out.x = check.rows(a.x, -1, -1);
  out.y = check.rows(a.y, -1, a.x.size[1]);
  if (norms) {
    out.inv_x = check.contiguous<const float>(a.inv_x, Type::kFloat, {a.x.size[0]});
    out.inv_y = check.contiguous<const float>(a.inv_y, Type::kFloat, {a.y.size[0]});
    out.scale = check.contiguous<const float>(a.scale, Type::kFloat, {1});
  }
  out.rows = a.x.size[0], out.texts = a.y.size[0], out.width = a.x.size[1];
  out.x_stride = a.x.stride[0], out.y_stride = a.y.stride[0];
  return out;
}

inline int64_t tiles(int64_t count, int64_t side) { return (count + side - 1) / side; }

// Operands of hopper/.
inline Operands tma_operands(Checker& check, const OperandArguments& a, int capability, bool norms) {
  Operands out = operands(check, a, norms);
  check.require(out.width >= 8 && out.width % 8 == 0,
                Checker::text("x: got rows of ", out.width, " entries, expected a positive multiple of 8"));
  check.tma(a.x);
  check.tma(a.y);
  // The scheduler counts tiles in 32 bits.
  check.require(tiles(out.rows, kTileRows) * tiles(out.texts, kTileTexts) < int64_t{1} << 30,
                Checker::text("got ", out.rows, " rows and ", out.texts, " texts, expected less than 2^44 logits"));
  check.capability(capability);
  // The stride of a single row may be anything.
  if (out.rows <= 1) out.x_stride = out.width;
  if (out.texts <= 1) out.y_stride = out.width;
  return out;
}

// Each returns the error, or an empty string and the problem.
inline std::string check_inverse_norms(const Argument& x, bool normalize, const Argument& out,
                                       InverseNormsProblem& problem) {
  Checker check(x);
  problem.x = check.rows(x, -1, -1);
  problem.out = check.contiguous<float>(out, Type::kFloat, {x.size[0]});
  problem.rows = x.size[0], problem.width = x.size[1], problem.stride = x.stride[0];
  problem.normalize = normalize;
  return check.error();
}

struct SumsArguments {
  OperandArguments operands;
  Argument index;
  int64_t first;
  Argument weight, row_parts, column_parts, own_exponent;
};

inline std::string check_sums(const SumsArguments& a, int capability, SumsProblem& problem) {
  Checker check(a.operands.x);
  problem.operands = tma_operands(check, a.operands, capability, true);
  const int64_t rows = problem.operands.rows, texts = problem.operands.texts;
  problem.positives = check.positives(a.index, a.first, rows);
  problem.weight = check.weight(a.weight, texts);
  problem.row_parts = check.contiguous<float>(a.row_parts, Type::kFloat, {tiles(texts, kTileTexts), rows});
  problem.column_parts = check.contiguous<float>(a.column_parts, Type::kFloat, {tiles(rows, kTileRows), texts});
  problem.own_exponent = check.contiguous<float>(a.own_exponent, Type::kFloat, {rows});
  return check.error();
}

struct FinishSumsArguments {
  Argument parts;
  OperandArguments operands;
  Argument weight, own_exponent, lse, positive;
};

inline std::string check_finish_sums(const FinishSumsArguments& a, FinishSumsProblem& problem) {
  Checker check(a.operands.x);
  problem.operands = operands(check, a.operands);
  const int64_t rows = problem.operands.rows;
  problem.parts = check.contiguous<const float>(a.parts, Type::kFloat, {-1, rows});
  problem.count = a.parts.size[0];
  problem.weight = check.weight(a.weight, problem.operands.texts);
  problem.lse = check.contiguous<double>(a.lse, Type::kDouble, {rows});
  check.require(static_cast<bool>(a.own_exponent) == static_cast<bool>(a.positive),
                "got only one of own_exponent and positive, expected both or neither");
  problem.own_exponent = a.own_exponent ? check.contiguous<const float>(a.own_exponent, Type::kFloat, {rows}) : nullptr;
  problem.positive = a.positive ? check.contiguous<double>(a.positive, Type::kDouble, {rows}) : nullptr;
  return check.error();
}

struct FactorsArguments {
  Argument row_lse, column_lse, positive, grad_row, grad_column, grad_positive, inv_x, inv_y, scale, index;
  int64_t first;
  Argument weight;
  int64_t exponent;
  Argument rows, texts, positive_gain;
};

inline void check_exponent(Checker& check, int64_t exponent) {
  check.require(exponent >= -64 && exponent <= 64,
                Checker::text("exponent: got ", exponent, ", expected at most 64 in magnitude"));
}

inline std::string check_factors(const FactorsArguments& a, FactorsProblem& problem) {
  Checker check(a.row_lse);
  const int64_t rows = a.row_lse.size[0], texts = a.column_lse.size[0];
  problem.row_lse = check.contiguous<const double>(a.row_lse, Type::kDouble, {-1});
  problem.column_lse = check.contiguous<const double>(a.column_lse, Type::kDouble, {-1});
  problem.positive = check.contiguous<const double>(a.positive, Type::kDouble, {rows});
  problem.grad_row = check.contiguous<const double>(a.grad_row, Type::kDouble, {rows});
  problem.grad_column = check.contiguous<const double>(a.grad_column, Type::kDouble, {texts});
  problem.grad_positive = check.contiguous<const double>(a.grad_positive, Type::kDouble, {rows});
  problem.inv_x = check.contiguous<const float>(a.inv_x, Type::kFloat, {rows});
  problem.inv_y = check.contiguous<const float>(a.inv_y, Type::kFloat, {texts});
  problem.scale = check.contiguous<const float>(a.scale, Type::kFloat, {1});
  problem.positives = check.positives(a.index, a.first, rows);
  problem.weight = check.weight(a.weight, texts);
  problem.rows = rows, problem.texts = texts;
  check_exponent(check, a.exponent);
  problem.exponent = static_cast<int>(a.exponent);
  problem.row_out = check.contiguous<GradientRow>(a.rows, Type::kFloat, {rows, sizeof(GradientRow) / sizeof(float)});
  problem.text_out =
      check.contiguous<GradientText>(a.texts, Type::kFloat, {texts, sizeof(GradientText) / sizeof(float)});
  for (const Argument* out : {&a.rows, &a.texts}) {
    check.require(reinterpret_cast<uintptr_t>(out->data) % 16 == 0,
                  Checker::text(out->name, ": got a tensor that is not aligned to 16 bytes"));
  }
  problem.positive_gain = check.contiguous<float>(a.positive_gain, Type::kFloat, {rows});
  return check.error();
}

struct GradientsArguments {
  OperandArguments operands;  // without norms and scale
  Argument index;
  int64_t first;
  Argument rows, texts, out;
};

inline std::string check_gradients(const GradientsArguments& a, int capability, GradientsProblem& problem) {
  Checker check(a.operands.x);
  problem.operands = tma_operands(check, a.operands, capability, false);
  const int64_t rows = problem.operands.rows, texts = problem.operands.texts;
  problem.positives = check.positives(a.index, a.first, rows);
  problem.row = check.contiguous<const GradientRow>(a.rows, Type::kFloat, {rows, sizeof(GradientRow) / sizeof(float)});
  problem.text =
      check.contiguous<const GradientText>(a.texts, Type::kFloat, {texts, sizeof(GradientText) / sizeof(float)});
  for (const Argument* in : {&a.rows, &a.texts}) {
    check.require(reinterpret_cast<uintptr_t>(in->data) % 16 == 0,
                  Checker::text(in->name, ": got a tensor that is not aligned to 16 bytes"));
  }
  problem.out = const_cast<uint16_t*>(check.rows(a.out, rows, -1));
  check.tma(a.out);
  check.require(a.out.size[1] >= texts,
                Checker::text("out: got rows of ", a.out.size[1], " entries, expected at least ", texts));
  // The stride of a single row may be anything.
  problem.stride = rows <= 1 ? tiles(texts, 8) * 8 : a.out.stride[0];
  return check.error();
}

struct FinishArguments {
  Argument features, inverse, product, partners, index, offsets;
  int64_t first;
  Argument gain, scale;
  int64_t exponent;
  bool normalize;
  Argument out, dots;
  bool of_texts;  // gains belong to the partners, and an index is the order of the partners of all rows
};

inline std::string check_finish(const FinishArguments& a, FinishProblem& problem) {
  Checker check(a.features);
  const int64_t rows = a.features.size[0], width = a.features.size[1];
  problem.features = check.rows(a.features, -1, -1);
  problem.feature_stride = a.features.stride[0];
  problem.inverse = check.contiguous<const float>(a.inverse, Type::kFloat, {rows});
  problem.product = check.contiguous<const float>(a.product, Type::kFloat, {rows, width});
  problem.partners = check.rows(a.partners, -1, width);
  problem.partner_stride = a.partners.stride[0];
  problem.rows = rows, problem.partner_rows = a.partners.size[0], problem.width = width;
  problem.positives = check.positives(a.of_texts ? Argument{} : a.index, a.first, rows);
  problem.order = problem.offsets = nullptr;
  problem.order_size = 0;
  if (a.of_texts) {
    check.require(static_cast<bool>(a.index) == static_cast<bool>(a.offsets),
                  "got only one of order and offsets, expected both or neither");
    if (a.index && a.offsets) {
      problem.order = check.contiguous<const int64_t>(a.index, Type::kLong, {-1});
      problem.order_size = a.index.size[0];
      problem.offsets = check.contiguous<const int64_t>(a.offsets, Type::kLong, {rows + 1});
    }
  }
  problem.gain = check.contiguous<const float>(a.gain, Type::kFloat, {a.of_texts ? problem.partner_rows : rows});
  problem.gain_of_partner = a.of_texts;
  problem.scale = check.contiguous<const float>(a.scale, Type::kFloat, {1});
  check_exponent(check, a.exponent);
  problem.exponent = static_cast<int>(a.exponent);
  problem.normalize = a.normalize;
  problem.out = check.contiguous<uint16_t>(a.out, Type::kBfloat16, {rows, width});
  problem.dots = check.contiguous<float>(a.dots, Type::kFloat, {rows});
  check.require(width <= kFinishWidth,
                Checker::text("features: got rows of ", width, " entries, expected at most ", kFinishWidth));
  return check.error();
}

}  // namespace scf
