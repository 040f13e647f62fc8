// A wave of views (jobs.h) passes through a few simple kernels: masks from runs, blurred images, resize weights, the
// horizontal pass (which composes source pixels as it reads them), the vertical pass, and the augmentation.
// Intermediate pixels are RGBX, four bytes, and mostly stay in L2.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>

#include "kernels/views/blur.h"
#include "kernels/views/jobs.h"
#include "kernels/views/pixel.h"
#include "kernels/views/views.h"

namespace scf {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kMaxBlocks = 128;    // along a ragged dimension; blocks loop over the rest with a stride
constexpr int kHorizontalRows = 4;      // source rows that share their weights
constexpr int kHorizontalPixels = 512;  // composed at a time
constexpr int kVerticalRows = 8;        // output rows of a block
constexpr int kTile = 16;               // side of a tile of the augmentation
constexpr int kHalo = kTile + 2 * kAugmentBlurRadius;

struct Normalise {
  float scale[3];
  float shift[3];
};

struct Rgb {
  float red, green, blue;
};

template <class T>
__device__ T* at(uint8_t* scratch, int64_t offset) {
  return reinterpret_cast<T*>(scratch + offset);
}

__device__ uint32_t rgbx(uint32_t red, uint32_t green, uint32_t blue) { return red | green << 8 | blue << 16; }
__device__ uint32_t byte_of(uint32_t pixel, int colour) { return pixel >> 8 * colour & 255; }

// The sum over the block, valid in thread 0.
template <class T>
__device__ T block_sum(T value, T* shared /* [kWarps] */) {
  for (int offset = 16; offset > 0; offset >>= 1) value += __shfl_down_sync(~0u, value, offset);
  __syncthreads();  // the previous sum has been read
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kWarps; ++w) value += shared[w];
  }
  return value;
}

__device__ MaskSums block_sums(const MaskSums& sums, int64_t* shared) {
  return {block_sum(sums.area, shared), block_sum(sums.x, shared), block_sum(sums.y, shared)};
}

// Prefix sum: where each run of a mask ends. Visible to the whole block afterwards.
__device__ void scan_runs(const int32_t* runs, int64_t count, int64_t* ends, int64_t* shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t base = 0;  // the end of the last run of the previous round
  for (int64_t first = 0; first < count; first += kThreads) {
    const int64_t run = first + threadIdx.x;
    int64_t sum = run < count ? runs[run] : 0;
    for (int offset = 1; offset < 32; offset <<= 1) {
      const int64_t before = __shfl_up_sync(~0u, sum, offset);
      if (lane >= offset) sum += before;
    }
    if (lane == 31) shared[warp] = sum;
    __syncthreads();
    int64_t all = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) sum += shared[w];
      all += shared[w];
    }
    if (run < count) ends[run] = base + sum;
    base += all;
    __syncthreads();
  }
}

// One block per mask: its bits, row by row, and its sums. Each lane walks down one column, following the runs; each
// ballot gives one word of a row.
__global__ void __launch_bounds__(kThreads) draw_masks(const MaskJob* jobs, const int32_t* all_runs, uint8_t* scratch) {
  __shared__ int64_t shared[kWarps];
  const MaskJob& job = jobs[blockIdx.x];
  const int64_t height = job.height, words = words_of(job.width);
  int64_t* ends = at<int64_t>(scratch, job.ends);
  uint32_t* bits = at<uint32_t>(scratch, job.bits);
  scan_runs(all_runs + job.first_run, job.runs, ends, shared);

  MaskSums sums;
  for (int64_t word = threadIdx.x / 32; word < words; word += kWarps) {
    const int64_t x = word * 32 + threadIdx.x % 32;
    const bool in_bounds = x < job.width;
    int64_t pixel = x * height;
    int64_t run = 0;  // the first run that ends after `pixel`
    for (int64_t stop = job.runs - 1; in_bounds && run < stop;) {
      const int64_t middle = (run + stop) / 2;
      if (ends[middle] > pixel) {
        stop = middle;
      } else {
        run = middle + 1;
      }
    }
    int64_t end = in_bounds ? ends[run] : 0, area = 0, sum_y = 0;
    for (int64_t y = 0; y < height; ++y, ++pixel) {
      while (in_bounds && end <= pixel && run + 1 < job.runs) end = ends[++run];
      const bool inside = in_bounds && run % 2 == 1;
      const uint32_t row = __ballot_sync(~0u, inside);
      if (threadIdx.x % 32 == 0) bits[y * words + word] = row;
      area += inside;
      sum_y += inside ? y : 0;
    }
    sums.area += area;
    sums.x += area * x;
    sums.y += sum_y;
  }
  sums = block_sums(sums, shared);
  if (threadIdx.x == 0) *at<MaskSums>(scratch, job.sums) = sums;
}

