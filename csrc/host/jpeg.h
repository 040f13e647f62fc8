// Reads the size of a JPEG from its frame header, without decoding, and never past the end of the data.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

namespace scf {

struct JpegHeader {
  int height;
  int width;
  int components;
};

// As stored: EXIF orientation is not applied, because boxes and masks refer to the stored pixels.
inline std::optional<JpegHeader> jpeg_header(std::string_view data) {
  const auto byte = [&](size_t i) { return static_cast<int>(static_cast<unsigned char>(data[i])); };
  if (data.size() < 4 || byte(0) != 0xFF || byte(1) != 0xD8) return std::nullopt;
  size_t at = 2;
  while (at + 4 <= data.size() && byte(at) == 0xFF) {
    const int marker = byte(at + 1);
    if (marker == 0xFF) {  // padding
      ++at;
    } else if (marker == 0x01 || (marker >= 0xD0 && marker <= 0xD8)) {  // no length follows
      at += 2;
    } else if (marker == 0xD9 || marker == 0xDA) {  // end of image, start of scan
      return std::nullopt;
    } else if (marker >= 0xC0 && marker <= 0xCF && marker != 0xC4 && marker != 0xC8 && marker != 0xCC) {
      if (at + 10 > data.size()) return std::nullopt;
      const JpegHeader header{byte(at + 5) << 8 | byte(at + 6), byte(at + 7) << 8 | byte(at + 8), byte(at + 9)};
      if (header.height == 0 || header.width == 0) return std::nullopt;
      return header;
    } else {
      at += 2 + (byte(at + 2) << 8 | byte(at + 3));
    }
  }
  return std::nullopt;
}

}  // namespace scf
