// The blur of the backend "cuda": a tile is blurred vertically into shared memory, then horizontally, each by one
// thread for several pixels. Compiles for a CPU too, where the tests run it thread by thread.
#pragma once

#include <cstdint>

#include "kernels/views/pixel.h"
#include "kernels/views/views.h"

namespace scf {

constexpr int kBlurThreads = 256;
constexpr int kBlurRows = 8;   // of a tile, all by the same thread
constexpr int kBlurGroup = 8;  // adjacent pixels of a row by the same thread: 16 bytes of a colour between the passes
constexpr int kBlurColumns = 240;  // of a tile: at radius 8, the vertical pass has a column for every thread
constexpr int kUsualRadius = 8;    // at sigma 2; loops over its taps are unrolled

// Passed by value: kernel parameters are in constant memory, from which a warp-uniform read costs nothing.
struct BlurWeights {
  uint32_t value[kMaxBlurRadius + 1];  // centre first
  int radius;
  bool published;
  ColourMix mix;
};

// The part of an image that is blurred, inside the image and not empty.
struct BlurWindow {
  int32_t x1, y1, x2, y2;

  SCF_HD int columns() const { return x2 - x1; }
  SCF_HD int rows() const { return y2 - y1; }
  // Pixels from row to row of the blurred copy: whole groups.
  SCF_HD int stride() const { return (columns() + kBlurGroup - 1) / kBlurGroup * kBlurGroup; }
  SCF_HD int64_t bytes() const { return int64_t{4} * rows() * stride(); }
  SCF_HD int tile_columns() const { return (columns() + kBlurColumns - 1) / kBlurColumns; }
  SCF_HD int tiles() const { return tile_columns() * ((rows() + kBlurRows - 1) / kBlurRows); }
};

struct BlurTile {
  int32_t x, y;     // of its first pixel, in the image
  int32_t columns;  // whole groups, at most kBlurColumns
};

SCF_HD BlurTile blur_tile(const BlurWindow& window, int index) {
  const int row = index / window.tile_columns(), column = index - row * window.tile_columns();
  const int rest = window.stride() - column * kBlurColumns;
  return {window.x1 + column * kBlurColumns, window.y1 + row * kBlurRows, rest < kBlurColumns ? rest : kBlurColumns};
}

// Pixels from row to row in shared memory, which holds the colours apart. In groups it is odd, so that eight threads
// that read a group each, of eight rows, meet different banks.
SCF_HD constexpr int blur_shared_stride(int radius) {
  const int groups = (kBlurColumns + 2 * radius + kBlurGroup - 1) / kBlurGroup;
  return kBlurGroup * (groups | 1);
}

SCF_HD constexpr int64_t blur_shared_bytes(int radius) { return int64_t{6} * kBlurRows * blur_shared_stride(radius); }
static_assert(blur_shared_bytes(kMaxBlurRadius) <= 48 << 10, "a launch gets no more without asking for it");

// Where a row of a colour begins.
SCF_HD int blur_shared_row(int colour, int row, int radius) {
  return (colour * kBlurRows + row) * blur_shared_stride(radius);
}

struct BlurColumn {
  uint32_t red = 0, green = 0, blue = 0;

  SCF_HD void add(uint32_t weight, uint32_t r, uint32_t g, uint32_t b) {
    red += r * weight;
    green += g * weight;
    blue += b * weight;
  }
};

struct BlurRow {
  uint64_t sum = 0;

  SCF_HD void add(uint32_t weight, uint32_t value) { sum += uint64_t{value} * weight; }
};

// Adds source pixel `s` to `count` sums in a row, of which sum i lies at source pixel i + radius.
template <class Sum, int kCount, class... Values>
SCF_HD void add_to_all(Sum (&sums)[kCount], int s, int radius, const BlurWeights& weights, Values... values) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int k = s - radius - i, distance = k < 0 ? -k : k;
    if (distance <= radius) sums[i].add(weights.value[distance], values...);
  }
}

