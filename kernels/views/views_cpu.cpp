// One thread renders all views of an image: the image and its blurred copy stay in the cache of that core. A view is
// processed row by row: composite of a source row (never of the whole image), horizontal resize, then vertical resize.
// Only the output pixels that depend on a masked object's box are computed; the others are zero. Relations of an image
// share the resized background, on which each computes only the output pixels that depend on its masks.
//
// Intermediate rows are RGBX, four bytes per pixel, so that two pixels fill a vector of eight 32-bit lanes.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "kernels/views/pixel.h"
#include "kernels/views/simd.h"
#include "kernels/views/views.h"

namespace scf {
namespace {

constexpr int64_t kSlack = 64;  // bytes past the end of a row that vector loads and stores may touch
constexpr int64_t kBlock = 32;  // bytes of a row resized at a time
constexpr int64_t kBlockPixels = kBlock / 4;

struct Range {
  int64_t begin = 0;
  int64_t end = 0;

  int64_t size() const { return end - begin; }
  bool empty() const { return end <= begin; }
  bool contains(int64_t i) const { return i >= begin && i < end; }
};

Range intersection(Range a, Range b) { return {std::max(a.begin, b.begin), std::min(a.end, b.end)}; }
Range hull(Range a, Range b) { return {std::min(a.begin, b.begin), std::max(a.end, b.end)}; }
Range shifted(Range range, int64_t by) { return {range.begin + by, range.end + by}; }

struct Area {
  Range rows;
  Range columns;

  bool empty() const { return rows.empty() || columns.empty(); }
};

// An empty one is {}.
Area intersection(Area a, Area b) {
  const Area area{intersection(a.rows, b.rows), intersection(a.columns, b.columns)};
  return area.empty() ? Area{} : area;
}

// RGB -> RGBX. Reads no further than `end`.
void expand(const uint8_t* rgb, int64_t pixels, uint8_t* rgbx, const uint8_t* end) {
  int64_t i = 0;
  for (; i + 4 <= pixels && rgb + 3 * i + 16 <= end; i += 4) spread(rgb + 3 * i, rgbx + 4 * i);
  for (; i < pixels; ++i) std::memcpy(rgbx + 4 * i, rgb + 3 * i, 3);
}

// Sixteen weighted sums of 16-bit numbers, exact: 24-bit weights are split into two halves, whose sums stay apart.
class BlurSums {
 public:
  // A pair of weights, both halves of each.
  class Weights {
   public:
    Weights(uint32_t first, uint32_t second)
        : high_(first >> kLowBits | second >> kLowBits << 16), low_((first & kLow) | (second & kLow) << 16) {}

   private:
    friend BlurSums;
    uint32_t high_, low_;
  };

  // Signed 16-bit numbers may be added so often between calls of carry(), at half of the whole weight or less.
  static constexpr int64_t kMaxAdditions = 16;

  void add(Short16 first, Short16 second, const Weights& weights) {
    const Short16 front = interleave_low(first, second), back = interleave_high(first, second);
    const auto high = reinterpret_cast<Short16>(Unsigned8{} + weights.high_);
    const auto low = reinterpret_cast<Short16>(Unsigned8{} + weights.low_);
    high_[0] += add_products(front, high);
    high_[1] += add_products(back, high);
    low_[0] += add_products(front, low);
    low_[1] += add_products(back, low);
  }

  // Moves what exceeds the low half to the high one.
  void carry() {
    for (int i = 0; i < 2; ++i) {
      high_[i] += low_[i] >> kLowBits;
      low_[i] &= kLow;
    }
  }

  // Stores the sums of bytes, rounded for the second pass, less kMiddle.
  void store_once(bool published, int16_t* to) const {
    Int8 lanes[2];
    for (int i = 0; i < 2; ++i) {
      // Up to 255 * 2^24, which signed lanes do not hold.
      const auto sum = (reinterpret_cast<Unsigned8>(high_[i]) << kLowBits) + reinterpret_cast<Unsigned8>(low_[i]);
      const Unsigned8 rounded =
          published ? sum >> kBlurBits << kBlurPassBits : (sum + kHalf) >> (kBlurBits - kBlurPassBits);
      lanes[i] = reinterpret_cast<Int8>(rounded) - kMiddle;
    }
    store(pack(lanes[0], lanes[1]), to);
  }

  // Stores the sums of what store_once() stored, as bytes. Call carry() first.
  void store_twice(bool published, uint8_t* to) const {
    // In units of the high half. Beyond it there are only digits that rounding ignores.
    constexpr int kBits = kBlurBits + kBlurPassBits - kLowBits;
    const int32_t offset = (kMiddle << (kBlurBits - kLowBits)) + (published ? 0 : 1 << (kBits - 1));
    store_bytes(pack((high_[0] + offset) >> kBits, (high_[1] + offset) >> kBits), to);
  }

  static constexpr int32_t kMiddle = 1 << 15;  // makes 16-bit numbers signed

 private:
  static constexpr int kLowBits = 10;
  static constexpr int32_t kLow = (1 << kLowBits) - 1;
  static constexpr uint32_t kHalf = 1u << (kBlurBits - kBlurPassBits - 1);

