// Checks and allocation for kernels/views; compiled for the CPU library and, with USE_CUDA, for the CUDA one.
#include "kernels/views/views.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <string>
#include <vector>

#include "check.h"
#include "kernels/views/check.h"
#include "kernels/views/pixel.h"
#include "parallel.h"

#ifdef USE_CUDA
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/device.h>

#include "kernels/views/jobs.h"
#endif

namespace scf {
namespace {

#ifdef USE_CUDA
using torch::stable::accelerator::DeviceGuard;

uint8_t* bytes_of(Tensor& tensor) { return tensor.mutable_data_ptr<uint8_t>(); }
#endif

Image image_of(const Tensor& image) {
  check_tensor(image, "image", 3, ScalarType::Byte);
  check_size(image, "image", 2, 3);
  STD_TORCH_CHECK(image.size(0) > 0 && image.size(1) > 0, "image: got an empty image, expected at least one pixel");
  STD_TORCH_CHECK(image.size(0) <= kMaxSide && image.size(1) <= kMaxSide, "image: got ", image.size(1), " x ",
                  image.size(0), " pixels, expected sides of at most 2^24");
  return {image.const_data_ptr<uint8_t>(), image.size(0), image.size(1)};
}

std::vector<uint32_t> blur_taps(const std::vector<int64_t>& weights) {
  STD_TORCH_CHECK(!weights.empty() && weights.size() <= kMaxBlurRadius + 1, "weights: got ", weights.size(),
                  ", expected 1 to ", kMaxBlurRadius + 1);
  int64_t sum = -weights[0];
  for (const int64_t weight : weights) {
    STD_TORCH_CHECK(weight >= 0 && weight <= 1 << 24, "weights: got ", weight, ", expected 0 to 2^24");
    sum += 2 * weight;
  }
  STD_TORCH_CHECK(sum == 1 << 24, "weights: got a Gaussian that sums to ", sum, ", expected 2^24");
  return {weights.begin(), weights.end()};
}

Region region_of(double sigma, const std::vector<uint32_t>& weights, bool published) {
  check_positive(sigma, "sigma");
  return {falloff_of(sigma), weights.data(), static_cast<int64_t>(weights.size()) - 1, published};
}

Tensor focused_region(const Tensor& image,         // [H, W, 3]
                      const Tensor& subject_mask,  // [H, W]
                      const Tensor& object_mask,   // [H, W]
                      double sigma, std::vector<int64_t> weights, bool published) {
  const Image source = image_of(image);
  for (const Tensor* mask : {&subject_mask, &object_mask}) {
    check_tensor(*mask, "mask", 2, ScalarType::Bool);
    check_size(*mask, "mask", 0, source.height);
    check_size(*mask, "mask", 1, source.width);
#ifndef USE_CUDA  // there, an empty mask is not looked for: nothing lies inside it
    const auto* bytes = static_cast<const uint8_t*>(mask->const_data_ptr());
    STD_TORCH_CHECK(std::any_of(bytes, bytes + mask->numel(), [](uint8_t byte) { return byte != 0; }),
                    "mask: got an empty mask, expected at least one pixel");
#endif
  }
  const std::vector<uint32_t> taps = blur_taps(weights);
  Tensor out = empty_like_device(image, {source.height, source.width, 3}, ScalarType::Byte);
  const RegionProblem problem{
      .image = source,
      .subject_mask = static_cast<const uint8_t*>(subject_mask.const_data_ptr()),
      .object_mask = static_cast<const uint8_t*>(object_mask.const_data_ptr()),
      .region = region_of(sigma, taps, published),
      .out = out.mutable_data_ptr<uint8_t>(),
  };
#ifdef USE_CUDA
  const DeviceGuard guard(image.get_device_index());
  Tensor scratch = empty_like_device(image, {focused_region_scratch(source)}, ScalarType::Byte);
  const char* error = focused_region_cuda(problem, bytes_of(scratch), current_stream(image));
  STD_TORCH_CHECK(error == nullptr, "focused_region: ", error);
#else
  focused_region_cpu(problem, torch_threads());
#endif
  return out;
}

PixelType pixel_type(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return PixelType::kFloat;
    case ScalarType::BFloat16:
      return PixelType::kBFloat16;
    default:
      STD_TORCH_CHECK(dtype == ScalarType::Half, "dtype: expected float32, bfloat16 or float16");
      return PixelType::kHalf;
  }
}

#ifdef USE_CUDA
void render_on_device(const RenderProblem& problem, const Tensor& like) {
  const DeviceGuard guard(like.get_device_index());
  const RenderJobs jobs = RenderPlanner(problem).plan();
  if (jobs.views.empty()) return;
  // Pinned, so that the copy is asynchronous; torch keeps the memory until the copy is done.
  Tensor host = torch::stable::empty({jobs.table_bytes()}, ScalarType::Byte, std::nullopt,
                                     torch::stable::Device(torch::headeronly::DeviceType::CPU), true);
  jobs.write_tables(bytes_of(host));
  Tensor tables = empty_like_device(like, {jobs.table_bytes()}, ScalarType::Byte);
  torch::stable::copy_(tables, host, true);
  Tensor scratch = empty_like_device(like, {jobs.scratch_bytes}, ScalarType::Byte);
  const char* error = render_views_cuda(problem, jobs, bytes_of(tables), bytes_of(scratch), current_stream(like));
  STD_TORCH_CHECK(error == nullptr, "render_views: ", error);
}
#else
// Requests huge pages, for memory that has not been used yet: page faults of 4 KiB cost as much as rendering.
void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kPage = 4096;
  constexpr int64_t kMinBytes = 4 << 20;
  if (bytes < kMinBytes) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  // Only a hint: failure is harmless.
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}
#endif

