// Checks the entropy-coded data of a JPEG without computing pixels: every Huffman code, the end of each scan and
// restart interval, and the restart markers. Decoders repair damage there, and libjpeg-turbo warns of only a part of
// it: not of a few bytes left over, nor of runs past the end of a block. Never reads past the end of the data.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace scf {

// The codes of one DHT segment. An AC table also resolves, in one step, the symbols that fit in a window of bits.
class HuffmanTable {
 public:
  static constexpr int kWindow = 11;  // bits; 10 and 12 are slower on photos
  // A step: bits to skip in the low five, then coefficients to advance, with one of these flags.
  static constexpr unsigned kEndOfBlock = 128, kNoStep = 64;

  struct Code {
    uint8_t length;  // 0: longer than the window, or invalid
    uint8_t symbol;
  };

  void assign(const uint8_t* counts, const uint8_t* symbols, int n) {
    std::copy_n(counts, 16, counts_.begin());
    std::copy_n(symbols, n, symbols_.begin());
    state_ = kAssigned;
  }

  bool assigned() const { return state_ != kMissing; }

  // Returns whether the table is valid. libjpeg, too, checks a table only once a scan uses it.
  bool build(bool dc) {
    if (state_ == kBuilt) return true;
    codes_.fill({});
    int code = 0, i = 0;
    for (int length = 1; length <= 16; ++length, code <<= 1) {
      first_[length] = i - code;
      for (int c = 0; c < counts_[length - 1]; ++c, ++i, ++code) {
        if (code >= 1 << length || (dc && symbols_[i] > 15)) return false;
        if (length > kWindow) continue;
        const int free = kWindow - length;
        std::fill_n(codes_.begin() + (code << free), 1 << free, Code{static_cast<uint8_t>(length), symbols_[i]});
      }
      end_[length] = code;
    }
    if (!dc) build_steps();
    state_ = kBuilt;
    return true;
  }

  Code code(uint64_t bits) const { return codes_[bits >> (64 - kWindow)]; }
  unsigned step(uint64_t bits) const { return steps_[bits >> (64 - kWindow)]; }

  // A code longer than the window; of length 0 if there is none.
  Code long_code(uint64_t bits) const {
    for (int length = kWindow + 1; length <= 16; ++length) {
      const int code = static_cast<int>(bits >> (64 - length));
      if (code < end_[length]) return {static_cast<uint8_t>(length), symbols_[first_[length] + code]};
    }
    return {};
  }

 private:
  void build_steps() {
    for (unsigned window = 0; window < steps_.size(); ++window) {
      unsigned bits = 0, advance = 0;
      while (bits < kWindow && advance < kEndOfBlock) {
        const Code code = codes_[window << bits & (steps_.size() - 1)];
        const unsigned size = code.symbol & 15;
        if (code.symbol != 0 && code.symbol != 0xF0 && size == 0) break;  // invalid
        const unsigned more = code.symbol == 0 ? kEndOfBlock : (code.symbol >> 4) + 1;
        // Except for its last symbol's, the bits of a step lie in the window, and a block may end with its last one.
        if (code.length == 0 || bits + code.length > kWindow || (more < kEndOfBlock && advance + more > 62)) break;
        bits += code.length + size;
        advance += more;
      }
      steps_[window] = static_cast<uint16_t>(bits | (bits > 0 ? advance : kNoStep) << 5);
    }
  }

  enum { kMissing, kAssigned, kBuilt } state_ = kMissing;
  std::array<uint8_t, 16> counts_{};
  std::array<uint8_t, 256> symbols_{};
  std::array<int, 17> first_{}, end_{};  // by length: symbols_ of a code is at first_ + code; codes are below end_
  std::array<Code, 1 << kWindow> codes_{};
  std::array<uint16_t, 1 << kWindow> steps_{};
};

// Reads bits, most significant first. A block reads at most 64 x 31 bits past the end of its data, plus 64.
class BitReader {
 public:
  static constexpr size_t kSlack = 264;

  void start(const uint8_t* data) { begin_ = next_ = data, bits_ = 0, have_ = 0; }

