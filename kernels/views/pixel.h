// The arithmetic of one pixel, one tap, one run, compiled for both the CPU and CUDA. Formulas: README.md.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/host_device.h"

namespace scf {

constexpr int kBlurBits = 24;     // fixed point of the Gaussian: 255 * 2^24 fits 32 unsigned bits
constexpr int kBlurPassBits = 8;  // fixed point of colours between the two passes of the blur: 255 * 2^8 fits 16 bits
constexpr int kResizeBits = 22;   // fixed point of the resize, Pillow's
constexpr int kAugmentBlurRadius = 4;

// SciPy's "reflect": the edge pixel is repeated, and the image is mirrored repeatedly if it is small.
SCF_HD int64_t reflect(int64_t i, int64_t size) {
  if (i >= 0 && i < size) return i;
  const int64_t period = 2 * size;
  i %= period;
  if (i < 0) i += period;
  return i < size ? i : period - 1 - i;
}

// SciPy's "mirror", torch's "reflect": the edge pixel is not repeated.
SCF_HD int64_t mirror(int64_t i, int64_t size) {
  const int64_t period = size > 1 ? 2 * size - 2 : 1;
  i %= period;
  if (i < 0) i += period;
  return i < period - i ? i : period - i;
}

// A weighted sum of bytes to units of 2^-kBlurPassBits, rounded to nearest; the published blur truncates it to a byte.
SCF_HD uint32_t blurred_once(uint32_t sum, bool published) {
  constexpr int kDropped = kBlurBits - kBlurPassBits;
  return published ? sum >> kBlurBits << kBlurPassBits : (sum + (1u << (kDropped - 1))) >> kDropped;
}

// A weighted sum of these to the nearest byte; the published blur truncates it.
SCF_HD uint32_t blurred_twice(uint64_t sum, bool published) {
  constexpr int kDropped = kBlurBits + kBlurPassBits;
  return static_cast<uint32_t>((published ? sum : sum + (uint64_t{1} << (kDropped - 1))) >> kDropped);
}

// Weights of a blur along the colour axis of length three.
struct ColourMix {
  uint32_t weight[3][3];  // [to][from], in units of 2^-24
};

inline ColourMix colour_mix(const uint32_t* weights /* [radius + 1] */, int64_t radius) {
  ColourMix mix{};
  for (int64_t to = 0; to < 3; ++to) {
    for (int64_t k = -radius; k <= radius; ++k) mix.weight[to][reflect(to + k, 3)] += weights[k < 0 ? -k : k];
  }
  return mix;
}

SCF_HD uint8_t mix_colour(const uint32_t* weights /* [3] */, uint32_t red, uint32_t green, uint32_t blue) {
  return static_cast<uint8_t>((weights[0] * red + weights[1] * green + weights[2] * blue) >> kBlurBits);
}

// exp(x) for x <= 0, relative error below 2e-7; a polynomial, so that loops over it vectorise.
SCF_HD float exp_negative(float x) {
  float t = x * 1.44269504f;
  t = t > -126.0f ? t : -126.0f;
  const int whole = static_cast<int>(t - 0.5f);  // nearest, for t <= 0
  const float f = (t - static_cast<float>(whole)) * 0.693147181f;
  float p = 1.0f / 720;
  p = p * f + 1.0f / 120;
  p = p * f + 1.0f / 24;
  p = p * f + 1.0f / 6;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  const int32_t bits = (whole + 127) << 23;
  float scale;
#ifdef __CUDA_ARCH__
  scale = __int_as_float(bits);
#else
  std::memcpy(&scale, &bits, sizeof scale);
#endif
  return p * scale;
}

// Integer sums of a mask, so that its centre does not depend on the order of the pixels.
struct MaskSums {
  int64_t area = 0;
  int64_t x = 0;
  int64_t y = 0;
};

// A coordinate as whole pixels and a fraction, so that the distance of a pixel is 0 only where it is exactly 0: for a
// tiny sigma, the weight there is 1 and anywhere else 0.
struct Coordinate {
  float whole;
  float fraction;

