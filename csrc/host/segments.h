// Run lengths of all segments of a panoptic image in one pass; the format is described in
// scenarioclip_fast/data/rle.py.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <unordered_map>
#include <vector>

namespace scf {

struct Segment {
  std::vector<int64_t> runs;                  // in column order, starting with zeros; all zeros if empty
  std::array<int64_t, 4> box = {0, 0, 0, 0};  // x1, y1, x2, y2, the last two exclusive
  int64_t end = 0;                            // one past the last pixel, in column order

  bool empty() const { return end == 0; }

  // Adds the pixels [from, to) of an image with columns of `height`.
  void add(int64_t from, int64_t to, int64_t height) {
    const int64_t x1 = from / height, x2 = (to - 1) / height + 1;
    const bool one_column = x2 == x1 + 1;
    const int64_t y1 = one_column ? from % height : 0, y2 = one_column ? (to - 1) % height + 1 : height;
    box = empty() ? std::array<int64_t, 4>{x1, y1, x2, y2}
                  : std::array<int64_t, 4>{box[0], std::min(box[1], y1), x2, std::max(box[3], y2)};
    runs.push_back(from - end);
    runs.push_back(to - from);
    end = to;
  }
};

// `pixels` [height, width, 3] holds ids as R + 256 G + 65536 B. The segments are in the order of the distinct `ids`.
inline std::vector<Segment> find_segments(const uint8_t* pixels, int64_t height, int64_t width,
                                          const std::vector<int64_t>& ids) {
  std::vector<Segment> segments(ids.size());
  std::unordered_map<int64_t, Segment*> by_id;
  for (size_t k = 0; k < ids.size(); ++k) by_id.emplace(ids[k], &segments[k]);
  int64_t current = -1, from = 0;
  const auto close = [&](int64_t to) {
    if (const auto found = by_id.find(current); found != by_id.end()) found->second->add(from, to, height);
    from = to;
  };
  for (int64_t x = 0; x < width; ++x) {
    const uint8_t* pixel = pixels + 3 * x;
    for (int64_t y = 0; y < height; ++y, pixel += 3 * width) {
      const int64_t id = pixel[0] | pixel[1] << 8 | pixel[2] << 16;
      if (id == current) continue;
      if (current >= 0) close(x * height + y);
      current = id;
    }
  }
  const int64_t size = height * width;
  if (current >= 0) close(size);
  for (Segment& segment : segments) {
    if (segment.end < size) segment.runs.push_back(size - segment.end);
  }
  return segments;
}

}  // namespace scf
