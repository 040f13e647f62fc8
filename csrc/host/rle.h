// COCO's string form of run lengths; the format is described in scenarioclip_fast/data/rle.py.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>

namespace scf {

constexpr int64_t kMaxRun = int64_t{1} << 28;  // MAX_PIXELS and MAX_GROUPS of rle.py
constexpr int kMaxGroups = 7;

inline std::string rle_compress(const int64_t* runs, int64_t count) {
  std::string text;
  text.reserve(count * 3);
  for (int64_t i = 0; i < count; ++i) {
    if (runs[i] < 0 || runs[i] > kMaxRun) {
      throw std::invalid_argument("got a run of " + std::to_string(runs[i]) + " pixels, expected 0 to 2^28");
    }
    int64_t rest = i > 2 ? runs[i] - runs[i - 2] : runs[i];
    bool more = true;
    while (more) {
      const int64_t group = rest & 31;
      rest >>= 5;
      more = group & 16 ? rest != -1 : rest != 0;
      text.push_back(static_cast<char>(group + (more ? 32 : 0) + 48));
    }
  }
  return text;
}

// Returns the number of runs; checks every character.
inline int64_t rle_count(std::string_view text) {
  int64_t count = 0;
  int groups = 0;
  for (const char character : text) {
    const int code = static_cast<unsigned char>(character) - 48;
    if (code < 0 || code > 63) {
      throw std::invalid_argument("got invalid RLE counts, expected characters from '0' to 'o'");
    }
    if (++groups > kMaxGroups) {
      throw std::invalid_argument("got a number of more than 7 characters in RLE counts, expected at most 7");
    }
    if (code < 32) {
      ++count;
      groups = 0;
    }
  }
  if (groups != 0) throw std::invalid_argument("got truncated RLE counts, expected a complete string");
  return count;
}

// Requires text that rle_count accepts.
inline void rle_decompress(std::string_view text, int64_t* runs) {
  size_t at = 0;
  for (int64_t i = 0; at < text.size(); ++i) {
    int64_t value = 0;
    int shift = 0;
    int code;
    do {
      code = text[at++] - 48;
      value |= static_cast<int64_t>(code & 31) << shift;
      shift += 5;
    } while (code & 32);
    if (code & 16) value -= int64_t{1} << shift;
    runs[i] = i > 2 ? value + runs[i - 2] : value;
    if (runs[i] < 0 || runs[i] > kMaxRun) {
      throw std::invalid_argument("got a negative or huge run in RLE counts, expected 0 to 2^28");
    }
  }
}

}  // namespace scf
