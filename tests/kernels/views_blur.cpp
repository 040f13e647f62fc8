// The blur of the backend "cuda" of the views, thread by thread on the CPU, against a direct blur of the whole image.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "kernels/views/blur.h"

namespace {

using scf::BlurGroup;
using scf::BlurQuad;
using Bytes = std::vector<uint8_t>;  // [height, width, 3]

constexpr uint32_t kUntouched = 7;
constexpr int kGuard = 4;  // quads after the output

// Exact weighted sums along one axis.
template <class Value>
std::vector<uint64_t> blurred_along(const std::vector<Value>& image, int height, int width,
                                    const scf::BlurWeights& weights, bool vertical) {
  std::vector<uint64_t> out(image.size());
  for (int y = 0; y < height; ++y) {
    for (int x = 0; x < width; ++x) {
      for (int colour = 0; colour < 3; ++colour) {
        uint64_t sum = 0;
        for (int k = -weights.radius; k <= weights.radius; ++k) {
          const auto row = vertical ? scf::reflect(y + k, height) : y;
          const auto column = vertical ? x : scf::reflect(x + k, width);
          sum += uint64_t{image[3 * (row * width + column) + colour]} * weights.value[std::abs(k)];
        }
        out[3 * (y * width + x) + colour] = sum;
      }
    }
  }
  return out;
}

// Rows, then columns: rounded to 1/256 and then to a byte; the published blur truncates to bytes.
Bytes blurred(const Bytes& image, int height, int width, const scf::BlurWeights& weights) {
  std::vector<uint64_t> sums = blurred_along(image, height, width, weights, true);
  for (uint64_t& sum : sums) sum = weights.published ? sum >> 24 << 8 : (sum + (1 << 15)) >> 16;
  sums = blurred_along(sums, height, width, weights, false);
  Bytes out(image.size());
  for (size_t i = 0; i < out.size(); ++i) {
    out[i] = static_cast<uint8_t>((sums[i] + (weights.published ? 0 : uint64_t{1} << 31)) >> 32);
  }
  return out;
}

uint32_t expected_pixel(const uint8_t* rgb, const scf::BlurWeights& weights) {
  uint32_t pixel = 0;
  for (int colour = 0; colour < 3; ++colour) {
    const uint32_t value =
        weights.published ? scf::mix_colour(weights.mix.weight[colour], rgb[0], rgb[1], rgb[2]) : rgb[colour];
    pixel |= value << 8 * colour;
  }
  return pixel;
}

// Returns the number of wrong pixels of a window, and of touched ones behind it. kRadius: as in blur.h.
template <int kRadius>
int wrong_pixels(int height, int width, int radius, const scf::BlurWindow& window, bool published) {
  std::mt19937 random(height * 1000 + width);
  Bytes pixels(3 * height * width);
  for (uint8_t& value : pixels) value = static_cast<uint8_t>(random());
  scf::BlurWeights weights{};
  weights.radius = radius;
  weights.published = published;
  const uint32_t one = 1u << scf::kBlurBits;
  uint32_t side = 0;
  for (int k = 1; k <= radius; ++k) side += weights.value[k] = one / (2 * radius + 1 + k);
  weights.value[0] = one - 2 * side;
  weights.mix = scf::colour_mix(weights.value, radius);
  const Bytes expected = blurred(pixels, height, width, weights);

  const scf::Image image{pixels.data(), height, width};
  std::vector<BlurGroup> shared_memory(scf::blur_shared_bytes(radius) / sizeof(BlurGroup));
  std::vector<BlurQuad> output(window.bytes() / sizeof(BlurQuad) + kGuard,
                               BlurQuad{{kUntouched, kUntouched, kUntouched, kUntouched}});
  auto* shared = reinterpret_cast<uint16_t*>(shared_memory.data());
  auto* out = reinterpret_cast<uint32_t*>(output.data());
  for (int index = 0; index < window.tiles(); ++index) {
    const scf::BlurTile tile = scf::blur_tile(window, index);
    for (int t = 0; t < scf::kBlurThreads; ++t) scf::blur_down<kRadius>(image, tile, t, weights, shared);
    for (int t = 0; t < scf::kBlurThreads; ++t) scf::blur_along<kRadius>(window, tile, t, weights, shared, out);
  }
  int wrong = 0;
  for (int y = window.y1; y < window.y2; ++y) {
    for (int x = window.x1; x < window.x2; ++x) {
      const uint32_t found = out[(y - window.y1) * window.stride() + x - window.x1];
      wrong += found != expected_pixel(&expected[3 * (y * width + x)], weights);
    }
  }
  for (int i = 0; i < 4 * kGuard; ++i) wrong += out[window.bytes() / 4 + i] != kUntouched;
  return wrong;
}

}  // namespace

int main() {
  std::mt19937 random(1);
  const auto below = [&](int bound) { return static_cast<int>(random() % bound); };
  for (int k = 0; k < 60; ++k) {
    const int height = 1 + below(70), width = 1 + below(600);
    const int x1 = below(width), y1 = below(height);
    scf::BlurWindow window{x1, y1, x1 + 1 + below(width - x1), y1 + 1 + below(height - y1)};
    if (k % 3 == 0) window = {0, 0, width, height};
    const int radius = below(30);
    const int usual = wrong_pixels<scf::kUsualRadius>(height, width, scf::kUsualRadius, window, k % 2);
    const int general = wrong_pixels<0>(height, width, radius, window, k % 2);
    if (usual + general > 0) {
      std::printf("%d x %d, window %d %d %d %d: %d wrong at radius %d, %d at radius %d\n", width, height, window.x1,
                  window.y1, window.x2, window.y2, usual, scf::kUsualRadius, general, radius);
      return 1;
    }
  }
  return 0;
}