  // Of the first and last four of each eight numbers.
  Int8 high_[2] = {}, low_[2] = {};
};

// The blurred image, row by row.
class Blur {
 public:
  Blur(const Image& image, const Region& region)
      : image_(image), region_(region), mix_(colour_mix(region.weights, region.radius)) {
    const int64_t radius = region.radius;
    rows_.resize(2 * radius + 3);
    padded_.resize(3 * (image.width + 2 * radius) + kSlack);
    blurred_.resize(3 * image.width + kSlack);
    const auto weight = [&](int64_t k) { return k > radius ? 0 : k == 0 ? region.weights[0] / 2 : region.weights[k]; };
    for (int64_t k = 0; k <= radius; ++k) along_.emplace_back(weight(k), weight(k));
    for (int64_t k = 0; k <= radius; k += 2) down_.emplace_back(weight(k), weight(k + 1));
  }

  // Pixels `columns` of row y, as RGB bytes; valid until the next call.
  const uint8_t* row(int64_t y, Range columns) {
    const int64_t radius = region_.radius, width = image_.width;
    for (int64_t k = -radius - 1; k <= radius + 1; ++k) {
      rows_[k + radius + 1] = image_.pixels + reflect(y + k, image_.height) * width * 3;
    }
    int16_t* inner = padded_.data() + 3 * radius;  // column 0
    const Range reach{std::max<int64_t>(columns.begin - radius, 0), std::min(columns.end + radius, width)};
    blur_vertically(3 * reach.begin, 3 * reach.end, inner);
    for (int64_t x = columns.begin - radius; x < 0; ++x) std::copy_n(inner + 3 * reflect(x, width), 3, inner + 3 * x);
    for (int64_t x = width; x < columns.end + radius; ++x) std::copy_n(inner + 3 * reflect(x, width), 3, inner + 3 * x);
    blur_horizontally(inner, columns);
    if (region_.published) mix(blurred_.data() + 3 * columns.begin, columns.size());
    return blurred_.data() + 3 * columns.begin;
  }

 private:
  // Blurs the rows around y (17 at sigma 2) into one, bytes [begin, end).
  void blur_vertically(int64_t begin, int64_t end, int16_t* out) const {
    int64_t i = begin;
    for (; i + 32 <= end; i += 32) blur_down<2>(i, out);
    for (; i + 16 <= end; i += 16) blur_down<1>(i, out);
    const uint8_t* const* centre = rows_.data() + region_.radius + 1;
    for (; i < end; ++i) {
      uint32_t sum = centre[0][i] * region_.weights[0];
      for (int64_t k = 1; k <= region_.radius; ++k) sum += (centre[-k][i] + centre[k][i]) * region_.weights[k];
      out[i] = static_cast<int16_t>(static_cast<int32_t>(blurred_once(sum, region_.published)) - BlurSums::kMiddle);
    }
  }

  // Sixteen bytes each. The centre is added twice, at half its weight.
  template <int kBlocks>
  void blur_down(int64_t first, int16_t* out) const {
    const uint8_t* const* centre = rows_.data() + region_.radius + 1;
    BlurSums sums[kBlocks];
    for (int64_t k = 0; k <= region_.radius; k += 2) {
      for (int b = 0; b < kBlocks; ++b) {
        const auto both = [&](int64_t row) {
          return widen_short(centre[-row] + first + 16 * b) + widen_short(centre[row] + first + 16 * b);
        };
        sums[b].add(both(k), both(k + 1), down_[k / 2]);
      }
    }
    for (int b = 0; b < kBlocks; ++b) sums[b].store_once(region_.published, out + first + 16 * b);
  }

  void blur_horizontally(const int16_t* row, Range columns) {
    constexpr int kBlocks = 2;
    for (int64_t i = 3 * columns.begin; i < 3 * columns.end; i += 16 * kBlocks) {
      BlurSums sums[kBlocks];
      for (int64_t begin = 0; begin <= region_.radius; begin += BlurSums::kMaxAdditions) {
        const int64_t end = std::min(begin + BlurSums::kMaxAdditions, region_.radius + 1);
        for (int64_t k = begin; k < end; ++k) {
          for (int b = 0; b < kBlocks; ++b) {
            sums[b].add(load(row + i + 16 * b - 3 * k), load(row + i + 16 * b + 3 * k), along_[k]);
          }
        }
        for (BlurSums& block : sums) block.carry();
      }
      for (int b = 0; b < kBlocks; ++b) sums[b].store_twice(region_.published, blurred_.data() + i + 16 * b);
    }
  }

  void mix(uint8_t* rgb, int64_t pixels) const {
    for (int64_t i = 0; i < pixels; ++i, rgb += 3) {
      const uint32_t red = rgb[0], green = rgb[1], blue = rgb[2];
      for (int c = 0; c < 3; ++c) rgb[c] = mix_colour(mix_.weight[c], red, green, blue);
    }
  }