// The same from a byte mask; the sums must be zero before the launch.
__global__ void __launch_bounds__(kThreads)
    pack_mask(const uint8_t* mask, int64_t height, int64_t width, uint32_t* bits, MaskSums* total) {
  __shared__ int64_t shared[kWarps];
  const int64_t words = words_of(width);
  MaskSums sums;
  for (int64_t word = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; word < height * words;
       word += int64_t{gridDim.x} * kWarps) {
    const int64_t y = word / words, x = (word - y * words) * 32 + threadIdx.x % 32;
    const bool inside = x < width && mask[y * width + x] != 0;
    const uint32_t row = __ballot_sync(~0u, inside);
    if (threadIdx.x % 32 == 0) bits[word] = row;
    sums.area += inside;
    sums.x += inside ? x : 0;
    sums.y += inside ? y : 0;
  }
  sums = block_sums(sums, shared);
  if (threadIdx.x == 0) {
    // Integers: the order of the additions does not matter.
    atomicAdd(reinterpret_cast<unsigned long long*>(&total->area), static_cast<unsigned long long>(sums.area));
    atomicAdd(reinterpret_cast<unsigned long long*>(&total->x), static_cast<unsigned long long>(sums.x));
    atomicAdd(reinterpret_cast<unsigned long long*>(&total->y), static_cast<unsigned long long>(sums.y));
  }
}

template <int kRadius>
__device__ void blur_tiles(const Image& image, const BlurWindow& window, const BlurWeights& weights,
                           uint32_t* blurred) {
  extern __shared__ uint4 blur_memory[];  // of this type for its alignment
  auto* shared = reinterpret_cast<uint16_t*>(blur_memory);
  const int thread = threadIdx.x, tiles = window.tiles();
  for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
    const BlurTile tile = blur_tile(window, index);
    blur_down<kRadius>(image, tile, thread, weights, shared);
    __syncthreads();
    blur_along<kRadius>(window, tile, thread, weights, shared, blurred);
    __syncthreads();  // before the next tile
  }
}

// At most 64 registers: with fewer than these need, the assembler spills.
template <int kRadius>
__global__ void __launch_bounds__(kBlurThreads, 4)
    blur_images(const BlurJob* jobs, const __grid_constant__ BlurWeights weights, uint8_t* scratch) {
  const BlurJob& job = jobs[blockIdx.y];
  blur_tiles<kRadius>(job.image, job.window, weights, at<uint32_t>(scratch, job.blurred));
}

template <int kRadius>
__global__ void __launch_bounds__(kBlurThreads, 4)
    blur_image(const Image image, const BlurWindow window, const __grid_constant__ BlurWeights weights,
               uint32_t* blurred) {
  blur_tiles<kRadius>(image, window, weights, blurred);
}

// Computes both centres of a relation once per block.
__device__ void load_centres(const Composite& c, uint8_t* scratch, Centre* centres /* shared [2] */) {
  if (c.relation && threadIdx.x < 2) centres[threadIdx.x] = centre_of(*at<MaskSums>(scratch, c.sums[threadIdx.x]));
  __syncthreads();
}