  SCF_HD float distance(float pixel) const { return pixel - whole - fraction; }
};

struct Centre {
  Coordinate x;
  Coordinate y;
};

SCF_HD Coordinate mean_coordinate(int64_t sum, int64_t area) {
  const double total = static_cast<double>(sum), count = static_cast<double>(area);
  const double whole = floor(total / count + 0.5);
  return {static_cast<float>(whole), static_cast<float>((total - whole * count) / count)};
}

SCF_HD Centre centre_of(const MaskSums& sums) {
  return {mean_coordinate(sums.x, sums.area), mean_coordinate(sums.y, sums.area)};
}

// -1 / (2 sigma^2), finite also where the square underflows: 0 times it is 0, not NaN.
inline float falloff_of(double sigma) {
  const double falloff = -1 / (2 * sigma * sigma);
  return falloff < -FLT_MAX ? -FLT_MAX : static_cast<float>(falloff);
}

SCF_HD int64_t sum_of_range(int64_t begin, int64_t end) { return (begin + end - 1) * (end - begin) / 2; }

// Adds the pixels [begin, end) of a mask of `height` rows, counted column by column.
SCF_HD void add_run(MaskSums& sums, int64_t begin, int64_t end, int64_t height) {
  sums.area += end - begin;
  int64_t x = begin / height, y = begin - x * height;
  while (begin < end) {
    const int64_t count = end - begin < height - y ? end - begin : height - y;
    sums.x += x * count;
    sums.y += sum_of_range(y, y + count);
    begin += count;
    ++x;
    y = 0;
  }
}

// r_1 w_1 + r_2 w_2 of the focused region; `in` is 0 or 1, `falloff` that of falloff_of().
SCF_HD float region_weight(float dx1, float dy1, float in1, float dx2, float dy2, float in2, float falloff) {
  const float square1 = dx1 * dx1 + dy1 * dy1;
  const float square2 = dx2 * dx2 + dy2 * dy2;
  const float r1 = in1 * exp_negative(square1 * falloff);
  const float r2 = in2 * exp_negative(square2 * falloff);
#ifdef __CUDA_ARCH__
  const float d1 = sqrtf(square1), d2 = sqrtf(square2);
#else
  const float d1 = __builtin_sqrtf(square1), d2 = __builtin_sqrtf(square2);
#endif
  // Both centres on this pixel: 0/0, each mask counts half. Branch-free, so that loops over it vectorise.
  const float total = d1 + d2;
  const float half = total > 0 ? 0.0f : 0.5f;
#ifdef __CUDA_ARCH__
  // Not fused with the addition, so that the result is symmetric in the masks.
  const float share1 = __fmul_rn(r1, d2 + half), share2 = __fmul_rn(r2, d1 + half);
#else
  const float share1 = r1 * (d2 + half), share2 = r2 * (d1 + half);
#endif
  return (share1 + share2) / (total + 2 * half);
}

// Keys' cubic with a = -0.5.
SCF_HD double bicubic(double x) {
  if (x < 0) x = -x;
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  if (x < 2) return ((-0.5 * x + 2.5) * x - 4) * x + 2;
  return 0;
}

// One axis of a resize from `source` to `resized` pixels; the output begins at `first`.
struct Axis {
  int64_t source;
  int64_t resized;
  int64_t first;

  bool operator==(const Axis&) const = default;
};

struct Tap {
  double centre;
  double stretch;
  int low;
  int count;
};

// The source pixels that output pixel `i` reads.
SCF_HD Tap tap_of(const Axis& axis, int64_t i) {
  const double scale = static_cast<double>(axis.source) / static_cast<double>(axis.resized);
  Tap tap;
  tap.stretch = scale > 1 ? scale : 1;
  tap.centre = (static_cast<double>(axis.first + i) + 0.5) * scale;
  const double low = tap.centre - 2 * tap.stretch + 0.5;
  const double high = tap.centre + 2 * tap.stretch + 0.5;
  tap.low = low < 0 ? 0 : static_cast<int>(low);
  tap.count =
      (high > static_cast<double>(axis.source) ? static_cast<int>(axis.source) : static_cast<int>(high)) - tap.low;
  return tap;
}

SCF_HD double tap_weight(const Tap& tap, int k) {
  return bicubic((k + tap.low - tap.centre + 0.5) * (1 / tap.stretch));
}

SCF_HD int32_t fixed_weight(double weight, double total) {
  const double scaled = weight / total * (1 << kResizeBits);
  return static_cast<int32_t>(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
}

SCF_HD int32_t clip_byte(int32_t fixed) {
  const int32_t value = (fixed + (1 << (kResizeBits - 1))) >> kResizeBits;
  return value < 0 ? 0 : value > 255 ? 255 : value;
}

// The augmentation, on colours in [0, 1].
SCF_HD float clamp_unit(float x) { return x < 0 ? 0 : x > 1 ? 1 : x; }

SCF_HD float grey_of(float red, float green, float blue) { return 0.2989f * red + 0.587f * green + 0.114f * blue; }

SCF_HD float blend(float colour, float other, float factor) {
  return clamp_unit(factor * colour + (1 - factor) * other);
}

SCF_HD float hue_channel(float value, float chroma, float sextant) {
  sextant -= 6 * static_cast<float>(static_cast<int>(sextant * (1.0f / 6)));
  sextant = sextant < 0 ? sextant + 6 : sextant;
  const float other = 4 - sextant;
  return value - chroma * clamp_unit(sextant < other ? sextant : other);
}

// Rotates the hue of HSV by `turns` full turns.
SCF_HD void rotate_hue(float& red, float& green, float& blue, float turns) {
  const float value = red > green ? (red > blue ? red : blue) : (green > blue ? green : blue);
  const float minimum = red < green ? (red < blue ? red : blue) : (green < blue ? green : blue);
  const float chroma = value - minimum;
  const float inverse = chroma > 0 ? 1 / chroma : 0;
  float sextant = value == red     ? (green - blue) * inverse
                  : value == green ? 2 + (blue - red) * inverse
                                   : 4 + (red - green) * inverse;
  sextant += 6 * turns;
  red = hue_channel(value, chroma, sextant + 5);
  green = hue_channel(value, chroma, sextant + 3);
  blue = hue_channel(value, chroma, sextant + 1);
}

}  // namespace scf