  Image image_;
  Region region_;
  std::vector<BlurSums::Weights> down_, along_;
  std::vector<const uint8_t*> rows_;  // one more on each side than the blur reads, since rows are added in pairs
  std::vector<int16_t> padded_;       // a row blurred vertically, with mirrored ends
  std::vector<uint8_t> blurred_;      // a row blurred in both directions
  ColourMix mix_;
};

// Composites the weighted pixels of a focused region over a row of the blurred image.
class Focus {
 public:
  Focus(Centre subject, Centre object, float falloff, int64_t width)
      : centres_{subject, object}, falloff_(falloff), weight_(width + 4) {}

  // All arguments cover the pixels `columns` of row y. Bit 0 of `masks` is the subject's, bit 1 the object's.
  void operator()(int64_t y, Range columns, const uint8_t* masks, const uint8_t* image_rgbx, uint8_t* out_rgbx) {
    const auto [first, second] = centres_;
    const float dy1 = first.y.distance(static_cast<float>(y)), dy2 = second.y.distance(static_cast<float>(y));
    Range span{0, columns.size()};
    while (span.begin < span.end && masks[span.begin] == 0) ++span.begin;
    while (span.begin < span.end && masks[span.end - 1] == 0) --span.end;
    float* __restrict weight = weight_.data();
    const float falloff = falloff_;
    for (int32_t i = static_cast<int32_t>(span.begin); i < static_cast<int32_t>(span.end); ++i) {
      const float x = static_cast<float>(static_cast<int32_t>(columns.begin) + i);
      const int32_t in = masks[i];
      weight[i] = region_weight(first.x.distance(x), dy1, static_cast<float>(in & 1), second.x.distance(x), dy2,
                                static_cast<float>(in >> 1), falloff);
    }
    int64_t i = span.begin;
    for (; i + 4 <= span.end; i += 4) {
      uint32_t any;
      std::memcpy(&any, masks + i, sizeof any);
      if (any == 0) continue;
      const Float8 weights = load(weight + i);
      const Int8 inside = widen(masks + i);
      narrow(blend(image_rgbx + 4 * i, out_rgbx + 4 * i, low_pair(weights), low_pair(inside)),
             blend(image_rgbx + 4 * i + 8, out_rgbx + 4 * i + 8, high_pair(weights), high_pair(inside)),
             out_rgbx + 4 * i);
    }
    for (; i < span.end; ++i) {
      if (masks[i] == 0) continue;
      for (int c = 0; c < 3; ++c) {
        out_rgbx[4 * i + c] = static_cast<uint8_t>(static_cast<float>(image_rgbx[4 * i + c]) * weight_[i]);
      }
    }
  }

 private:
  // Two pixels: image times weight inside a mask, unchanged elsewhere.
  static Int8 blend(const uint8_t* image_rgbx, const uint8_t* out_rgbx, Float8 weight, Int8 inside) {
    const Float8 colour = __builtin_convertvector(widen(image_rgbx), Float8) * weight;
    return inside != 0 ? __builtin_convertvector(colour, Int8) : widen(out_rgbx);
  }

  // Repeats the first, or the second, two of four lanes for the bytes of a pixel.
  template <class Lanes>
  static Lanes low_pair(Lanes lanes) {
    return __builtin_shufflevector(lanes, lanes, 0, 0, 0, 0, 1, 1, 1, 1);
  }
  template <class Lanes>
  static Lanes high_pair(Lanes lanes) {
    return __builtin_shufflevector(lanes, lanes, 2, 2, 2, 2, 3, 3, 3, 3);
  }

  Centre centres_[2];
  float falloff_;
  std::vector<float> weight_;
};

// The weights of one axis of a resize, padded with zeros to an even number of taps.
//
// `rgbx_weights` repeats each weight for the four bytes of a pixel.
class Taps {
 public:
  void prepare(const Axis& axis, int64_t size) {
    if (axis == axis_ && size == size_) return;
    axis_ = axis;
    size_ = size;
    // Only here, and once each: compiled into other code, the same floating-point expressions may round differently.
    taps_.resize(size);
    int max_count = 0;
    for (int64_t i = 0; i < size; ++i) {
      taps_[i] = tap_of(axis, i);
      max_count = std::max(max_count, taps_[i].count);
    }
    width_ = (max_count + 1) / 2 * 2;
    weights_.assign(size * width_, 0);
    std::vector<double> exact(max_count);
    for (int64_t i = 0; i < size; ++i) {
      const Tap& tap = taps_[i];
      double total = 0;
      for (int k = 0; k < tap.count; ++k) total += exact[k] = tap_weight(tap, k);
      for (int k = 0; k < tap.count; ++k) weights_[i * width_ + k] = fixed_weight(exact[k], total);
    }
    rgbx_weights_.resize(4 * weights_.size());
    for (size_t k = 0; k < rgbx_weights_.size(); ++k) rgbx_weights_[k] = weights_[k / 4];
  }

  int64_t width() const { return width_; }
  int64_t low(int64_t i) const { return taps_[i].low; }
  const int32_t* weights(int64_t i) const { return weights_.data() + i * width_; }
  const int32_t* rgbx_weights(int64_t i) const { return rgbx_weights_.data() + 4 * i * width_; }

