// Eight 32-bit lanes: two RGBX pixels. The arithmetic uses GCC's portable vector types; only the conversions to and
// from bytes use AVX2 intrinsics, because GCC compiles them to scalar code.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace scf {

using Int8 = int32_t __attribute__((vector_size(32)));
using Unsigned8 = uint32_t __attribute__((vector_size(32)));
using Float8 = float __attribute__((vector_size(32)));
using Short16 = int16_t __attribute__((vector_size(32)));

inline Int8 load(const int32_t* from) {
  Int8 lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

inline Float8 load(const float* from) {
  Float8 lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

inline Short16 load(const int16_t* from) {
  Short16 lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

inline void store(Short16 lanes, int16_t* to) { std::memcpy(to, &lanes, sizeof lanes); }

// Eight bytes to eight lanes.
inline Int8 widen(const uint8_t* from) {
#ifdef __AVX2__
  return reinterpret_cast<Int8>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  Int8 lanes;
  for (int i = 0; i < 8; ++i) lanes[i] = from[i];
  return lanes;
#endif
}

// Sixteen bytes to sixteen lanes.
inline Short16 widen_short(const uint8_t* from) {
#ifdef __AVX2__
  return reinterpret_cast<Short16>(_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  Short16 lanes;
  for (int i = 0; i < 16; ++i) lanes[i] = from[i];
  return lanes;
#endif
}

// The first, or the last, four of each eight lanes of `a` and `b` in turn.
inline Short16 interleave_low(Short16 a, Short16 b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 8, 24, 9, 25, 10, 26, 11, 27);
}
inline Short16 interleave_high(Short16 a, Short16 b) {
  return __builtin_shufflevector(a, b, 4, 20, 5, 21, 6, 22, 7, 23, 12, 28, 13, 29, 14, 30, 15, 31);
}

// The sums of two adjacent products each.
inline Int8 add_products(Short16 a, Short16 b) {
#ifdef __AVX2__
  return reinterpret_cast<Int8>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
  Int8 lanes;
  for (int i = 0; i < 8; ++i) lanes[i] = a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
  return lanes;
#endif
}

// Undoes interleave_low and interleave_high for lanes that were summed in pairs; values must fit 16 bits.
inline Short16 pack(Int8 low, Int8 high) {
#ifdef __AVX2__
  return reinterpret_cast<Short16>(_mm256_packs_epi32(reinterpret_cast<__m256i>(low), reinterpret_cast<__m256i>(high)));
#else
  Short16 lanes;
  for (int i = 0; i < 8; ++i) {
    lanes[i + i / 4 * 4] = static_cast<int16_t>(low[i]);
    lanes[i + i / 4 * 4 + 4] = static_cast<int16_t>(high[i]);
  }
  return lanes;
#endif
}

// Sixteen lanes, 0 .. 255, to sixteen bytes.
inline void store_bytes(Short16 lanes, uint8_t* to) {
#ifdef __AVX2__
  const auto words = reinterpret_cast<__m256i>(lanes);
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
#else
  for (int i = 0; i < 16; ++i) to[i] = static_cast<uint8_t>(lanes[i]);
#endif
}

// Sixteen lanes to sixteen bytes, clipped to 0 .. 255.
inline void narrow(Int8 a, Int8 b, uint8_t* to) {
#ifdef __AVX2__
  const __m256i words = _mm256_permute4x64_epi64(
      _mm256_packs_epi32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)), 0b11011000);
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
#else
  for (int i = 0; i < 8; ++i) {
    to[i] = static_cast<uint8_t>(a[i] < 0 ? 0 : a[i] > 255 ? 255 : a[i]);
    to[i + 8] = static_cast<uint8_t>(b[i] < 0 ? 0 : b[i] > 255 ? 255 : b[i]);
  }
#endif
}

// Four RGB pixels (16 bytes are read) to RGBX.
inline void spread(const uint8_t* rgb, uint8_t* rgbx) {
#ifdef __AVX2__
  const __m128i order = _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1);
  const __m128i pixels = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rgb));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(rgbx), _mm_shuffle_epi8(pixels, order));
#else
  for (int i = 0; i < 4; ++i) std::memcpy(rgbx + 4 * i, rgb + 3 * i, 3);
#endif
}

}  // namespace scf
