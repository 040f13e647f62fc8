// What the host prepares for a batch of views, without torch: run lengths of the masks, and rows of the plan. The same
// results as scenarioclip_fast/data/views.py and ops/views.py; these do the work where anything is unusual, and word
// the errors.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string_view>
#include <vector>

#include "rle.h"

namespace scf {

static_assert(std::endian::native == std::endian::little, "the first character of a word is its lowest byte");

// Decodes COCO strings to int32 runs, 64 characters at a time, without a branch for each character. Each text is copied
// to a padded buffer, which stays in the cache, so that words may be read past its end.
class MaskDecoder {
 public:
  // The number of runs in a text; nullopt if it is malformed. Lengths of the numbers are left to decode().
  std::optional<int64_t> count(std::string_view text) {
    pad(text);
    if (text.empty() || static_cast<unsigned char>(text.back()) >= kContinued) return std::nullopt;
    uint64_t in_range = kTop;
    int64_t numbers = 0;
    for (size_t at = 0; at < text.size(); at += sizeof(uint64_t)) {
      const uint64_t x = word(at);
      // The sums of a byte below 128 do not carry into the next one.
      in_range &= ~x & (x + (128 - kFirst) * kEach) & ~(x + (128 - kLast - 1) * kEach);
      numbers += static_cast<int64_t>(ends_in(x) * kEach >> 56);
    }
    if (in_range != kTop) return std::nullopt;
    return numbers - static_cast<int64_t>(-text.size() % sizeof(uint64_t));  // without the padding of the last word
  }

  // The runs of a text that count() accepts; false if they do not cover `pixels` pixels or no pixel is set.
  bool decode(std::string_view text, int64_t pixels, int32_t* runs) {
    pad(text);
    const size_t end = text.size();
    size_t at = 0;  // the first character of the next number
    int64_t i = 0, before = 0, last = 0, sum[2] = {0, 0}, invalid = 0;
    size_t longest = 0;
    for (size_t block = 0; block < end; block += 64) {
      uint64_t ends = last_characters(block);
      if (end - block < 64) ends &= (uint64_t{1} << (end - block)) - 1;
      for (; ends != 0; ends &= ends - 1, ++i) {
        const size_t stop = block + std::countr_zero(ends) + 1, length = stop - at;
        longest = std::max(longest, length);
        const int64_t run = number(at, std::min<size_t>(length, kMaxGroups)) + before;
        before = last;
        last = i == 0 ? 0 : run;  // the third run is not a difference
        invalid |= run | (kMaxRun - run);
        sum[i % 2] += run;
        runs[i] = static_cast<int32_t>(run);
        at = stop;
      }
    }
    return longest <= kMaxGroups && invalid >= 0 && sum[0] + sum[1] == pixels && sum[1] > 0;
  }

 private:
  static constexpr unsigned char kFirst = 48, kContinued = kFirst + 32, kLast = kFirst + 63;
  static constexpr size_t kPadding = 64;
  static constexpr uint64_t kEach = 0x0101010101010101, kTop = 128 * kEach;

  void pad(std::string_view text) {
    if (text_.size() < text.size() + kPadding) text_.resize(text.size() + kPadding);
    std::copy(text.begin(), text.end(), text_.begin());
    std::fill_n(text_.begin() + static_cast<ptrdiff_t>(text.size()), kPadding, kFirst);
  }

  uint64_t word(size_t at) const {
    uint64_t word;
    std::memcpy(&word, text_.data() + at, sizeof word);
    return word;
  }

  // The low bit of each byte: whether the character ends a number. Adding 48 sets the top bit of one that does not.
  static uint64_t ends_in(uint64_t word) { return ~(word + (128 - kContinued) * kEach) >> 7 & kEach; }

  // Bit k: character `block` + k ends a number.
  uint64_t last_characters(size_t block) const {
    uint64_t bits = 0;
    for (int k = 0; k < 8; ++k) {
      bits |= (ends_in(word(block + 8 * k)) * 0x0102040810204080) >> 56 << 8 * k;  // gathers the eight bits
    }
    return bits;
  }

  // The number in the `length` characters at `at`, five bits each.
  int64_t number(size_t at, size_t length) const {
    uint64_t x = (word(at) - kFirst * kEach) & 31 * kEach;
    if (length <= 2) {  // nearly all
      x = (x & 0x1f) | (x & 0x1f00) >> 3;
    } else {
      x = (x & 0x001f001f001f001f) | (x & 0x1f001f001f001f00) >> 3;
      x = (x & 0x000003ff000003ff) | (x & 0x03ff000003ff0000) >> 6;
      x = (x & 0xfffff) | x >> 32 << 20;
    }
    const int unused = 64 - 5 * static_cast<int>(length);
    return static_cast<int64_t>(x << unused) >> unused;  // the top bit is the sign
  }

  std::vector<char> text_;
};

// A batch of views: see ViewBatch in scenarioclip_fast/ops/view_batch.py.
struct ViewArrays {
  const int32_t* kind;        // [views]
  const int64_t* image;       // [views]
  const int32_t* source;      // [views, 4]
  const uint8_t* stretch;     // [views] bytes of an array of bool: any but 0 is true
  const double* box;          // [views, 4]
  const int64_t* mask;        // [views, 2]
  const int32_t* mask_runs;   // [runs]
  const int64_t* mask_start;  // [masks + 1]
  const int32_t* mask_size;   // [masks, 2], height and width
  const int64_t* shape;       // [images, 2], height and width
  int64_t views, runs, masks, images;
};

// Turns views into rows of the plan (kernels/views/reference.py).
class ViewLowering {
 public:
  ViewLowering(const ViewArrays& views, int64_t size) : v_(views), size_(size), usable_(views.masks) {}