  // The source pixels that the output pixels `outputs`, at least one, read.
  Range reach(Range outputs) const {
    const Tap& last = taps_[outputs.end - 1];
    return {taps_[outputs.begin].low, last.low + last.count};
  }

  // The output pixels that read any of the source pixels.
  Range outputs_of(Range source) const {
    const auto ends_before = [&](const Tap& tap) { return tap.low + tap.count <= source.begin; };
    const auto begins_before = [&](const Tap& tap) { return tap.low < source.end; };
    const auto first = std::partition_point(taps_.begin(), taps_.end(), ends_before);
    return {first - taps_.begin(), std::partition_point(first, taps_.end(), begins_before) - taps_.begin()};
  }

 private:
  Axis axis_{};
  int64_t size_ = 0;
  int64_t width_ = 0;
  std::vector<Tap> taps_;
  std::vector<int32_t> weights_;
  std::vector<int32_t> rgbx_weights_;
};

Int8 round_fixed(Int8 fixed) { return (fixed + (1 << (kResizeBits - 1))) >> kResizeBits; }

// Adds even and odd taps: the pixel of `a`, then the pixel of `b`.
Int8 join(Int8 a, Int8 b) {
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
}

// Resizes two source rows, from pixel `origin` on, to the output pixels `outputs` of each; two at once halve the weight
// loads. Rows are RGBX with slack.
void resize_horizontally(const uint8_t* const rows[2], int64_t origin, const Taps& taps, Range outputs,
                         uint8_t* const out[2]) {
  const int64_t width = taps.width();
  const auto add = [&](int64_t pixel, Int8& first, Int8& second) {
    pixel = std::min(pixel, outputs.end - 1);
    const int64_t offset = 4 * (taps.low(pixel) - origin);
    const int32_t* weights = taps.rgbx_weights(pixel);
    first = second = Int8{};
    for (int64_t k = 0; k < width; k += 2) {
      const Int8 weight = load(weights + 4 * k);
      first += widen(rows[0] + offset + 4 * k) * weight;
      second += widen(rows[1] + offset + 4 * k) * weight;
    }
  };
  for (int64_t i = outputs.begin; i < outputs.end; i += 4) {
    // Eight variables, since GCC would keep an array in memory.
    Int8 a0, a1, a2, a3, b0, b1, b2, b3;
    add(i, a0, b0);
    add(i + 1, a1, b1);
    add(i + 2, a2, b2);
    add(i + 3, a3, b3);
    narrow(round_fixed(join(a0, a1)), round_fixed(join(a2, a3)), out[0] + 4 * i);
    narrow(round_fixed(join(b0, b1)), round_fixed(join(b2, b3)), out[1] + 4 * i);
  }
}

// Computes bytes `bytes`, whole blocks, of output row i from source rows that begin at `origin`, `stride` bytes apart.
void resize_vertically(const uint8_t* rows, int64_t origin, const Taps& taps, int64_t i, int64_t stride, Range bytes,
                       uint8_t* out) {
  const uint8_t* first = rows + (taps.low(i) - origin) * stride;
  const int32_t* weights = taps.weights(i);
  for (int64_t x = bytes.begin; x < bytes.end; x += kBlock) {
    Int8 sums[4] = {};
    for (int64_t k = 0; k < taps.width(); ++k) {
      const uint8_t* pixels = first + k * stride + x;
      for (int64_t j = 0; j < 4; ++j) sums[j] += widen(pixels + 8 * j) * weights[k];
    }
    narrow(round_fixed(sums[0]), round_fixed(sums[1]), out + x);
    narrow(round_fixed(sums[2]), round_fixed(sums[3]), out + x + 16);
  }
}

// Round to nearest even; normalised colours are finite.
uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

uint16_t to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7FFFFFFF;
  if (bits >= 0x47800000) return static_cast<uint16_t>(sign | 0x7C00);  // 65536 and above
  if (bits < 0x38800000) {  // below 2^-14: the addition rounds to a subnormal
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof bits);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, sizeof bits);
    return static_cast<uint16_t>(sign | (bits - 0x3F000000));
  }
  return static_cast<uint16_t>(sign | ((bits - 0x38000000 + 0x0FFF + ((bits >> 13) & 1)) >> 13));
}

void convert(float value, float* out) { *out = value; }

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

void convert(float value, BFloat16* out) { out->bits = to_bfloat16(value); }
void convert(float value, Half* out) { out->bits = to_half(value); }

// Renders views on one thread, whose buffers are reused from view to view.
class Renderer {
 public:
  explicit Renderer(const RenderProblem& problem)
      : p_(problem),
        size_(problem.size),
        stride_(4 * whole_blocks(problem.size)),
        view_{{}, std::vector<uint32_t>(stride_ / 4 * problem.size)},
        background_{view_} {}