// The column of a tile that begins `radius` columns to its left. kInside: no source row lies beyond the image.
template <int kRadius, bool kInside>
SCF_HD void blur_column(const Image& image, const BlurTile& tile, int column, const BlurWeights& weights,
                        uint16_t* shared) {
  const int radius = kRadius > 0 ? kRadius : weights.radius;
  const int height = static_cast<int>(image.height), first = tile.y - radius;
  const int64_t pitch = 3 * image.width;
  const uint8_t* source = image.pixels + 3 * reflect(tile.x - radius + column, image.width);
  if (kInside) source += first * pitch;
  BlurColumn sums[kBlurRows];
#pragma unroll(kRadius > 0 ? kBlurRows + 2 * kRadius : 1)
  for (int s = 0; s < kBlurRows + 2 * radius; ++s) {
    const uint8_t* pixel = kInside ? source : source + reflect(first + s, height) * pitch;
    add_to_all(sums, s, radius, weights, pixel[0], pixel[1], pixel[2]);
    if (kInside) source += pitch;
  }
#pragma unroll
  for (int r = 0; r < kBlurRows; ++r) {
    const uint32_t colours[3] = {sums[r].red, sums[r].green, sums[r].blue};
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      shared[blur_shared_row(c, r, radius) + column] =
          static_cast<uint16_t>(blurred_once(colours[c], weights.published));
    }
  }
}

// The vertical pass of a tile, of which thread `thread` does every kBlurThreads-th column.
template <int kRadius>
SCF_HD void blur_down(const Image& image, const BlurTile& tile, int thread, const BlurWeights& weights,
                      uint16_t* shared /* [3, kBlurRows, blur_shared_stride(radius)] */) {
  const int radius = kRadius > 0 ? kRadius : weights.radius;
  const bool inside = tile.y >= radius && tile.y + kBlurRows + radius <= image.height;
  for (int column = thread; column < tile.columns + 2 * radius; column += kBlurThreads) {
    if (inside) {
      blur_column<kRadius, true>(image, tile, column, weights, shared);
    } else {
      blur_column<0, false>(image, tile, column, weights, shared);
    }
  }
}

struct alignas(16) BlurQuad {
  uint32_t pixel[4];
};

struct alignas(16) BlurGroup {
  uint16_t value[kBlurGroup];
};

// The horizontal pass of a tile; thread `thread` does one group of pixels of one row.
template <int kRadius>
SCF_HD void blur_along(const BlurWindow& window, const BlurTile& tile, int thread, const BlurWeights& weights,
                       const uint16_t* shared, uint32_t* blurred /* [rows, stride] of the window */) {
  static_assert(kBlurColumns / kBlurGroup * kBlurRows <= kBlurThreads);
  const int radius = kRadius > 0 ? kRadius : weights.radius;
  const int row = thread % kBlurRows, column = thread / kBlurRows * kBlurGroup;
  if (column >= tile.columns || tile.y + row >= window.y2) return;
  uint32_t pixels[kBlurGroup] = {};
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    const uint16_t* source = shared + blur_shared_row(c, row, radius) + column;
    BlurRow sums[kBlurGroup];
#pragma unroll(kRadius > 0 ? (kBlurGroup + 2 * kRadius + kBlurGroup - 1) / kBlurGroup : 1)
    for (int s = 0; s < kBlurGroup + 2 * radius; s += kBlurGroup) {
      const BlurGroup group = *reinterpret_cast<const BlurGroup*>(source + s);
#pragma unroll
      for (int j = 0; j < kBlurGroup; ++j) add_to_all(sums, s + j, radius, weights, group.value[j]);
    }
#pragma unroll
    for (int i = 0; i < kBlurGroup; ++i) pixels[i] |= blurred_twice(sums[i].sum, weights.published) << 8 * c;
  }
  uint32_t* to = blurred + int64_t{tile.y - window.y1 + row} * window.stride() + (tile.x - window.x1) + column;
#pragma unroll
  for (int i = 0; i < kBlurGroup; i += 4) {
    BlurQuad quad;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t pixel = pixels[i + j];
      if (weights.published) {
        const uint32_t red = pixel & 255, green = pixel >> 8 & 255, blue = pixel >> 16;
        pixel = mix_colour(weights.mix.weight[0], red, green, blue) |
                mix_colour(weights.mix.weight[1], red, green, blue) << 8 |
                mix_colour(weights.mix.weight[2], red, green, blue) << 16;
      }
      quad.pixel[j] = pixel;
    }
    *reinterpret_cast<BlurQuad*>(to + i) = quad;
  }
}

}  // namespace scf
