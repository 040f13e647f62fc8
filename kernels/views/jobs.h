// The tables of views, masks and blurs for the CUDA kernels: computed on the host, sent in one copy.
//
// Views are rendered in waves that reuse the same scratch memory. Only the masks, as bits, are drawn for all waves
// together, before the first: a mask takes a small fraction of the memory of its image. Scratch is addressed by byte
// offsets, because it is allocated once all waves are known.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include "kernels/views/blur.h"
#include "kernels/views/pixel.h"
#include "kernels/views/views.h"

namespace scf {

// A wave ends at an image boundary once it exceeds the first limit, so that each image is blurred once, and at any
// view once it exceeds the second. Intermediate data should stay in L2 (50 MB on an H100), yet a wave must fill the
// GPU; the best value has not been measured.
constexpr int64_t kWaveBytes = int64_t{64} << 20;
constexpr int64_t kMaxWaveBytes = int64_t{512} << 20;
constexpr int64_t kWaveViews = 1 << 15;  // the second and third grid dimensions are limited to 65,535

struct MaskJob {
  int64_t first_run;  // in the table of runs
  int64_t runs;
  int64_t height;
  int64_t width;
  int64_t ends;  // scratch: int64 [runs], where each run ends
  int64_t bits;  // scratch: uint32 [height, words_of(width)]
  int64_t sums;  // scratch: MaskSums
};

struct BlurJob {
  Image image;
  BlurWindow window;  // what relation views of the image read
  int64_t blurred;    // scratch: uint32 [rows, stride] of the window, RGBX
};

// The composite of a view before the resize, in the coordinates of the image.
struct Composite {
  const uint8_t* pixels;  // [height, width, 3]
  int64_t width;
  int32_t x1, y1, x2, y2;  // black outside
  bool relation;
  int64_t blurred;  // for a relation: see BlurJob and MaskJob
  BlurWindow window;
  int64_t bits[2];
  int64_t sums[2];
};

struct AxisJob {
  Axis axis;
  int32_t begin, end;  // the source pixels that the taps may read
  int32_t max_taps;
  int64_t taps;     // scratch: int32 [size, 2], first pixel and count
  int64_t weights;  // scratch: int32 [max_taps, size]
};

struct ViewJob {
  Composite composite;
  AxisJob horizontal, vertical;
  int32_t x1, y1;        // where in the image the source window begins
  int64_t view;          // row of the output
  int64_t intermediate;  // scratch: uint32 [vertical.end - vertical.begin, size], resized horizontally, RGBX
  bool augmented;        // whether the fields below are set
  float augment[kAugmentWidth];
  int64_t resized;  // scratch: uint32 [size, size], RGBX
  int64_t grey;     // scratch: float, the mean grey value for the contrast
};

// The jobs of a wave are [begin, end) of each table; its augmented views come first.
struct Wave {
  int64_t view_begin, view_end, augmented_end;
  int64_t blur_begin, blur_end;
};

SCF_HD int64_t words_of(int64_t width) { return (width + 31) / 32; }

// Hands out scratch offsets, aligned to 256 bytes.
class BumpAllocator {
 public:
  int64_t allocate(int64_t bytes) {
    const int64_t offset = used_;
    used_ += (bytes + 255) / 256 * 256;
    return offset;
  }
  int64_t used() const { return used_; }

 private:
  int64_t used_ = 0;
};

struct RenderJobs {
  std::vector<ViewJob> views;
  std::vector<MaskJob> masks;
  std::vector<BlurJob> blurs;
  std::vector<Wave> waves;
  std::span<const int32_t> runs;  // the problem's, from the first to the last mask in use
  int64_t scratch_bytes = 0;

  // The tables lie one after another, each aligned to 256 bytes.
  struct Offsets {
    int64_t views, masks, blurs, runs, end;
  };

  Offsets offsets() const {
    BumpAllocator bump;
    Offsets at{};
    at.views = bump.allocate(bytes_of(views));
    at.masks = bump.allocate(bytes_of(masks));
    at.blurs = bump.allocate(bytes_of(blurs));
    at.runs = bump.allocate(bytes_of(runs));
    at.end = bump.used();
    return at;
  }

  int64_t table_bytes() const { return offsets().end; }

  void write_tables(uint8_t* to /* [table_bytes()] */) const {
    const Offsets at = offsets();
    write(views, to + at.views);
    write(masks, to + at.masks);
    write(blurs, to + at.blurs);
    write(runs, to + at.runs);
  }