  // False if a view or a mask is invalid.
  bool lower(int32_t* plan /* [views, 16] */) {
    if (size_ < 1 || size_ >= kMaxResized || !check_masks()) return false;
    for (int64_t v = 0; v < v_.views; ++v) {
      if (!lower_view(v, plan + 16 * v)) return false;
    }
    return true;
  }

 private:
  static constexpr int kMasked = 1, kRelation = 3, kKinds = 4;
  static constexpr int64_t kMaxSource = 1 << 24, kMaxResized = 1 << 30;

  bool check_masks() {
    if (v_.mask_start[0] != 0 || v_.mask_start[v_.masks] != v_.runs) return false;
    for (int64_t m = 0; m < v_.masks; ++m) {
      if (v_.mask_start[m] > v_.mask_start[m + 1]) return false;
    }
    for (int64_t m = 0; m < v_.masks; ++m) {
      int64_t i = v_.mask_start[m], zeros = 0, ones = 0;
      int32_t lowest = 0;
      for (; i + 1 < v_.mask_start[m + 1]; i += 2) {
        zeros += v_.mask_runs[i];
        ones += v_.mask_runs[i + 1];
        lowest = std::min({lowest, v_.mask_runs[i], v_.mask_runs[i + 1]});
      }
      if (i < v_.mask_start[m + 1]) {
        zeros += v_.mask_runs[i];
        lowest = std::min(lowest, v_.mask_runs[i]);
      }
      const int64_t pixels = int64_t{v_.mask_size[2 * m]} * v_.mask_size[2 * m + 1];
      usable_[m] = lowest >= 0 && ones > 0 && zeros + ones == pixels;
    }
    return true;
  }

  bool lower_view(int64_t v, int32_t* row) const {
    const int32_t kind = v_.kind[v];
    const int64_t image = v_.image[v];
    if (kind < 0 || kind >= kKinds || image < 0 || image >= v_.images) return false;
    const int64_t* shape = v_.shape + 2 * image;
    row[0] = kind;
    row[1] = static_cast<int32_t>(image);
    return lower_source(v_.source + 4 * v, v_.stretch[v] != 0, shape, row + 2) &&
           lower_box(kind, v_.box + 4 * v, shape, row + 10) && lower_masks(kind, v_.mask + 2 * v, shape, row + 14);
  }

  // The window, the size to which it is resized, and the corner of the view in that.
  bool lower_source(const int32_t* source, bool stretch, const int64_t* shape, int32_t* row) const {
    int64_t side[2];
    for (int axis = 0; axis < 2; ++axis) {
      const int64_t low = source[axis], high = source[axis + 2], edge = shape[1 - axis];
      const bool in_range = std::max(std::abs(low), std::abs(high)) <= kMaxSource;
      if (!in_range || std::min(high, edge) <= std::max<int64_t>(low, 0)) return false;
      side[axis] = high - low;
    }
    std::copy_n(source, 4, row);
    for (int axis = 0; axis < 2; ++axis) {
      const int64_t resized = stretch ? size_ : side[axis] * size_ / std::min(side[0], side[1]);
      if (resized >= kMaxResized) return false;
      const int64_t spare = resized - size_;
      row[4 + axis] = static_cast<int32_t>(resized);
      row[6 + axis] = static_cast<int32_t>(spare / 2 + (spare % 4 == 3));  // halves round to even
    }
    return true;
  }

  // The box of a masked view, truncated to whole pixels, at least one; zeros for the others.
  static bool lower_box(int32_t kind, const double* box, const int64_t* shape, int32_t* row) {
    std::fill_n(row, 4, 0);
    if (kind != kMasked) return true;
    constexpr double kLimit = 1 << 30;
    for (int k = 0; k < 4; ++k) {
      if (!std::isfinite(box[k])) return false;
    }
    for (int axis = 0; axis < 2; ++axis) {
      const auto low = static_cast<int64_t>(std::floor(std::clamp(box[axis], -kLimit, kLimit)));
      const double high = std::clamp(box[axis + 2], -kLimit, kLimit);
      const int64_t edge = shape[1 - axis];
      if (low >= edge || std::max(static_cast<int64_t>(std::ceil(high)), low + 1) <= 0) return false;
      const int64_t first = std::max<int64_t>(low, 0);
      row[axis] = static_cast<int32_t>(first);
      row[axis + 2] = static_cast<int32_t>(std::clamp<int64_t>(static_cast<int64_t>(high), first + 1, edge));
    }
    return true;
  }

  // The masks of a relation, -1 for the others.
  bool lower_masks(int32_t kind, const int64_t* masks, const int64_t* shape, int32_t* row) const {
    for (int which = 0; which < 2; ++which) {
      row[which] = -1;
      if (kind != kRelation) continue;
      const int64_t m = masks[which];
      if (m < 0 || m >= v_.masks || !usable_[m]) return false;
      if (v_.mask_size[2 * m] != shape[0] || v_.mask_size[2 * m + 1] != shape[1]) return false;
      row[which] = static_cast<int32_t>(m);
    }
    return true;
  }

  const ViewArrays& v_;
  const int64_t size_;
  std::vector<char> usable_;
};

}  // namespace scf