  // At least 56 bits, of which the next is the most significant.
  uint64_t refill() {
    uint64_t more = 0;
    for (int i = 0; i < 8; ++i) more = more << 8 | next_[i];  // compiles to one load
    bits_ |= more >> have_;
    next_ += (63 - have_) >> 3;
    have_ |= 56;
    return bits_;
  }
  void skip(unsigned n) { bits_ <<= n, have_ -= n; }
  unsigned read(unsigned n) {  // n <= 16
    if (n == 0) return 0;
    const auto value = static_cast<unsigned>(refill() >> (64 - n));
    skip(n);
    return value;
  }
  size_t position() const { return static_cast<size_t>(next_ - begin_) * 8 - have_; }

 private:
  const uint8_t* begin_ = nullptr;
  const uint8_t* next_ = nullptr;
  uint64_t bits_ = 0;
  unsigned have_ = 0;
};

class JpegScans {
 public:
  explicit JpegScans(std::string_view data)
      : data_(reinterpret_cast<const uint8_t*>(data.data())), size_(data.size()) {}

  // Empty if the data is sound, else the damage; nothing if it is not checked: arithmetic coding, lossless, 12 bits, or
  // tables that libjpeg supplies by default.
  std::optional<std::string> damage() {
    try {
      if (!walk()) return std::nullopt;
      return "";
    } catch (const Damage& error) {
      return error.what();
    }
  }

 private:
  struct Damage : std::runtime_error {
    using std::runtime_error::runtime_error;
  };
  struct Component {
    int id, across, down;  // sampling factors
    bool used = false;     // in this scan
    int dc = 0, ac = 0;
    std::array<int8_t, 64> precision;  // the lowest bit received of each coefficient, -1: none
    std::vector<uint64_t> nonzero;     // per block, a bit per coefficient; progressive only
  };
  struct Scan {
    int first, last, high, low;  // coefficients and bits, as in the header
    std::vector<Component*> components;
  };

  void require(bool condition, const char* message) const {
    if (!condition) throw Damage(message);
  }

  // Returns whether the data is of a kind that can be checked.
  bool walk() {
    require(size_ >= 2, "no start marker");
    for (at_ = 2;;) {
      const int marker = next_marker();
      if (marker == 0xD9) break;
      require(marker != 0xD8, "a second start marker before the end marker");
      if (marker == 0x01 || (marker >= 0xD0 && marker <= 0xD7)) continue;
      require(at_ + 2 <= size_, kNoEnd);
      const size_t length = word(at_);
      require(length >= 2 && at_ + length <= size_, kNoEnd);
      const uint8_t* body = data_ + at_ + 2;
      at_ += length;
      if (marker == 0xC4) {
        read_tables(body, length - 2);
      } else if (marker >= 0xC0 && marker <= 0xCF && marker != 0xC8 && marker != 0xCC) {
        if (marker > 0xC2 || length < 8 || body[0] != 8) return false;
        progressive_ = marker == 0xC2;
        read_frame(body, length - 2);
      } else if (marker == 0xDD) {
        require(length == 4, "a restart interval of the wrong length");
        interval_ = body[0] << 8 | body[1];
      } else if (marker == 0xDA) {
        Scan scan = read_scan(body, length - 2);
        if (!find_tables(scan)) return false;
        ++scans_;
        check_scan(scan);
      }
    }
    for (const Component& component : components_) require(component.precision[0] >= 0, "a component without a scan");
    require(scans_ > 0, "no scan");
    return true;
  }

  // As libjpeg, skips spare bytes between segments; after the first scan, they may be what is left of another one.
  int next_marker() {
    for (;;) {
      require(scans_ == 0 || at_ == size_ || data_[at_] == 0xFF, kSpare);
      while (at_ < size_ && data_[at_] != 0xFF) ++at_;
      while (at_ < size_ && data_[at_] == 0xFF) ++at_;
      require(at_ < size_, kNoEnd);
      if (const int marker = data_[at_++]; marker != 0) return marker;
      require(scans_ == 0, kSpare);
    }
  }

  void read_tables(const uint8_t* body, size_t length) {
    has_tables_ = true;
    while (length >= 17) {
      int n = 0;
      for (int i = 1; i <= 16; ++i) n += body[i];
      const int kind = body[0] >> 4, index = body[0] & 15;
      require(kind <= 1 && index <= 3 && n <= 256 && length >= 17 + static_cast<size_t>(n), kBadTable);
      tables_[kind][index].assign(body + 1, body + 17, n);
      body += 17 + n, length -= 17 + static_cast<size_t>(n);
    }
    require(length == 0, kBadTable);
  }

