// The tables of the backend "cuda" of the views, against what they must hold for random batches.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <utility>
#include <vector>

#include "kernels/views/jobs.h"

namespace {

constexpr int64_t kSize = 224;

#define CHECK(condition)                                         \
  if (!(condition)) {                                            \
    std::printf("line %d: expected " #condition "\n", __LINE__); \
    std::exit(1);                                                \
  }

struct Batch {
  std::vector<scf::Image> images;
  std::vector<int32_t> plan, mask_runs;
  std::vector<float> augment;
  std::vector<int64_t> mask_start = {0};

  scf::RenderProblem problem() const {
    scf::RenderProblem problem{};
    problem.images = images.data();
    problem.plan = plan.data();
    problem.augment = augment.data();
    problem.mask_runs = mask_runs.data();
    problem.mask_start = mask_start.data();
    problem.image_count = static_cast<int64_t>(images.size());
    problem.mask_count = static_cast<int64_t>(mask_start.size()) - 1;
    problem.views = static_cast<int64_t>(plan.size()) / scf::kPlanWidth;
    problem.size = kSize;
    return problem;
  }

  const int32_t* row(int64_t view) const { return &plan[view * scf::kPlanWidth]; }
};

// Views of whole images in any order; the first and the last two masks of an image belong to no view.
Batch random_batch(std::mt19937& random, int image_count, int view_count) {
  const auto below = [&](int bound) { return static_cast<int>(random() % bound); };
  Batch batch;
  for (int i = 0; i < image_count; ++i) {
    batch.images.push_back({nullptr, 64 + below(600), 64 + below(600)});
    for (int m = 0; m < 6; ++m) {
      const int runs = 2 + below(9);
      for (int r = 0; r < runs; ++r) batch.mask_runs.push_back(below(1000));
      batch.mask_start.push_back(batch.mask_start.back() + runs);
    }
  }
  for (int v = 0; v < view_count; ++v) {
    const int i = below(image_count), kind = below(4);
    const auto height = static_cast<int32_t>(batch.images[i].height);
    const auto width = static_cast<int32_t>(batch.images[i].width);
    const bool relation = kind == scf::kRelation;
    const int32_t mask1 = relation ? 6 * i + 1 + below(3) : -1, mask2 = relation ? 6 * i + 1 + below(3) : -1;
    for (const int32_t number : {kind, i, 0, 0, width, height, 224, 224, 0, 0, 0, 0, width, height, mask1, mask2}) {
      batch.plan.push_back(number);
    }
    const bool augmented = below(4) == 0;
    for (const float number : {1.0f, 1.0f, 1.0f, 0.0f, augmented ? 1.0f : 0.0f}) batch.augment.push_back(number);
  }
  return batch;
}

// Ranges of scratch that are in use at the same time.
class Ranges {
 public:
  void add(int64_t begin, int64_t bytes) {
    if (bytes > 0) ranges_.emplace_back(begin, begin + bytes);
  }

  void check(int64_t limit) {
    std::sort(ranges_.begin(), ranges_.end());
    for (size_t k = 0; k < ranges_.size(); ++k) {
      CHECK(ranges_[k].second <= (k + 1 < ranges_.size() ? ranges_[k + 1].first : limit));
    }
  }

 private:
  std::vector<std::pair<int64_t, int64_t>> ranges_;
};

void add_axis(Ranges& ranges, const scf::AxisJob& axis) {
  ranges.add(axis.taps, kSize * 8);
  ranges.add(axis.weights, kSize * axis.max_taps * 4);
}

void check(const Batch& batch) {
  const scf::RenderProblem problem = batch.problem();
  const scf::RenderJobs jobs = scf::RenderPlanner(problem).plan();
  std::vector<uint8_t> tables(jobs.table_bytes());
  jobs.write_tables(tables.data());
  const auto* runs = reinterpret_cast<const int32_t*>(tables.data() + jobs.offsets().runs);

  // Each mask in use once, with its runs, found by where its bits lie.
  std::map<int64_t, const scf::MaskJob*> mask_of_bits;
  Ranges masks;
  for (const scf::MaskJob& mask : jobs.masks) {
    CHECK(mask_of_bits.emplace(mask.bits, &mask).second);
    masks.add(mask.ends, mask.runs * 8);
    masks.add(mask.bits, mask.height * scf::words_of(mask.width) * 4);
    masks.add(mask.sums, sizeof(scf::MaskSums));
  }
  std::vector<int> seen(problem.views);
  std::vector<char> used(problem.mask_count);
  int64_t at = 0, blurs = 0;
  int32_t image = -1;
  for (const scf::Wave& wave : jobs.waves) {
    CHECK(wave.view_begin == at && wave.view_end > at && wave.blur_begin == blurs && wave.blur_end >= blurs);
    Ranges ranges = masks;
    for (int64_t b = wave.blur_begin; b < wave.blur_end; ++b) {
      ranges.add(jobs.blurs[b].blurred, jobs.blurs[b].window.bytes());
    }
    int32_t first = INT32_MAX, last = -1;
    for (; at < wave.view_end; ++at) {
      const scf::ViewJob& job = jobs.views[at];
      const int32_t* row = batch.row(job.view);
      ++seen[job.view];
      CHECK(job.augmented == (at < wave.augmented_end));
      CHECK(job.augmented == (batch.augment[5 * job.view + 4] > 0));
      first = std::min(first, row[scf::kImage]);
      last = std::max(last, row[scf::kImage]);
      add_axis(ranges, job.horizontal);
      add_axis(ranges, job.vertical);
      ranges.add(job.intermediate, (job.vertical.end - job.vertical.begin) * kSize * 4);
      if (job.augmented) {
        ranges.add(job.resized, kSize * kSize * 4);
        ranges.add(job.grey, 4);
      }
      CHECK(job.composite.relation == (row[scf::kKind] == scf::kRelation));
      for (int which = 0; job.composite.relation && which < 2; ++which) {
        const int64_t m = row[scf::kMask1 + which], count = batch.mask_start[m + 1] - batch.mask_start[m];
        const scf::MaskJob& mask = *mask_of_bits.at(job.composite.bits[which]);
        used[m] = true;
        CHECK(mask.runs == count && mask.sums == job.composite.sums[which]);
        CHECK(std::equal(runs + mask.first_run, runs + mask.first_run + count, &batch.mask_runs[batch.mask_start[m]]));
      }
    }
    CHECK(first >= image);  // a wave begins with the image that the last one ended with, or a later one
    image = last;
    blurs = wave.blur_end;
    ranges.check(jobs.scratch_bytes);
  }
  for (const int count : seen) CHECK(count == 1);
  CHECK(std::count(used.begin(), used.end(), true) == static_cast<int64_t>(jobs.masks.size()));
  CHECK(blurs == static_cast<int64_t>(jobs.blurs.size()));
}

}  // namespace

int main() {
  std::mt19937 random(1);
  check(random_batch(random, 1, 0));
  for (int k = 0; k < 30; ++k) {
    const int images = 1 + static_cast<int>(random() % 40);
    check(random_batch(random, images, 1 + static_cast<int>(random() % 300)));
  }
  return 0;
}