 private:
  template <class Table>
  static int64_t bytes_of(const Table& table) {
    return static_cast<int64_t>(std::span(table).size_bytes());
  }

  template <class Table>
  static void write(const Table& table, uint8_t* to) {
    if (!table.empty()) std::memcpy(to, table.data(), std::span(table).size_bytes());
  }
};

class RenderPlanner {
 public:
  explicit RenderPlanner(const RenderProblem& problem)
      : p_(problem),
        mask_job_(problem.mask_count, -1),
        blur_job_(problem.image_count, -1),
        window_(problem.image_count, BlurWindow{INT32_MAX, INT32_MAX, INT32_MIN, INT32_MIN}) {
    jobs_.views.reserve(problem.views);
    jobs_.masks.reserve(problem.mask_count);
    jobs_.blurs.reserve(problem.image_count);
  }

  RenderJobs plan() {
    const std::vector<int64_t> order = by_image();
    for (const int64_t view : order) {
      if (row(view)[kKind] == kRelation) add_relation(row(view));
    }
    masks_end_ = scratch_;
    for (MaskJob& job : jobs_.masks) job.first_run -= run_begin_;
    if (!jobs_.masks.empty()) jobs_.runs = {p_.mask_runs + run_begin_, p_.mask_runs + run_end_};
    int32_t image = -1;
    for (const int64_t view : order) {
      const bool next_image = row(view)[kImage] != image;
      if (scratch_.used() - masks_end_.used() > (next_image ? kWaveBytes : kMaxWaveBytes) || view_count() == kWaveViews)
        close_wave();
      image = row(view)[kImage];
      add_view(view);
    }
    close_wave();
    return std::move(jobs_);
  }

 private:
  const int32_t* row(int64_t view) const { return p_.plan + view * kPlanWidth; }

  template <class T>
  static int64_t end(const std::vector<T>& table) {
    return static_cast<int64_t>(table.size());
  }

  // The views in the order of their images, so that a wave reads few images.
  std::vector<int64_t> by_image() const {
    std::vector<int64_t> begin(p_.image_count + 1);
    for (int64_t view = 0; view < p_.views; ++view) ++begin[row(view)[kImage] + 1];
    std::partial_sum(begin.begin(), begin.end(), begin.begin());
    std::vector<int64_t> order(p_.views);
    for (int64_t view = 0; view < p_.views; ++view) order[begin[row(view)[kImage]]++] = view;
    return order;
  }

  int64_t view_count() const { return end(jobs_.views) - wave_.view_begin; }

  // Adds the masks of a relation, and what it reads to the window of its image.
  void add_relation(const int32_t* plan) {
    const Image& image = p_.images[plan[kImage]];
    mask_job(plan[kMask1], image);
    mask_job(plan[kMask2], image);
    const auto [x1, x2] = reach({plan[kX2] - plan[kX1], plan[kWidth], plan[kLeft]}, plan[kX1], image.width);
    const auto [y1, y2] = reach({plan[kY2] - plan[kY1], plan[kHeight], plan[kTop]}, plan[kY1], image.height);
    BlurWindow& window = window_[plan[kImage]];
    window = {std::min(window.x1, x1), std::min(window.y1, y1), std::max(window.x2, x2), std::max(window.y2, y2)};
  }

  // The pixels of an axis of the image that a view reads, at least one.
  std::pair<int32_t, int32_t> reach(const Axis& axis, int64_t offset, int64_t size) const {
    const Tap first = tap_of(axis, 0), last = tap_of(axis, p_.size - 1);
    const int64_t begin = std::clamp<int64_t>(first.low + offset, 0, size - 1);
    const int64_t end = std::clamp<int64_t>(last.low + last.count + offset, begin + 1, size);
    return {static_cast<int32_t>(begin), static_cast<int32_t>(end)};
  }

  void add_view(int64_t view) {
    const int32_t* plan = row(view);
    const Image& image = p_.images[plan[kImage]];
    ViewJob job{};
    job.view = view;
    job.x1 = plan[kX1];
    job.y1 = plan[kY1];
    job.horizontal = axis_job({plan[kX2] - plan[kX1], plan[kWidth], plan[kLeft]});
    job.vertical = axis_job({plan[kY2] - plan[kY1], plan[kHeight], plan[kTop]});
    job.composite = composite(plan, image);
    job.intermediate = scratch_.allocate((job.vertical.end - job.vertical.begin) * p_.size * 4);
    std::copy_n(p_.augment + view * kAugmentWidth, static_cast<int64_t>(kAugmentWidth), job.augment);
    job.augmented = job.augment[kBrightness] != 1 || job.augment[kContrast] != 1 || job.augment[kSaturation] != 1 ||
                    job.augment[kHue] != 0 || job.augment[kBlurSigma] > 0;
    if (job.augmented) {
      job.resized = scratch_.allocate(p_.size * p_.size * 4);
      job.grey = scratch_.allocate(sizeof(float));
    }
    jobs_.views.push_back(job);
  }