  void read_frame(const uint8_t* body, size_t length) {
    require(components_.empty(), "two frame headers");
    height_ = word(body + 1 - data_), width_ = word(body + 3 - data_);
    const int n = body[5];
    require(n >= 1 && n <= 4 && length >= 6 + 3 * static_cast<size_t>(n), "an invalid frame header");
    for (int i = 0; i < n; ++i) {
      const uint8_t* entry = body + 6 + 3 * i;
      Component component{
          .id = entry[0], .across = entry[1] >> 4, .down = entry[1] & 15, .precision = {}, .nonzero = {}};
      require(component.across >= 1 && component.across <= 4 && component.down >= 1 && component.down <= 4,
              "invalid sampling factors");
      component.precision.fill(-1);
      across_ = std::max(across_, component.across), down_ = std::max(down_, component.down);
      components_.push_back(std::move(component));
    }
  }

  Scan read_scan(const uint8_t* body, size_t length) {
    const size_t n = length == 0 ? 0 : body[0];
    require(n >= 1 && n <= 4 && length >= 4 + 2 * n, "an invalid scan header");
    Scan scan{};
    for (Component& component : components_) component.used = false;
    for (size_t i = 0; i < n; ++i) {
      const uint8_t* entry = body + 1 + 2 * i;
      const auto found = std::find_if(components_.begin(), components_.end(), [&](const Component& component) {
        return component.id == entry[0] && !component.used;
      });
      require(found != components_.end(), "a scan of an unknown component");
      found->used = true;
      found->dc = entry[1] >> 4, found->ac = entry[1] & 15;
      require(found->dc <= 3 && found->ac <= 3, "an invalid scan header");
      scan.components.push_back(&*found);
    }
    const uint8_t* rest = body + 1 + 2 * n;
    scan.first = rest[0], scan.last = rest[1], scan.high = rest[2] >> 4, scan.low = rest[2] & 15;
    if (!progressive_) scan.first = 0, scan.last = 63, scan.high = scan.low = 0;  // libjpeg ignores others
    check_progression(scan);
    return scan;
  }

  void check_progression(const Scan& scan) const {
    if (progressive_) {
      const bool dc = scan.first == 0;
      require(dc ? scan.last == 0 : scan.last >= scan.first && scan.last < 64 && scan.components.size() == 1, kOrder);
      require(scan.low <= 13 && (scan.high == 0 || scan.low == scan.high - 1), kOrder);
    }
    for (Component* component : scan.components) {
      auto& precision = component->precision;
      require(scan.first == 0 || precision[0] >= 0, kOrder);
      for (int k = scan.first; k <= scan.last; ++k) {
        require(!progressive_ || scan.high == std::max<int>(precision[k], 0), kOrder);
        precision[k] = static_cast<int8_t>(scan.low);
      }
    }
  }

  // Returns false if there are none at all: libjpeg-turbo has defaults for Motion JPEG.
  bool find_tables(const Scan& scan) {
    for (const Component* component : scan.components) {
      for (const bool dc : {true, false}) {
        const bool needed = !progressive_ || (dc ? scan.first == 0 && scan.high == 0 : scan.first > 0);
        HuffmanTable& table = dc ? tables_[0][component->dc] : tables_[1][component->ac];
        if (needed && !has_tables_) return false;
        require(!needed || (table.assigned() && table.build(dc)), kBadTable);
      }
    }
    return true;
  }

  void check_scan(const Scan& scan) {
    const auto divide = [](size_t a, size_t b) { return (a + b - 1) / b; };
    const auto h = static_cast<size_t>(across_), v = static_cast<size_t>(down_);
    blocks_.clear();
    size_t units;  // MCUs
    if (scan.components.size() == 1) {
      Component* component = scan.components[0];
      units = divide(width_ * static_cast<size_t>(component->across), 8 * h) *
              divide(height_ * static_cast<size_t>(component->down), 8 * v);
      blocks_.push_back(component);
      if (progressive_ && scan.first > 0) component->nonzero.resize(units);
    } else {
      units = divide(width_, 8 * h) * divide(height_, 8 * v);
      for (Component* component : scan.components) {
        blocks_.insert(blocks_.end(), static_cast<size_t>(component->across * component->down), component);
      }
    }
    const size_t interval = interval_ == 0 ? units : static_cast<size_t>(interval_);
    int restarts = 0;
    for (size_t unit = 0; unit < units;) {
      if (unit > 0) take_restart(restarts++, unit, units);
      read_segment();
      end_of_band_ = 0;
      for (const size_t end = unit + std::min(interval, units - unit); unit < end; ++unit) {
        for (Component* component : blocks_) {
          const char* problem = check_block(scan, *component, unit);
          if (reader_.position() > 8 * segment_size_) problem = "the data ends early";
          if (problem != nullptr) fail(problem, unit, units);
        }
      }
      if (end_of_band_ > 0 || !only_padding()) fail("data is left over", unit, units);
    }
    if (at_restart()) {  // some encoders write one after the last interval, too
      take_restart(restarts, units, units);
      read_segment();
      if (!only_padding()) fail("data is left over", units, units);
    }
  }