  // Renders all views of one image, `count` of them at `views`.
  void render(const Image& image, const int64_t* views, int64_t count) {
    image_ = &image;
    end_of_image_ = image.pixels + image.height * image.width * 3;
    blur(views, count);
    background_plan_ = nullptr;
    for (int64_t i = 0; i < count; ++i) {
      resize(plan(views[i]), i + 1 < count ? plan(views[i + 1]) : nullptr);
      switch (p_.type) {
        case PixelType::kFloat:
          finish<float>(views[i]);
          break;
        case PixelType::kBFloat16:
          finish<BFloat16>(views[i]);
          break;
        case PixelType::kHalf:
          finish<Half>(views[i]);
          break;
      }
    }
  }

 private:
  // A view, and the rows from which it is resized vertically.
  struct Resized {
    std::vector<uint8_t> rows;     // resized horizontally, from the first source row that the view reads
    std::vector<uint32_t> pixels;  // R in the low byte (as any little-endian machine stores RGBX)
  };

  const int32_t* plan(int64_t view) const { return p_.plan + view * kPlanWidth; }
  Area whole_view() const { return {{0, size_}, {0, size_}}; }

  // Prepares both axes of a view; returns the part of the image that it reads.
  Area prepare(const int32_t* plan) {
    horizontal_.prepare({plan[kX2] - plan[kX1], plan[kWidth], plan[kLeft]}, size_);
    vertical_.prepare({plan[kY2] - plan[kY1], plan[kHeight], plan[kTop]}, size_);
    return source_of(plan, whole_view());
  }

  // The part of the image that output pixels of the prepared view read.
  Area source_of(const int32_t* plan, Area outputs) const {
    const Area reach{shifted(vertical_.reach(outputs.rows), plan[kY1]),
                     shifted(horizontal_.reach(outputs.columns), plan[kX1])};
    return intersection(reach, {{0, image_->height}, {0, image_->width}});
  }

  // The output pixels of the prepared view that depend on a part of the image, in whole blocks.
  Area outputs_of(const int32_t* plan, Area source) const {
    const Range rows = vertical_.outputs_of(shifted(source.rows, -plan[kY1]));
    const Range columns = horizontal_.outputs_of(shifted(source.columns, -plan[kX1]));
    return {rows, {columns.begin / kBlockPixels * kBlockPixels, std::min(whole_blocks(columns.end), size_)}};
  }

  static int64_t whole_blocks(int64_t pixels) { return (pixels + kBlockPixels - 1) / kBlockPixels * kBlockPixels; }

  // Blurs, once, the part of the image that its relation views read.
  void blur(const int64_t* views, int64_t count) {
    blurred_area_ = {{image_->height, 0}, {image_->width, 0}};
    for (int64_t i = 0; i < count; ++i) {
      if (plan(views[i])[kKind] != kRelation) continue;
      const Area read = prepare(plan(views[i]));
      if (read.empty()) continue;
      blurred_area_ = {hull(blurred_area_.rows, read.rows), hull(blurred_area_.columns, read.columns)};
    }
    if (blurred_area_.empty()) return;
    const int64_t pixels = blurred_area_.columns.size();
    blurred_.resize(4 * blurred_area_.rows.size() * pixels + kSlack);
    Blur blur(*image_, p_.region);
    for (int64_t y = blurred_area_.rows.begin; y < blurred_area_.rows.end; ++y) {
      const uint8_t* row = blur.row(y, blurred_area_.columns);
      expand(row, pixels, blurred_.data() + 4 * (y - blurred_area_.rows.begin) * pixels, row + 3 * pixels + 16);
    }
  }

  // RGBX pixels of the blurred image.
  const uint8_t* blurred_at(int64_t y, int64_t x) const {
    const auto& [rows, columns] = blurred_area_;
    return blurred_.data() + 4 * ((y - rows.begin) * columns.size() + x - columns.begin);
  }

  // Composes and resizes a view into view_; `next` is the plan of the next view of the image, or null.
  void resize(const int32_t* plan, const int32_t* next) {
    const Area read = prepare(plan);
    if (plan[kKind] == kRelation) {
      resize_relation(plan, next, read);
      return;
    }
    Area source = read, outputs = whole_view();
    if (plan[kKind] == kMasked) {
      source = intersection(read, {{plan[kBoxY1], plan[kBoxY2]}, {plan[kBoxX1], plan[kBoxX2]}});
      if (!source.empty()) outputs = outputs_of(plan, source);
      std::fill(view_.pixels.begin(), view_.pixels.end(), 0);
    }
    resize_part(plan, source, outputs, nullptr, view_, [&](int64_t y, uint8_t* to) {
      expand(image_->pixels + 3 * (y * image_->width + source.columns.begin), source.columns.size(), to, end_of_image_);
    });
  }

