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