  [[noreturn]] void fail(const char* problem, size_t unit, size_t units) const {
    throw Damage("scan " + std::to_string(scans_) + ": " + problem + " at MCU " + std::to_string(unit) + " of " +
                 std::to_string(units));
  }

  bool at_restart() const { return at_ + 1 < size_ && data_[at_ + 1] >= 0xD0 && data_[at_ + 1] <= 0xD7; }

  void take_restart(int number, size_t unit, size_t units) {
    if (interval_ == 0 || !at_restart() || data_[at_ + 1] != 0xD0 + (number & 7)) {
      fail("a missing, misplaced or unexpected restart marker", unit, units);
    }
    at_ += 2;
  }

  // Copies entropy-coded data up to the next marker, without the zeros stuffed after 0xFF.
  void read_segment() {
    if (segment_.empty()) segment_.resize(size_ + BitReader::kSlack);
    segment_size_ = 0;
    while (at_ < size_) {
      const void* found = std::memchr(data_ + at_, 0xFF, size_ - at_);
      const size_t end = found == nullptr ? size_ : static_cast<size_t>(static_cast<const uint8_t*>(found) - data_);
      std::memcpy(segment_.data() + segment_size_, data_ + at_, end - at_);
      segment_size_ += end - at_;
      at_ = end;
      while (at_ + 1 < size_ && data_[at_ + 1] == 0xFF) ++at_;
      if (at_ + 1 >= size_ || data_[at_ + 1] != 0) break;
      segment_[segment_size_++] = 0xFF;
      at_ += 2;
    }
    reader_.start(segment_.data());
  }

  // Encoders fill the last byte with ones, a few with zeros, and some append whole bytes of either.
  bool only_padding() const {
    const size_t position = reader_.position();
    size_t byte = position / 8;
    if (position % 8 != 0) {
      const int mask = 0xFF >> (position % 8), rest = segment_[byte++] & mask;
      if (rest != 0 && rest != mask) return false;
    }
    return std::all_of(segment_.begin() + static_cast<std::ptrdiff_t>(byte),
                       segment_.begin() + static_cast<std::ptrdiff_t>(std::max(byte, segment_size_)),
                       [](uint8_t value) { return value == 0 || value == 0xFF; });
  }

  // The next symbol; -1: a code without one. Leaves at least 40 bits.
  int symbol(const HuffmanTable& table) {
    const uint64_t bits = reader_.refill();
    HuffmanTable::Code code = table.code(bits);
    if (code.length == 0) code = table.long_code(bits);
    if (code.length == 0) return -1;
    reader_.skip(code.length);
    return code.symbol;
  }

  const char* check_block(const Scan& scan, Component& component, size_t block) {
    if (!progressive_) return check_sequential(tables_[0][component.dc], tables_[1][component.ac]);
    if (scan.first > 0) {
      uint64_t& nonzero = component.nonzero[block];
      const HuffmanTable& table = tables_[1][component.ac];
      return scan.high == 0 ? check_first(scan, table, nonzero) : check_refinement(scan, table, nonzero);
    }
    if (scan.high > 0) {
      reader_.read(1);
      return nullptr;
    }
    return check_dc(tables_[0][component.dc]);
  }

  const char* check_dc(const HuffmanTable& table) {
    const int size = symbol(table);
    if (size < 0) return kBadCode;
    reader_.skip(static_cast<unsigned>(size));
    return nullptr;
  }