  AxisJob axis_job(const Axis& axis) {
    const Tap first = tap_of(axis, 0), last = tap_of(axis, p_.size - 1);
    AxisJob job{};
    job.axis = axis;
    job.begin = first.low;
    job.end = last.low + last.count;
    job.max_taps = static_cast<int32_t>(std::min<int64_t>(static_cast<int64_t>(4 * first.stretch) + 2, axis.source));
    job.taps = scratch_.allocate(p_.size * 2 * 4);
    job.weights = scratch_.allocate(p_.size * job.max_taps * 4);
    return job;
  }

  Composite composite(const int32_t* plan, const Image& image) {
    Composite c{};
    c.pixels = image.pixels;
    c.width = image.width;
    c.x2 = static_cast<int32_t>(image.width);
    c.y2 = static_cast<int32_t>(image.height);
    if (plan[kKind] == kMasked) {
      c.x1 = std::max(plan[kBoxX1], 0);
      c.y1 = std::max(plan[kBoxY1], 0);
      c.x2 = std::min(plan[kBoxX2], c.x2);
      c.y2 = std::min(plan[kBoxY2], c.y2);
    }
    c.relation = plan[kKind] == kRelation;
    if (!c.relation) return c;
    int64_t& blur = blur_job_[plan[kImage]];
    if (blur < wave_.blur_begin) {
      blur = end(jobs_.blurs);
      const BlurWindow& window = window_[plan[kImage]];
      jobs_.blurs.push_back({image, window, scratch_.allocate(window.bytes())});
    }
    c.blurred = jobs_.blurs[blur].blurred;
    c.window = jobs_.blurs[blur].window;
    for (int which = 0; which < 2; ++which) {
      const MaskJob& mask = mask_job(plan[which == 0 ? kMask1 : kMask2], image);
      c.bits[which] = mask.bits;
      c.sums[which] = mask.sums;
    }
    return c;
  }

  const MaskJob& mask_job(int64_t mask, const Image& image) {
    if (mask_job_[mask] < 0) {
      mask_job_[mask] = end(jobs_.masks);
      MaskJob job{};
      job.first_run = p_.mask_start[mask];
      job.runs = p_.mask_start[mask + 1] - p_.mask_start[mask];
      run_begin_ = std::min(run_begin_, job.first_run);
      run_end_ = std::max(run_end_, job.first_run + job.runs);
      job.height = image.height;
      job.width = image.width;
      job.ends = scratch_.allocate(job.runs * 8);
      job.bits = scratch_.allocate(image.height * words_of(image.width) * 4);
      job.sums = scratch_.allocate(sizeof(MaskSums));
      jobs_.masks.push_back(job);
    }
    return jobs_.masks[mask_job_[mask]];
  }

  void close_wave() {
    wave_.view_end = end(jobs_.views);
    wave_.blur_end = end(jobs_.blurs);
    if (wave_.view_end == wave_.view_begin) return;
    const auto first = jobs_.views.begin() + wave_.view_begin;
    const auto partition =
        std::stable_partition(first, jobs_.views.end(), [](const ViewJob& v) { return v.augmented; });
    wave_.augmented_end = partition - jobs_.views.begin();
    jobs_.waves.push_back(wave_);
    jobs_.scratch_bytes = std::max(jobs_.scratch_bytes, scratch_.used());
    scratch_ = masks_end_;
    wave_.view_begin = wave_.view_end;
    wave_.blur_begin = wave_.blur_end;
  }

  const RenderProblem& p_;
  RenderJobs jobs_;
  Wave wave_{};
  int64_t run_begin_ = INT64_MAX, run_end_ = 0;  // of the masks in use
  BumpAllocator scratch_, masks_end_;            // every wave's scratch begins after the masks
  // The job of each mask, and the latest of each image, which a later wave cannot reuse.
  std::vector<int64_t> mask_job_, blur_job_;
  std::vector<BlurWindow> window_;  // by image
};

}  // namespace scf
