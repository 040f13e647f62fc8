// Launchers of the views: see README.md. Raw pointers and sizes, no torch headers.
#pragma once

#include <cstdint>

#include "kernels/parallel.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#elif defined(USE_CUDA)
#include <driver_types.h>
#endif

namespace scf {

// The columns of a plan's row; the same in reference.py.
enum PlanColumn {
  kKind,
  kImage,
  kX1,
  kY1,
  kX2,
  kY2,
  kWidth,
  kHeight,
  kLeft,
  kTop,
  kBoxX1,
  kBoxY1,
  kBoxX2,
  kBoxY2,
  kMask1,
  kMask2,
  kPlanWidth,
};

enum ViewKind { kGlobal, kMasked, kCrop, kRelation };

enum AugmentColumn { kBrightness, kContrast, kSaturation, kHue, kBlurSigma, kAugmentWidth };

enum class PixelType { kFloat, kBFloat16, kHalf };

constexpr int64_t kMaxBlurRadius = 256;

struct Region {
  float falloff;            // falloff_of(sigma), pixel.h
  const uint32_t* weights;  // [radius + 1], centre first, in units of 2^-24; the whole Gaussian sums to 1
  int64_t radius;           // at most kMaxBlurRadius
  bool published;           // blur the colour axis too, and truncate to bytes after each axis
};

struct Image {
  const uint8_t* pixels;  // [height, width, 3]
  int64_t height;
  int64_t width;
};

// Images, byte masks and `out` are on the device of the op; everything else is in host memory, also for CUDA.
struct RegionProblem {
  Image image;
  // Bytes of bool tensors: any but 0 is true. Read as bool, a byte above 1 would be undefined behaviour.
  const uint8_t* subject_mask;  // [height, width]
  const uint8_t* object_mask;   // [height, width]
  Region region;
  uint8_t* out;  // [height, width, 3]
};

struct RenderProblem {
  const Image* images;        // [image_count]
  const int32_t* plan;        // [views, kPlanWidth]
  const float* augment;       // [views, kAugmentWidth]
  const int32_t* mask_runs;   // column-order run lengths, zeros first
  const int64_t* mask_start;  // [masks + 1] into mask_runs
  int64_t image_count;
  int64_t mask_count;
  int64_t views;
  int64_t size;
  float mean[3];
  float std[3];
  Region region;
  PixelType type;
  bool channels_last;
  void* out;  // [views, 3, size, size], or [views, size, size, 3] with channels_last
};

void focused_region_cpu(const RegionProblem& problem, Parallel parallel);
void render_views_cpu(const RenderProblem& problem, Parallel parallel);

#if defined(__CUDACC__) || defined(USE_CUDA)
struct RenderJobs;  // jobs.h

// Null on success, otherwise CUDA's error message. `scratch` is uninitialised device memory aligned to 256 bytes.
int64_t focused_region_scratch(const Image& image);
const char* focused_region_cuda(const RegionProblem& problem,
                                uint8_t* scratch,  // [focused_region_scratch(problem.image)]
                                cudaStream_t stream);
const char* render_views_cuda(const RenderProblem& problem, const RenderJobs& jobs,
                              const uint8_t* tables,  // [jobs.table_bytes()], on the device
                              uint8_t* scratch,       // [jobs.scratch_bytes]
                              cudaStream_t stream);
#endif

}  // namespace scf
