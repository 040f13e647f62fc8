// What a plan, its masks and its augmentation must satisfy, so that rendering stays inside images, masks and scratch
// memory. All of it is on the host, for every backend. O(views + runs).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/views/views.h"

namespace scf {

constexpr int64_t kMaxSide = 1 << 24;          // of an image, and of coordinates in it
constexpr int64_t kMaxResized = 1 << 30;       // side of a source window after the resize
constexpr int64_t kMaxSize = 1 << 15;          // side of a view
constexpr int64_t kMaxWindow = 1 << 22;        // side of a source window: 320 MB of weights
constexpr int64_t kMaxIntermediate = 1 << 28;  // pixels resized along one axis: 1 GiB
constexpr float kMaxHue = 1 << 20;             // turns

class RenderChecker {
 public:
  RenderChecker(const RenderProblem& problem, int64_t runs) : p_(problem), runs_(runs) {}

  // The first error, or an empty string.
  std::string error() {
    if (p_.size < 1 || p_.size > kMaxSize) return "out: got views of " + text(p_.size) + " pixels, expected 1 to 2^15";
    for (int c = 0; c < 3; ++c) {
      if (!std::isfinite(p_.mean[c])) return "mean: got " + text(p_.mean[c]) + ", expected a finite number";
      if (!(p_.std[c] > 0) || !std::isfinite(p_.std[c]) || !std::isfinite(1 / p_.std[c])) {
        return "std: got " + text(p_.std[c]) + ", expected a finite number above 0";
      }
    }
    if (std::string found = mask_start_error(); !found.empty()) return found;
    pixels_.assign(p_.mask_count, kUnknown);
    for (int64_t v = 0; v < p_.views; ++v) {
      const std::string found = view_error(p_.plan + v * kPlanWidth, p_.augment + v * kAugmentWidth);
      if (!found.empty()) return "view " + text(v) + ": " + found;
    }
    return "";
  }

 private:
  static constexpr int64_t kUnknown = -2, kInvalid = -1;

  static std::string text(auto number) { return std::to_string(number); }

  std::string mask_start_error() const {
    bool rises = p_.mask_count >= 0 && p_.mask_start[0] == 0 && p_.mask_start[p_.mask_count] == runs_;
    for (int64_t m = 0; rises && m < p_.mask_count; ++m) rises = p_.mask_start[m] <= p_.mask_start[m + 1];
    return rises ? "" : "mask_start: expected numbers that rise from 0 to the " + text(runs_) + " runs";
  }

  std::string view_error(const int32_t* plan, const float* augment) {
    if (plan[kKind] < 0 || plan[kKind] > kRelation) return "got kind " + text(plan[kKind]) + ", expected 0 to 3";
    if (plan[kImage] < 0 || plan[kImage] >= p_.image_count) {
      return "got image " + text(plan[kImage]) + ", expected one of the " + text(p_.image_count) + " given";
    }
    const Image& image = p_.images[plan[kImage]];
    std::string found = axis_error(plan[kX1], plan[kX2], plan[kWidth], plan[kLeft], image.width);
    if (found.empty()) found = axis_error(plan[kY1], plan[kY2], plan[kHeight], plan[kTop], image.height);
    if (found.empty()) found = augment_error(augment);
    for (const int column : {kMask1, kMask2}) {
      if (found.empty() && plan[kKind] == kRelation) found = mask_error(plan[column], image);
    }
    return found;
  }

  std::string axis_error(int64_t low, int64_t high, int64_t resized, int64_t first, int64_t edge) const {
    if (low < -kMaxSide || high > kMaxSide || std::min(high, edge) <= std::max<int64_t>(low, 0)) {
      return "got a source window from " + text(low) + " to " + text(high) + ", expected one that overlaps the " +
             text(edge) + " pixels of its image";
    }
    const int64_t source = high - low;
    if (source > kMaxWindow || source * p_.size > kMaxIntermediate) {
      return "got a source window of " + text(source) + " pixels, expected at most 2^22, and 2^28 in all rows";
    }
    if (resized < 1 || resized >= kMaxResized || first < 0 || first > resized - p_.size) {
      return "got pixels from " + text(first) + " of " + text(resized) + " resized ones, expected " + text(p_.size) +
             " of less than 2^30";
    }
    return "";
  }

  static std::string augment_error(const float* augment) {
    const bool finite = std::all_of(augment, augment + kAugmentWidth, [](float x) { return std::isfinite(x); });
    if (finite && std::abs(augment[kHue]) <= kMaxHue) return "";
    return "augment: got a number that is not finite, or a hue shift above 2^20 turns";
  }

  std::string mask_error(int64_t mask, const Image& image) {
    if (mask < 0 || mask >= p_.mask_count) {
      return "got mask " + text(mask) + ", expected one of the " + text(p_.mask_count) + " given";
    }
    if (pixels_[mask] == kUnknown) pixels_[mask] = pixels_of(mask);
    if (pixels_[mask] == image.height * image.width) return "";
    return "the runs of mask " + text(mask) + " do not cover the " + text(image.height * image.width) +
           " pixels of its image, or none is set";
  }

  // kInvalid: a negative run, or no pixel is set.
  int64_t pixels_of(int64_t mask) const {
    int64_t r = p_.mask_start[mask], zeros = 0, ones = 0;
    const int64_t end = p_.mask_start[mask + 1];
    int32_t lowest = 0;
    for (; r + 1 < end; r += 2) {
      zeros += p_.mask_runs[r];
      ones += p_.mask_runs[r + 1];
      lowest = std::min({lowest, p_.mask_runs[r], p_.mask_runs[r + 1]});
    }
    if (r < end) {
      zeros += p_.mask_runs[r];
      lowest = std::min(lowest, p_.mask_runs[r]);
    }
    return lowest < 0 || ones == 0 ? kInvalid : zeros + ones;
  }

  const RenderProblem& p_;
  const int64_t runs_;
  std::vector<int64_t> pixels_;  // by mask
};

}  // namespace scf