__device__ uint32_t compose(const Composite& c, const Centre* centres, float falloff, uint8_t* scratch, int x, int y) {
  if (x < c.x1 || x >= c.x2 || y < c.y1 || y >= c.y2) return 0;
  const int64_t pixel = y * c.width + x;
  float weight = 1;
  if (c.relation) {
    const int64_t word = y * words_of(c.width) + x / 32;
    const uint32_t in1 = at<uint32_t>(scratch, c.bits[0])[word] >> x % 32 & 1;
    const uint32_t in2 = at<uint32_t>(scratch, c.bits[1])[word] >> x % 32 & 1;
    if ((in1 | in2) == 0) {
      return at<uint32_t>(scratch, c.blurred)[int64_t{y - c.window.y1} * c.window.stride() + (x - c.window.x1)];
    }
    const float column = static_cast<float>(x), row = static_cast<float>(y);
    weight = region_weight(centres[0].x.distance(column), centres[0].y.distance(row), static_cast<float>(in1),
                           centres[1].x.distance(column), centres[1].y.distance(row), static_cast<float>(in2), falloff);
  }
  const uint8_t* rgb = c.pixels + 3 * pixel;
  const auto weighted = [&](int colour) { return static_cast<uint32_t>(static_cast<float>(rgb[colour]) * weight); };
  return rgbx(weighted(0), weighted(1), weighted(2));
}

__global__ void __launch_bounds__(kThreads)
    compose_region(const __grid_constant__ Composite composite, float falloff, uint8_t* scratch, uint8_t* out) {
  __shared__ Centre centres[2];
  load_centres(composite, scratch, centres);
  const int64_t pixels = composite.width * composite.y2;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < pixels; i += int64_t{gridDim.x} * kThreads) {
    const int64_t y = i / composite.width;
    const uint32_t pixel =
        compose(composite, centres, falloff, scratch, static_cast<int>(i - y * composite.width), static_cast<int>(y));
    for (int colour = 0; colour < 3; ++colour) out[3 * i + colour] = static_cast<uint8_t>(byte_of(pixel, colour));
  }
}

// One thread per output pixel of an axis.
__global__ void __launch_bounds__(kThreads) weigh(const ViewJob* jobs, int size, uint8_t* scratch) {
  const ViewJob& view = jobs[blockIdx.z];
  const AxisJob& job = blockIdx.y == 0 ? view.horizontal : view.vertical;
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= size) return;
  Tap tap = tap_of(job.axis, i);
  // The host computed the range of the axis with the same function, but may have rounded differently.
  const int end = min(tap.low + tap.count, job.end);
  tap.low = max(tap.low, job.begin);
  tap.count = min(end - tap.low, job.max_taps);
  double total = 0;
  for (int k = 0; k < tap.count; ++k) total += tap_weight(tap, k);
  int32_t* weights = at<int32_t>(scratch, job.weights) + i;
  for (int k = 0; k < tap.count; ++k) weights[int64_t{k} * size] = fixed_weight(tap_weight(tap, k), total);
  int32_t* taps = at<int32_t>(scratch, job.taps) + 2 * i;
  taps[0] = tap.low;
  taps[1] = tap.count;
}

struct ResizeSums {
  int32_t red = 0, green = 0, blue = 0;

  __device__ void add(uint32_t pixel, int32_t weight) {
    red += static_cast<int32_t>(byte_of(pixel, 0)) * weight;
    green += static_cast<int32_t>(byte_of(pixel, 1)) * weight;
    blue += static_cast<int32_t>(byte_of(pixel, 2)) * weight;
  }
  __device__ uint32_t clipped() const { return rgbx(clip_byte(red), clip_byte(green), clip_byte(blue)); }
};