  void resize_relation(const int32_t* plan, const int32_t* next, Area read) {
    const Area drawn = intersection(measure_masks(plan), read);
    draw_masks(plan, drawn);
    Focus focus(centres_[0], centres_[1], p_.region.falloff, drawn.columns.size());
    if (background_plan_ == nullptr || !same_geometry(plan, background_plan_)) {
      const bool share = next != nullptr && next[kKind] == kRelation && same_geometry(plan, next);
      background_plan_ = share ? plan : nullptr;
      if (share) {
        resize_part(plan, read, whole_view(), nullptr, background_, [&](int64_t y, uint8_t* to) {
          std::memcpy(to, blurred_at(y, read.columns.begin), 4 * read.columns.size());
        });
      }
    }
    Area source = read, outputs = whole_view();
    const Resized* background = nullptr;
    if (background_plan_ != nullptr) {
      background = &background_;
      view_.pixels = background_.pixels;
      if (drawn.empty()) return;
      outputs = outputs_of(plan, drawn);
      source = {drawn.rows, source_of(plan, outputs).columns};
    }
    resize_part(plan, source, outputs, background, view_, [&](int64_t y, uint8_t* to) {
      std::memcpy(to, blurred_at(y, source.columns.begin), 4 * source.columns.size());
      if (!drawn.rows.contains(y)) return;
      const auto [begin, end] = drawn.columns;
      unblurred_.resize(4 * drawn.columns.size() + kSlack);
      expand(image_->pixels + 3 * (y * image_->width + begin), end - begin, unblurred_.data(), end_of_image_);
      const uint8_t* masks = masks_.data() + (y - drawn.rows.begin) * drawn.columns.size();
      focus(y, drawn.columns, masks, unblurred_.data(), to + 4 * (begin - source.columns.begin));
    });
  }

  // Whether two relation views have the same background.
  static bool same_geometry(const int32_t* a, const int32_t* b) { return std::equal(a + kX1, a + kBoxX1, b + kX1); }

  // Resizes the output pixels `outputs` of the prepared view. compose(y, to) writes the RGBX pixels `source.columns` of
  // row y, which is one of `source.rows`; the other rows are black, or those of `background`.
  template <class Compose>
  void resize_part(const int32_t* plan, Area source, Area outputs, const Resized* background, Resized& to,
                   Compose&& compose) {
    // In pixels of the image:
    const int64_t origin = vertical_.low(0) + plan[kY1];
    const Range read_rows = shifted(vertical_.reach(outputs.rows), plan[kY1]);
    const Range read_columns = shifted(horizontal_.reach(outputs.columns), plan[kX1]);
    const Range bytes{4 * outputs.columns.begin, 4 * whole_blocks(outputs.columns.end)};
    // Room for the pixels that are read with zero weight.
    to.rows.resize((vertical_.reach({0, size_}).size() + vertical_.width()) * stride_ + kSlack);
    const int64_t row_bytes = 4 * (read_columns.size() + horizontal_.width()) + kSlack;
    row_.assign(2 * row_bytes, 0);

    for (int64_t y = read_rows.begin; y < read_rows.end; ++y) {
      if (source.rows.contains(y)) continue;
      const int64_t offset = (y - origin) * stride_ + bytes.begin;
      if (background != nullptr) {
        std::memcpy(to.rows.data() + offset, background->rows.data() + offset, bytes.size());
      } else {
        std::memset(to.rows.data() + offset, 0, bytes.size());
      }
    }
    for (int64_t y = source.rows.begin; y < source.rows.end; y += 2) {
      const uint8_t* composed[2];
      uint8_t* resized[2];
      for (int64_t r = 0; r < 2; ++r) {
        // A single last row is paired with itself.
        const int64_t source_row = std::min(y + r, source.rows.end - 1);
        uint8_t* row = row_.data() + r * row_bytes;
        compose(source_row, row + 4 * (source.columns.begin - read_columns.begin));
        composed[r] = row;
        resized[r] = to.rows.data() + (source_row - origin) * stride_;
      }
      resize_horizontally(composed, read_columns.begin - plan[kX1], horizontal_, outputs.columns, resized);
    }
    uint8_t* out = reinterpret_cast<uint8_t*>(to.pixels.data());
    for (int64_t y = outputs.rows.begin; y < outputs.rows.end; ++y) {
      resize_vertically(to.rows.data(), vertical_.low(0), vertical_, y, stride_, bytes, out + y * stride_);
    }
  }

  // Computes the centres of both masks of a relation, and returns the smallest area that contains both.
  Area measure_masks(const int32_t* plan) {
    Area area{{image_->height, 0}, {image_->width, 0}};
    for (int which = 0; which < 2; ++which) {
      MaskSums sums;
      for_each_run(plan, which, [&](int64_t begin, int64_t end) {
        add_run(sums, begin, end, image_->height);
        const int64_t x = begin / image_->height, last_x = (end - 1) / image_->height;
        area.columns = hull(area.columns, {x, last_x + 1});
        area.rows =
            x == last_x ? hull(area.rows, shifted({begin, end}, -x * image_->height)) : Range{0, image_->height};
      });
      centres_[which] = centre_of(sums);
    }
    return area;
  }

  // Calls body(begin, end) for each run of a mask's pixels, which are counted column by column.
  template <class Body>
  void for_each_run(const int32_t* plan, int which, Body&& body) const {
    const int64_t mask = plan[which == 0 ? kMask1 : kMask2];
    int64_t at = 0;
    for (int64_t r = p_.mask_start[mask]; r < p_.mask_start[mask + 1]; ++r) {
      const int64_t end = at + p_.mask_runs[r];
      if ((r - p_.mask_start[mask]) % 2 == 1 && end > at) body(at, end);
      at = end;
    }
  }