// The plan, the augmentation and the masks are on the CPU even if the images are on a GPU, because the host reads them.
void render_views(std::vector<Tensor> images,  // [H_i, W_i, 3]
                  const Tensor& plan,          // [V, 16]
                  const Tensor& augment,       // [V, 5]
                  const Tensor& mask_runs,     // [R]
                  const Tensor& mask_start,    // [M + 1]
                  std::vector<double> mean, std::vector<double> std, double sigma, std::vector<int64_t> weights,
                  bool published, bool channels_last,
                  Tensor out) {  // [V, 3, S, S], or [V, S, S, 3] with channels_last
  std::vector<Image> sources;
  for (const Tensor& image : images) {
    sources.push_back(image_of(image));
    STD_TORCH_CHECK(image.get_device_index() == images[0].get_device_index(), "images: expected all on one device");
  }
  check_tensor(plan, "plan", 2, ScalarType::Int, false);
  check_size(plan, "plan", 1, kPlanWidth);
  check_tensor(augment, "augment", 2, ScalarType::Float, false);
  check_size(augment, "augment", 0, plan.size(0));
  check_size(augment, "augment", 1, kAugmentWidth);
  check_tensor(mask_runs, "mask_runs", 1, ScalarType::Int, false);
  check_tensor(mask_start, "mask_start", 1, ScalarType::Long, false);
  STD_TORCH_CHECK(mask_start.size(0) > 0, "mask_start: got no numbers, expected one more than masks");
  STD_TORCH_CHECK(mean.size() == 3 && std.size() == 3, "mean, std: expected three numbers each");
  const int64_t views = plan.size(0), size = out.dim() == 4 ? out.size(2) : 0;
  STD_TORCH_CHECK(size > 0, "out: expected [V, 3, S, S], or [V, S, S, 3] with channels_last, with S > 0");
  check_tensor(out, "out", 4, out.scalar_type());
  check_size(out, "out", 0, views);
  check_size(out, "out", channels_last ? 3 : 1, 3);
  check_size(out, "out", channels_last ? 1 : 3, size);
  STD_TORCH_CHECK(images.empty() || out.get_device_index() == images[0].get_device_index(),
                  "out: expected on the device of the images");
  const Memory written("out", out);
  for (const Tensor& image : images) check_apart(written, {"images", image});
  check_apart({written}, {{"plan", plan}, {"augment", augment}, {"mask_runs", mask_runs}, {"mask_start", mask_start}});

  const std::vector<uint32_t> taps = blur_taps(weights);
  RenderProblem problem{
      .images = sources.data(),
      .plan = plan.const_data_ptr<int32_t>(),
      .augment = augment.const_data_ptr<float>(),
      .mask_runs = mask_runs.const_data_ptr<int32_t>(),
      .mask_start = mask_start.const_data_ptr<int64_t>(),
      .image_count = static_cast<int64_t>(sources.size()),
      .mask_count = mask_start.size(0) - 1,
      .views = views,
      .size = size,
      .mean = {},
      .std = {},
      .region = region_of(sigma, taps, published),
      .type = pixel_type(out.scalar_type()),
      .channels_last = channels_last,
      .out = out.mutable_data_ptr(),
  };
  for (int c = 0; c < 3; ++c) {
    problem.mean[c] = static_cast<float>(mean[c]);
    problem.std[c] = static_cast<float>(std[c]);
  }
  const std::string error = RenderChecker(problem, mask_runs.size(0)).error();
  STD_TORCH_CHECK(error.empty(), "render_views: ", error);
#ifdef USE_CUDA
  render_on_device(problem, out);
#else
  advise_huge_pages(out.mutable_data_ptr(), out.numel() * out.element_size());
  render_views_cpu(problem, torch_threads());
#endif
}

}  // namespace
}  // namespace scf

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(scenarioclip_fast_C, CUDA, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(scenarioclip_fast_C, CPU, m) {
#endif
  m.impl("focused_region", TORCH_BOX(&scf::focused_region));
  m.impl("render_views", TORCH_BOX(&scf::render_views));
}
