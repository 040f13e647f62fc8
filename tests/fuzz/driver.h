// What fuzz targets use of the driver.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace fuzz {

// Reports a wrong result: like a crash, it ends the process.
[[noreturn]] void fail(const char* message);

inline void require(bool condition, const char* message) {
  if (!condition) fail(message);
}

struct Target {
  const char* name;
  void (*run)(const uint8_t* data, size_t size);
  size_t most;  // bytes of an input
  bool only_if_named;
};

extern const std::vector<Target> targets;

// Numbers from the bytes of an input; zeros past its end.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  template <class T>
  T number() {
    T value{};
    const size_t count = std::min(sizeof(T), size_ - at_);
    if (count > 0) std::memcpy(&value, data_ + at_, count);
    at_ += count;
    return value;
  }
  // In [0, bound).
  int64_t below(int64_t bound) { return number<uint16_t>() % bound; }
  int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
  bool one_in(int64_t count) { return number<uint8_t>() % count == count - 1; }
  bool ended() const { return at_ == size_; }
  size_t rest() const { return size_ - at_; }
  const uint8_t* next() const { return data_ + at_; }

 private:
  const uint8_t* data_;
  size_t size_, at_ = 0;
};

}  // namespace fuzz