  // Decodes a part of both masks of a relation to two bits per pixel.
  void draw_masks(const int32_t* plan, Area part) {
    masks_.assign(part.rows.size() * part.columns.size() + kSlack, 0);
    for (int which = 0; which < 2; ++which) {
      for_each_run(plan, which,
                   [&](int64_t begin, int64_t end) { fill_run(begin, end, static_cast<uint8_t>(1 << which), part); });
    }
  }

  void fill_run(int64_t begin, int64_t end, uint8_t bit, Area part) {
    const int64_t height = image_->height, stride = part.columns.size();
    int64_t x = begin / height;
    for (int64_t y = begin - x * height; begin < end; ++x, y = 0) {
      const int64_t stop = std::min(height, y + end - begin);
      begin += stop - y;
      if (!part.columns.contains(x)) continue;
      const Range visible = intersection({y, stop}, part.rows);
      uint8_t* pixel = masks_.data() + (visible.begin - part.rows.begin) * stride + (x - part.columns.begin);
      for (int64_t n = visible.size(); n > 0; --n, pixel += stride) *pixel |= bit;
    }
  }

  // Augments, normalises and stores.
  template <class T>
  void finish(int64_t view) {
    const float* augment = p_.augment + view * kAugmentWidth;
    const bool augmented = augment[kBrightness] != 1 || augment[kContrast] != 1 || augment[kSaturation] != 1 ||
                           augment[kHue] != 0 || augment[kBlurSigma] > 0;
    const int64_t pixels = size_ * size_;
    T* const out = static_cast<T*>(p_.out) + view * 3 * pixels;
    if (augmented) {
      colours_.resize(3 * pixels);
      float* planes = colours_.data();
      for_each_row([&](int c, int64_t at, const uint32_t* row) {
        for (int64_t x = 0; x < size_; ++x) planes[c * pixels + at + x] = byte_of(row[x], c) * (1.0f / 255);
      });
      adjust_colours(augment);
      if (augment[kBlurSigma] > 0) augmentation_blur(augment[kBlurSigma]);
    }
    for_each_row([&](int c, int64_t at, const uint32_t* row) {
      const float scale = 1 / p_.std[c], shift = -p_.mean[c] / p_.std[c];
      const int64_t step = p_.channels_last ? 3 : 1;
      T* to = out + (p_.channels_last ? 3 * at + c : c * pixels + at);
      if (augmented) {
        const float* from = colours_.data() + c * pixels + at;
        for (int64_t x = 0; x < size_; ++x) convert(from[x] * scale + shift, to + x * step);
      } else if (step == 1) {
        for (int64_t x = 0; x < size_; ++x) convert(byte_of(row[x], c) * (scale / 255) + shift, to + x);
      } else {
        for (int64_t x = 0; x < size_; ++x) convert(byte_of(row[x], c) * (scale / 255) + shift, to + x * 3);
      }
    });
  }

  // Calls body(colour, index of the row's first pixel, row).
  template <class F>
  void for_each_row(F&& body) const {
    for (int64_t y = 0; y < size_; ++y) {
      for (int c = 0; c < 3; ++c) body(c, y * size_, view_.pixels.data() + y * stride_ / 4);
    }
  }

  static float byte_of(uint32_t rgbx, int c) { return static_cast<float>(static_cast<int32_t>(rgbx >> 8 * c & 255)); }

  void adjust_colours(const float* augment) {
    const int64_t pixels = size_ * size_;
    float *red = colours_.data(), *green = red + pixels, *blue = green + pixels;
    if (const float factor = augment[kBrightness]; factor != 1) {
      for (float& value : colours_) value = clamp_unit(factor * value);
    }
    if (const float factor = augment[kContrast]; factor != 1) {
      double sum = 0;
      for (int64_t i = 0; i < pixels; ++i) sum += grey_of(red[i], green[i], blue[i]);
      const float mean = static_cast<float>(sum / static_cast<double>(pixels));
      for (float& value : colours_) value = blend(value, mean, factor);
    }
    if (const float factor = augment[kSaturation]; factor != 1) {
      for (int64_t i = 0; i < pixels; ++i) {
        const float grey = grey_of(red[i], green[i], blue[i]);
        red[i] = blend(red[i], grey, factor);
        green[i] = blend(green[i], grey, factor);
        blue[i] = blend(blue[i], grey, factor);
      }
    }
    if (const float turns = augment[kHue]; turns != 0) {
      for (int64_t i = 0; i < pixels; ++i) rotate_hue(red[i], green[i], blue[i], turns);
    }
  }