// One thread per output column, for a few source rows at a time, whose pixels are composed once in shared memory.
// Without a minimum number of blocks the assembler spills rather than use more than 48 registers.
__global__ void __launch_bounds__(kThreads, 4)
    resize_across(const ViewJob* jobs, int size, float falloff, uint8_t* scratch) {
  __shared__ uint32_t pixels[kHorizontalRows][kHorizontalPixels];
  __shared__ Centre centres[2];
  const ViewJob& job = jobs[blockIdx.y];
  const Composite& composite = job.composite;
  load_centres(composite, scratch, centres);
  const int32_t* taps = at<int32_t>(scratch, job.horizontal.taps);
  const int32_t* weights = at<int32_t>(scratch, job.horizontal.weights);
  uint32_t* intermediate = at<uint32_t>(scratch, job.intermediate);

  const int first = blockIdx.z * kThreads, last = min(first + kThreads, size) - 1;
  const int i = min(first + static_cast<int>(threadIdx.x), last);  // the last column may be computed more than once
  const int low = taps[2 * i], high = low + taps[2 * i + 1];
  // Pixels outside the composite are black: they add nothing and are not read.
  const int left = max(taps[2 * first], composite.x1 - job.x1);
  const int right = min(taps[2 * last] + taps[2 * last + 1], composite.x2 - job.x1);
  const int top = composite.y1 - job.y1, bottom = composite.y2 - job.y1;

  for (int row = job.vertical.begin + blockIdx.x * kHorizontalRows; row < job.vertical.end;
       row += gridDim.x * kHorizontalRows) {
    const int rows = min(kHorizontalRows, job.vertical.end - row);
    ResizeSums sums[kHorizontalRows];
    const bool black = row + rows <= top || row >= bottom;
    for (int begin = left; begin < right && !black; begin += kHorizontalPixels) {
      const int end = min(begin + kHorizontalPixels, right);
      __syncthreads();  // the previous pixels have been read
      for (int t = threadIdx.x; t < kHorizontalRows * kHorizontalPixels; t += kThreads) {
        const int r = t / kHorizontalPixels, x = begin + t % kHorizontalPixels;
        if (x < end && r < rows) {
          pixels[r][x - begin] = compose(composite, centres, falloff, scratch, x + job.x1, row + r + job.y1);
        }
      }
      __syncthreads();
      for (int x = max(low, begin); x < min(high, end); ++x) {
        const int32_t weight = weights[int64_t{x - low} * size + i];
#pragma unroll
        for (int r = 0; r < kHorizontalRows; ++r) sums[r].add(pixels[r][x - begin], weight);
      }
    }
#pragma unroll
    for (int r = 0; r < kHorizontalRows; ++r) {
      if (r < rows) intermediate[int64_t{row + r - job.vertical.begin} * size + i] = sums[r].clipped();
    }
  }
}

__device__ void convert(float value, float* out) { *out = value; }
__device__ void convert(float value, __nv_bfloat16* out) { *out = __float2bfloat16_rn(value); }
__device__ void convert(float value, __half* out) { *out = __float2half_rn(value); }

// Normalises colours and stores them.
template <class T>
struct Output {
  T* pixels;
  int64_t size;
  bool channels_last;
  Normalise normalise;

  __device__ void store(int64_t view, int y, int x, const Rgb& colour) const {
    const int64_t plane = size * size, step = channels_last ? 1 : plane;
    const int64_t place = y * size + x;
    T* to = pixels + view * 3 * plane + (channels_last ? 3 * place : place);
    convert(colour.red * normalise.scale[0] + normalise.shift[0], to);
    convert(colour.green * normalise.scale[1] + normalise.shift[1], to + step);
    convert(colour.blue * normalise.scale[2] + normalise.shift[2], to + 2 * step);
  }
};

__device__ Rgb to_unit(uint32_t pixel) {
  constexpr float unit = 1.0f / 255;
  return {static_cast<float>(byte_of(pixel, 0)) * unit, static_cast<float>(byte_of(pixel, 1)) * unit,
          static_cast<float>(byte_of(pixel, 2)) * unit};
}

// One thread per output column, for a few output rows. Augmented views are kept as bytes for the augmentation.
template <class T>
__global__ void __launch_bounds__(kThreads)
    resize_down(const ViewJob* jobs, int size, const Output<T> out, uint8_t* scratch) {
  const ViewJob& job = jobs[blockIdx.y];
  const int x = blockIdx.z * kThreads + threadIdx.x;
  if (x >= size) return;
  const int32_t* taps = at<int32_t>(scratch, job.vertical.taps);
  const int32_t* weights = at<int32_t>(scratch, job.vertical.weights);
  const uint32_t* intermediate = at<uint32_t>(scratch, job.intermediate) + x;
  const int first = blockIdx.x * kVerticalRows;
  for (int y = first; y < min(first + kVerticalRows, size); ++y) {
    const int low = taps[2 * y] - job.vertical.begin, count = taps[2 * y + 1];
    ResizeSums sums;
    for (int k = 0; k < count; ++k) sums.add(intermediate[int64_t{low + k} * size], weights[int64_t{k} * size + y]);
    if (job.augmented) {
      at<uint32_t>(scratch, job.resized)[int64_t{y} * size + x] = sums.clipped();
    } else {
      out.store(job.view, y, x, to_unit(sums.clipped()));
    }
  }
}