  const char* check_sequential(const HuffmanTable& dc, const HuffmanTable& ac) {
    if (const char* problem = check_dc(dc)) return problem;
    for (unsigned k = 1; k < 64;) {
      const unsigned step = ac.step(reader_.refill());
      const unsigned next = k + (step >> 5);
      if ((next & 127) < 64) {
        reader_.skip(step & 31);
        if (next >= HuffmanTable::kEndOfBlock) break;
        k = next;
        continue;
      }
      const int code = symbol(ac);
      if (code == 0) break;
      if (code < 0 || (code != 0xF0 && (code & 15) == 0)) return kBadCode;
      reader_.skip(static_cast<unsigned>(code) & 15);
      k += static_cast<unsigned>(code >> 4) + 1;
      if (k > 64) return kLongRun;
    }
    return nullptr;
  }

  // The first scan of a band of coefficients.
  const char* check_first(const Scan& scan, const HuffmanTable& table, uint64_t& nonzero) {
    if (end_of_band_ > 0) {
      --end_of_band_;
      return nullptr;
    }
    for (int k = scan.first; k <= scan.last; ++k) {
      const int code = symbol(table);
      if (code < 0) return kBadCode;
      const int run = code >> 4, size = code & 15;
      if (size == 0 && run < 15) {
        end_of_band_ = (1u << run) + reader_.read(static_cast<unsigned>(run)) - 1;
        break;
      }
      k += run;
      if (k > scan.last) return kLongRun;
      if (size == 0) continue;
      reader_.skip(static_cast<unsigned>(size));
      nonzero |= uint64_t{1} << k;
    }
    return nullptr;
  }

  // One more bit of a band of coefficients.
  const char* check_refinement(const Scan& scan, const HuffmanTable& table, uint64_t& nonzero) {
    int k = scan.first;
    for (; end_of_band_ == 0 && k <= scan.last; ++k) {
      const int code = symbol(table);
      if (code < 0) return kBadCode;
      int run = code >> 4;
      const int size = code & 15;
      if (size > 1) return kBadCode;
      if (size == 0 && run < 15) {
        end_of_band_ = (1u << run) + reader_.read(static_cast<unsigned>(run));
        break;
      }
      reader_.skip(static_cast<unsigned>(size));  // the sign
      unsigned corrections = 0;
      for (; k <= scan.last; ++k) {
        if ((nonzero >> k & 1) != 0) {
          ++corrections;
        } else if (--run < 0) {
          break;
        }
      }
      skip_many(corrections);
      if (k > scan.last) {
        if (size > 0 || run >= 0) return kLongRun;
      } else if (size > 0) {
        nonzero |= uint64_t{1} << k;
      }
    }
    if (end_of_band_ > 0) {
      if (k <= scan.last) skip_many(static_cast<unsigned>(std::popcount(nonzero >> k << (63 - scan.last + k))));
      --end_of_band_;
    }
    return nullptr;
  }

  void skip_many(unsigned n) {
    for (; n > 32; n -= 32) reader_.refill(), reader_.skip(32);
    reader_.refill(), reader_.skip(n);
  }

  size_t word(size_t at) const { return static_cast<size_t>(data_[at] << 8 | data_[at + 1]); }
  size_t word(std::ptrdiff_t at) const { return word(static_cast<size_t>(at)); }

  static constexpr const char* kNoEnd = "no end marker";
  static constexpr const char* kSpare = "spare bytes between scans";
  static constexpr const char* kBadTable = "a missing or invalid Huffman table";
  static constexpr const char* kOrder = "a scan that does not continue the progression";
  static constexpr const char* kBadCode = "an invalid Huffman code";
  static constexpr const char* kLongRun = "a run past the end of the block";

  const uint8_t* data_;
  size_t size_, at_ = 0;
  bool progressive_ = false, has_tables_ = false;
  size_t height_ = 0, width_ = 0;
  int across_ = 1, down_ = 1;  // the largest sampling factors
  int interval_ = 0;           // MCUs between restart markers, 0: none
  int scans_ = 0;
  std::vector<Component> components_;
  std::array<std::array<HuffmanTable, 4>, 2> tables_;  // DC and AC
  std::vector<Component*> blocks_;                     // of an MCU
  std::vector<uint8_t> segment_;
  size_t segment_size_ = 0;
  BitReader reader_;
  unsigned end_of_band_ = 0;  // blocks that remain of a run of empty ones
};

}  // namespace scf