  void augmentation_blur(float sigma) {
    constexpr int64_t radius = kAugmentBlurRadius;
    float gaussian[2 * radius + 1], total = 0;
    for (int64_t k = -radius; k <= radius; ++k) {
      const float distance = static_cast<float>(k) / sigma;
      total += gaussian[k + radius] = std::exp(-0.5f * distance * distance);
    }
    for (float& weight : gaussian) weight /= total;
    blur_buffer_.resize(colours_.size());
    // Horizontally: each row is copied with mirrored ends. Vertically: whole rows are added.
    std::vector<float> line(size_ + 2 * radius);
    for (int64_t y = 0; y < 3 * size_; ++y) {
      const float* from = colours_.data() + y * size_;
      for (int64_t x = -radius; x < size_ + radius; ++x) line[x + radius] = from[mirror(x, size_)];
      float* to = blur_buffer_.data() + y * size_;
      for (int64_t x = 0; x < size_; ++x) {
        float sum = 0;
        for (int64_t k = 0; k <= 2 * radius; ++k) sum += gaussian[k] * line[x + k];
        to[x] = sum;
      }
    }
    for (int64_t y = 0; y < 3 * size_; ++y) {
      const int64_t plane = y / size_;
      float* to = colours_.data() + y * size_;
      std::fill(to, to + size_, 0.0f);
      for (int64_t k = -radius; k <= radius; ++k) {
        const float* from = blur_buffer_.data() + (plane * size_ + mirror(y - plane * size_ + k, size_)) * size_;
        for (int64_t x = 0; x < size_; ++x) to[x] += gaussian[k + radius] * from[x];
      }
    }
  }

  const RenderProblem& p_;
  const int64_t size_;
  const int64_t stride_;  // bytes per row of the view being rendered
  const Image* image_ = nullptr;
  const uint8_t* end_of_image_ = nullptr;
  Taps horizontal_, vertical_;
  Area blurred_area_{};
  std::vector<uint8_t> blurred_;  // RGBX, that area
  Centre centres_[2]{};
  std::vector<uint8_t> masks_;            // bit 0: subject, bit 1: object
  std::vector<uint8_t> row_, unblurred_;  // RGBX: two source rows of the view, and a row of the image
  Resized view_, background_;
  const int32_t* background_plan_ = nullptr;  // of a view whose background is background_; null: none
  std::vector<float> colours_, blur_buffer_;
};

Centre centre_of_mask(const uint8_t* mask, int64_t height, int64_t width) {
  MaskSums sums;
  for (int64_t y = 0; y < height; ++y, mask += width) {
    uint32_t count = 0;
    uint64_t sum_x = 0;
    for (int64_t x = 0; x < width; ++x) {
      count += mask[x] != 0;
      sum_x += mask[x] != 0 ? x : 0;
    }
    sums.area += count;
    sums.x += static_cast<int64_t>(sum_x);
    sums.y += y * count;
  }
  return centre_of(sums);
}

}  // namespace

void focused_region_cpu(const RegionProblem& p, Parallel parallel) {
  const int64_t height = p.image.height, width = p.image.width;
  const Centre subject = centre_of_mask(p.subject_mask, height, width);
  const Centre object = centre_of_mask(p.object_mask, height, width);
  const uint8_t* end_of_image = p.image.pixels + height * width * 3;
  parallel(height, 16, [&](int64_t begin, int64_t end) {
    const Range columns{0, width};
    Blur blur(p.image, p.region);
    Focus focus(subject, object, p.region.falloff, width);
    std::vector<uint8_t> unblurred(4 * width + kSlack), out(4 * width + kSlack), masks(width + kSlack);
    for (int64_t y = begin; y < end; ++y) {
      const uint8_t* row = blur.row(y, columns);
      expand(row, width, out.data(), row + 3 * width + 16);
      expand(p.image.pixels + y * width * 3, width, unblurred.data(), end_of_image);
      for (int64_t x = 0; x < width; ++x) {
        masks[x] =
            static_cast<uint8_t>((p.subject_mask[y * width + x] != 0) | (p.object_mask[y * width + x] != 0) << 1);
      }
      focus(y, columns, masks.data(), unblurred.data(), out.data());
      for (int64_t x = 0; x < width; ++x) std::memcpy(p.out + (y * width + x) * 3, out.data() + 4 * x, 3);
    }
  });
}

void render_views_cpu(const RenderProblem& p, Parallel parallel) {
  if (p.views == 0) return;
  // Views by image, in their original order.
  std::vector<int64_t> starts(p.image_count + 1, 0), order(p.views);
  for (int64_t v = 0; v < p.views; ++v) ++starts[p.plan[v * kPlanWidth + kImage] + 1];
  std::partial_sum(starts.begin(), starts.end(), starts.begin());
  std::vector<int64_t> next(starts.begin(), starts.end() - 1);
  for (int64_t v = 0; v < p.views; ++v) order[next[p.plan[v * kPlanWidth + kImage]]++] = v;

  // Each thread takes the next image, not its share, since images differ in size and in their number of views.
  std::atomic<int64_t> taken = 0;
  parallel(p.image_count, 1, [&](int64_t, int64_t) {
    Renderer renderer(p);
    for (int64_t i = taken++; i < p.image_count; i = taken++) {
      renderer.render(p.images[i], order.data() + starts[i], starts[i + 1] - starts[i]);
    }
  });
}

}  // namespace scf