__device__ Rgb adjust_brightness(const ViewJob& job, uint32_t pixel) {
  const float factor = job.augment[kBrightness];
  const Rgb c = to_unit(pixel);
  return {clamp_unit(factor * c.red), clamp_unit(factor * c.green), clamp_unit(factor * c.blue)};
}

// One block per augmented view: the mean grey value for the contrast. Double, so that the order of additions does not
// change the rounded result.
__global__ void __launch_bounds__(kThreads) mean_grey(const ViewJob* jobs, int size, uint8_t* scratch) {
  __shared__ double shared[kWarps];
  const ViewJob& job = jobs[blockIdx.x];
  const uint32_t* pixels = at<uint32_t>(scratch, job.resized);
  const int64_t count = int64_t{size} * size;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    const Rgb c = adjust_brightness(job, pixels[i]);
    sum += grey_of(c.red, c.green, c.blue);
  }
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) *at<float>(scratch, job.grey) = static_cast<float>(sum / static_cast<double>(count));
}

__device__ Rgb blend_all(const Rgb& c, float other, float factor) {
  return {blend(c.red, other, factor), blend(c.green, other, factor), blend(c.blue, other, factor)};
}

__device__ Rgb adjust_colours(const ViewJob& job, uint32_t pixel, float mean) {
  Rgb c = adjust_brightness(job, pixel);
  if (job.augment[kContrast] != 1) c = blend_all(c, mean, job.augment[kContrast]);
  if (job.augment[kSaturation] != 1) c = blend_all(c, grey_of(c.red, c.green, c.blue), job.augment[kSaturation]);
  if (job.augment[kHue] != 0) rotate_hue(c.red, c.green, c.blue, job.augment[kHue]);
  return c;
}

__device__ void add_weighted(Rgb& sum, float weight, const Rgb& c) {
  sum.red += weight * c.red;
  sum.green += weight * c.green;
  sum.blue += weight * c.blue;
}

// One block per tile of an augmented view: colours of the tile and its halo, then the horizontal and vertical Gaussian.
template <class T>
__global__ void __launch_bounds__(kTile* kTile)
    augment(const ViewJob* jobs, int size, const Output<T> out, uint8_t* scratch) {
  __shared__ Rgb colours[kHalo][kHalo];
  __shared__ Rgb blurred_rows[kHalo][kTile];
  __shared__ float gaussian[2 * kAugmentBlurRadius + 1];
  const ViewJob& job = jobs[blockIdx.z];
  const uint32_t* pixels = at<uint32_t>(scratch, job.resized);
  const float mean = *at<float>(scratch, job.grey), sigma = job.augment[kBlurSigma];
  const int x0 = blockIdx.x * kTile, y0 = blockIdx.y * kTile;
  const int column = threadIdx.x % kTile, row = threadIdx.x / kTile;
  const bool in_bounds = x0 + column < size && y0 + row < size;

  if (sigma <= 0) {
    if (in_bounds) {
      const uint32_t pixel = pixels[int64_t{y0 + row} * size + x0 + column];
      out.store(job.view, y0 + row, x0 + column, adjust_colours(job, pixel, mean));
    }
    return;  // the whole block
  }
  if (threadIdx.x <= 2 * kAugmentBlurRadius) {
    const float distance = static_cast<float>(static_cast<int>(threadIdx.x) - kAugmentBlurRadius) / sigma;
    gaussian[threadIdx.x] = expf(-0.5f * distance * distance);
  }
  for (int t = threadIdx.x; t < kHalo * kHalo; t += kTile * kTile) {
    const int r = t / kHalo, c = t % kHalo;
    const int64_t y = mirror(y0 + r - kAugmentBlurRadius, size), x = mirror(x0 + c - kAugmentBlurRadius, size);
    colours[r][c] = adjust_colours(job, pixels[y * size + x], mean);
  }
  __syncthreads();
  float total = 0;
  for (int k = 0; k <= 2 * kAugmentBlurRadius; ++k) total += gaussian[k];
  const float share = 1 / total;
  for (int r = row; r < kHalo; r += kTile) {
    Rgb sum{};
    for (int k = 0; k <= 2 * kAugmentBlurRadius; ++k) add_weighted(sum, gaussian[k] * share, colours[r][column + k]);
    blurred_rows[r][column] = sum;
  }
  __syncthreads();
  Rgb sum{};
  for (int k = 0; k <= 2 * kAugmentBlurRadius; ++k)
    add_weighted(sum, gaussian[k] * share, blurred_rows[row + k][column]);
  if (in_bounds) out.store(job.view, y0 + row, x0 + column, sum);
}

