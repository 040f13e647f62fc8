// Elements of CPU kernels: float and bfloat16, read as float and rounded to nearest even when written.
#pragma once

#include <bit>
#include <cstdint>

namespace scf {

struct BFloat16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

template <class T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

// Without a comparison of floats, which keeps loops from being vectorised well: a NaN keeps its upper bits and gets the
// quiet bit, so that rounding cannot turn it into infinity.
template <>
inline BFloat16 from_float<BFloat16>(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  const uint32_t is_nan = 0u - static_cast<uint32_t>((bits & 0x7fffffffu) > 0x7f800000u);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return {static_cast<uint16_t>((rounded & ~is_nan) | ((bits >> 16 | 0x40u) & is_nan))};
}

}  // namespace scf