unsigned blocks_for(int64_t items, int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

unsigned capped(int64_t blocks) { return static_cast<unsigned>(std::min<int64_t>(blocks, kMaxBlocks)); }

BlurWeights blur_weights(const Region& region) {
  BlurWeights weights{};
  std::copy_n(region.weights, region.radius + 1, weights.value);
  weights.radius = static_cast<int>(region.radius);
  weights.published = region.published;
  weights.mix = colour_mix(region.weights, region.radius);
  return weights;
}

const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class T>
void render_wave(const RenderProblem& p, const RenderJobs& jobs, const Wave& wave, const uint8_t* tables,
                 uint8_t* scratch, cudaStream_t stream) {
  const RenderJobs::Offsets at = jobs.offsets();
  const auto* views = reinterpret_cast<const ViewJob*>(tables + at.views) + wave.view_begin;
  const auto* blurs = reinterpret_cast<const BlurJob*>(tables + at.blurs) + wave.blur_begin;
  const auto view_count = static_cast<unsigned>(wave.view_end - wave.view_begin);
  const auto augmented_count = static_cast<unsigned>(wave.augmented_end - wave.view_begin);
  const auto blur_count = static_cast<unsigned>(wave.blur_end - wave.blur_begin);
  const int size = static_cast<int>(p.size);
  const unsigned columns = blocks_for(size, kThreads), tiles = blocks_for(size, kTile);

  Output<T> out{static_cast<T*>(p.out), p.size, p.channels_last, {}};
  for (int c = 0; c < 3; ++c) {
    out.normalise.scale[c] = 1 / p.std[c];
    out.normalise.shift[c] = -p.mean[c] / p.std[c];
  }
  int64_t max_rows = 0, max_tiles = 0;
  for (int64_t v = wave.view_begin; v < wave.view_end; ++v) {
    max_rows = std::max<int64_t>(max_rows, jobs.views[v].vertical.end - jobs.views[v].vertical.begin);
  }
  for (int64_t b = wave.blur_begin; b < wave.blur_end; ++b) {
    max_tiles = std::max<int64_t>(max_tiles, jobs.blurs[b].window.tiles());
  }

  if (blur_count > 0) {
    const BlurWeights weights = blur_weights(p.region);
    const auto blur = weights.radius == kUsualRadius ? blur_images<kUsualRadius> : blur_images<0>;
    const dim3 grid(capped(max_tiles), blur_count);
    blur<<<grid, kBlurThreads, blur_shared_bytes(weights.radius), stream>>>(blurs, weights, scratch);
  }
  weigh<<<dim3(columns, 2, view_count), kThreads, 0, stream>>>(views, size, scratch);
  const dim3 horizontal(capped(blocks_for(max_rows, kHorizontalRows)), view_count, columns);
  resize_across<<<horizontal, kThreads, 0, stream>>>(views, size, p.region.falloff, scratch);
  const dim3 vertical(blocks_for(size, kVerticalRows), view_count, columns);
  resize_down<T><<<vertical, kThreads, 0, stream>>>(views, size, out, scratch);
  if (augmented_count > 0) {
    mean_grey<<<augmented_count, kThreads, 0, stream>>>(views, size, scratch);
    augment<T><<<dim3(tiles, tiles, augmented_count), kTile * kTile, 0, stream>>>(views, size, out, scratch);
  }
}

template <class T>
const char* render_as(const RenderProblem& p, const RenderJobs& jobs, const uint8_t* tables, uint8_t* scratch,
                      cudaStream_t stream) {
  if (!jobs.masks.empty()) {
    const RenderJobs::Offsets at = jobs.offsets();
    draw_masks<<<static_cast<unsigned>(jobs.masks.size()), kThreads, 0, stream>>>(
        reinterpret_cast<const MaskJob*>(tables + at.masks), reinterpret_cast<const int32_t*>(tables + at.runs),
        scratch);
  }
  for (const Wave& wave : jobs.waves) render_wave<T>(p, jobs, wave, tables, scratch, stream);
  return launch_error();
}

BlurWindow whole(const Image& image) {
  return {0, 0, static_cast<int32_t>(image.width), static_cast<int32_t>(image.height)};
}

struct RegionScratch {
  explicit RegionScratch(const Image& image) {
    BumpAllocator bump;
    for (int64_t& offset : sums) offset = bump.allocate(sizeof(MaskSums));
    zeroed = bump.used();
    for (int64_t& offset : bits) offset = bump.allocate(image.height * words_of(image.width) * 4);
    blurred = bump.allocate(whole(image).bytes());
    bytes = bump.used();
  }

  int64_t sums[2], bits[2], blurred, zeroed, bytes;
};

}  // namespace

int64_t focused_region_scratch(const Image& image) { return RegionScratch(image).bytes; }

const char* focused_region_cuda(const RegionProblem& p, uint8_t* scratch, cudaStream_t stream) {
  const RegionScratch at(p.image);
  const int64_t height = p.image.height, width = p.image.width;
  cudaMemsetAsync(scratch, 0, at.zeroed, stream);
  const uint8_t* masks[2] = {p.subject_mask, p.object_mask};
  for (int which = 0; which < 2; ++which) {
    pack_mask<<<capped(blocks_for(height * words_of(width), kWarps)), kThreads, 0, stream>>>(
        masks[which], height, width, reinterpret_cast<uint32_t*>(scratch + at.bits[which]),
        reinterpret_cast<MaskSums*>(scratch + at.sums[which]));
  }
  const BlurWindow window = whole(p.image);
  const BlurWeights weights = blur_weights(p.region);
  const auto blur = weights.radius == kUsualRadius ? blur_image<kUsualRadius> : blur_image<0>;
  blur<<<capped(window.tiles()), kBlurThreads, blur_shared_bytes(weights.radius), stream>>>(
      p.image, window, weights, reinterpret_cast<uint32_t*>(scratch + at.blurred));
  const Composite composite{
      .pixels = p.image.pixels,
      .width = width,
      .x1 = 0,
      .y1 = 0,
      .x2 = static_cast<int32_t>(width),
      .y2 = static_cast<int32_t>(height),
      .relation = true,
      .blurred = at.blurred,
      .window = window,
      .bits = {at.bits[0], at.bits[1]},
      .sums = {at.sums[0], at.sums[1]},
  };
  const unsigned blocks = 8 * capped(blocks_for(height * width, 8 * kThreads));
  compose_region<<<blocks, kThreads, 0, stream>>>(composite, p.region.falloff, scratch, p.out);
  return launch_error();
}

const char* render_views_cuda(const RenderProblem& problem, const RenderJobs& jobs, const uint8_t* tables,
                              uint8_t* scratch, cudaStream_t stream) {
  switch (problem.type) {
    case PixelType::kFloat:
      return render_as<float>(problem, jobs, tables, scratch, stream);
    case PixelType::kBFloat16:
      return render_as<__nv_bfloat16>(problem, jobs, tables, scratch, stream);
    case PixelType::kHalf:
      return render_as<__half>(problem, jobs, tables, scratch, stream);
  }
  return "unknown pixel type";
}

}  // namespace scf
