// A coverage-guided fuzzer for g++, which has sanitizers but no libFuzzer: inputs that reach new code join the corpus
// and are mutated further. Compiled without instrumentation.
//
//   fuzz --seconds N [--seed N] [--only TARGET] [--corpus DIR] --out DIR
//   fuzz TARGET FILE...    runs the inputs of files once
#include "driver.h"

#include <sanitizer/common_interface_defs.h>
#include <sys/time.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <string>

extern "C" const char* __asan_default_options() {
  return "exitcode=77:detect_leaks=0:allocator_may_return_null=1:detect_stack_use_after_return=0";
}
extern "C" const char* __ubsan_default_options() { return "print_stacktrace=1:abort_on_error=1"; }

namespace {

using Bytes = std::vector<uint8_t>;
using Clock = std::chrono::steady_clock;

constexpr size_t kPlaces = 1 << 16;
constexpr int kHang = 20;  // seconds

uint8_t reached[kPlaces], seen[kPlaces];

const char* program = "fuzz";
std::string out = ".";
const fuzz::Target* current = nullptr;  // the target and the input that are running
const Bytes* input = nullptr;
volatile uint64_t executions = 0;

uint64_t hash(const Bytes& bytes) {
  uint64_t h = 1469598103934665603u;
  for (const uint8_t byte : bytes) h = (h ^ byte) * 1099511628211u;
  return h;
}

// Keeps the input that is running, on the way out.
void keep_input() {
  if (input == nullptr || current == nullptr) return;
  const std::unique_ptr<char[]> path(new char[4096]);
  std::snprintf(path.get(), 4096, "%s/crash-%s-%016llx", out.c_str(), current->name,
                static_cast<unsigned long long>(hash(*input)));
  if (std::FILE* file = std::fopen(path.get(), "wb")) {
    std::fwrite(input->data(), 1, input->size(), file);
    std::fclose(file);
  }
  std::fprintf(stderr, "\nfuzz: target %s failed after %llu executions; the input is %s\nreproduce: %s %s %s\n",
               current->name, static_cast<unsigned long long>(executions), path.get(), program, current->name,
               path.get());
  input = nullptr;
}

// Of UndefinedBehaviorSanitizer and fail(); those of AddressSanitizer end in its callback.
void on_abort(int) {
  keep_input();
  _exit(77);
}

void on_tick(int) {
  static uint64_t before = 0;
  static int ticks = 0;
  ticks = executions == before ? ticks + 1 : 0;
  before = executions;
  if (ticks < kHang || input == nullptr) return;
  std::fprintf(stderr, "fuzz: an execution takes more than %d s\n", kHang);
  keep_input();
  _exit(77);
}

class Fuzzer {
 public:
  Fuzzer(const fuzz::Target& target, uint64_t seed)
      : target_(target), random_(seed ^ hash({target.name, target.name + std::strlen(target.name)})) {}

  void add(Bytes seed) {
    seed.resize(std::min(seed.size(), target_.most));
    corpus_.push_back(seed);
    run(seed);
  }

  void step() {
    Bytes bytes = corpus_[below(corpus_.size())];
    for (size_t n = size_t{1} << below(5); n > 0; --n) mutate(bytes);
    bytes.resize(std::min(bytes.size(), target_.most));
    if (run(bytes) && corpus_.size() < 20000) corpus_.push_back(std::move(bytes));
  }

  const fuzz::Target& target() const { return target_; }
  size_t corpus() const { return corpus_.size(); }
  uint64_t count() const { return count_; }

 private:
  size_t below(size_t bound) { return bound == 0 ? 0 : random_() % bound; }

  // Returns whether the input reached new code.
  bool run(const Bytes& bytes) {
    std::memset(reached, 0, sizeof reached);
    const Bytes exact(bytes);  // so that its end is the end of its memory
    current = &target_, input = &exact;
    target_.run(exact.data(), exact.size());
    input = nullptr;
    executions = executions + 1;
    ++count_;
    bool found = false;
    for (size_t k = 0; k < kPlaces; k += 8) {
      uint64_t word;
      std::memcpy(&word, reached + k, sizeof word);
      if (word == 0) continue;
      for (size_t j = k; j < k + 8; ++j) {
        // The number of times, in powers of two.
        const uint8_t bit = reached[j] == 0 ? 0 : static_cast<uint8_t>(1u << (31 - __builtin_clz(reached[j])));
        found |= (seen[j] & bit) != bit;
        seen[j] |= bit;
      }
    }
    return found;
  }

  void mutate(Bytes& bytes) {
    const size_t at = below(bytes.size() + 1), left = bytes.size() - at;
    const auto from = [&](Bytes& b, size_t k) { return b.begin() + static_cast<std::ptrdiff_t>(k); };
    switch (below(8)) {
      case 0:
        if (left > 0) bytes[at] ^= static_cast<uint8_t>(1u << below(8));
        break;
      case 1:
        if (left > 0) bytes[at] = static_cast<uint8_t>(random_());
        break;
      case 2: {  // an interesting number
        static constexpr int64_t numbers[] = {0,        1,        -1,         127,       -128,       255,
                                              256,      32767,    -32768,     65535,     2147483647, -2147483648ll,
                                              16777216, 16777217, 1073741824, INT64_MAX, INT64_MIN};
        const int64_t number = numbers[below(std::size(numbers))];
        const size_t width = size_t{1} << below(4);
        if (left >= width) std::memcpy(bytes.data() + at, &number, width);
        break;
      }
      case 3:
        bytes.erase(from(bytes, at), from(bytes, at + std::min(left, size_t{1} << below(6))));
        break;
      case 4: {
        const Bytes more(size_t{1} << below(6), static_cast<uint8_t>(random_()));
        bytes.insert(from(bytes, at), more.begin(), more.end());
        break;
      }
      case 5: {  // a part of the input once more, elsewhere
        const size_t first = below(bytes.size() + 1), count = std::min(bytes.size() - first, size_t{1} << below(8));
        const Bytes part(from(bytes, first), from(bytes, first + count));
        bytes.insert(from(bytes, at), part.begin(), part.end());
        break;
      }
      case 6: {  // the end of another input
        Bytes& other = corpus_[below(corpus_.size())];
        const size_t first = below(other.size() + 1);
        bytes.resize(at);
        bytes.insert(bytes.end(), from(other, first), other.end());
        break;
      }
      default:  // a small difference
        if (left > 0) bytes[at] = static_cast<uint8_t>(bytes[at] + below(9) - 4);
    }
  }

  const fuzz::Target& target_;
  std::mt19937_64 random_;
  std::vector<Bytes> corpus_;
  uint64_t count_ = 0;
};

Bytes read(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

int replay(const std::string& name, int count, char** files) {
  for (const fuzz::Target& target : fuzz::targets) {
    if (name != target.name) continue;
    for (int k = 0; k < count; ++k) {
      const Bytes bytes = read(files[k]);
      target.run(bytes.data(), bytes.size());
      std::printf("%s: no failure\n", files[k]);
    }
    return 0;
  }
  std::fprintf(stderr, "fuzz: got target %s, expected one of:", name.c_str());
  for (const fuzz::Target& target : fuzz::targets) std::fprintf(stderr, " %s", target.name);
  std::fprintf(stderr, "\n");
  return 2;
}

}  // namespace

extern "C" void __sanitizer_cov_trace_pc() {
  const auto place = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
  uint8_t& count = reached[(place ^ place >> 16) % kPlaces];
  count = static_cast<uint8_t>(count + (count < 255));
}

void fuzz::fail(const char* message) {
  std::fprintf(stderr, "fuzz: %s\n", message);
  std::abort();
}

int main(int argc, char** argv) {
  program = argv[0];
  if (argc > 2 && argv[1][0] != '-') return replay(argv[1], argc - 2, argv + 2);
  double seconds = 60;
  uint64_t seed = 0;
  std::string only, corpus;
  for (int k = 1; k + 1 < argc; k += 2) {
    const std::string option = argv[k];
    if (option == "--seconds") seconds = std::atof(argv[k + 1]);
    if (option == "--seed") seed = std::strtoull(argv[k + 1], nullptr, 10);
    if (option == "--only") only = argv[k + 1];
    if (option == "--corpus") corpus = argv[k + 1];
    if (option == "--out") out = argv[k + 1];
  }
  __sanitizer_set_death_callback(keep_input);
  std::signal(SIGABRT, on_abort);
  std::signal(SIGALRM, on_tick);
  const itimerval every_second{{1, 0}, {1, 0}};
  setitimer(ITIMER_REAL, &every_second, nullptr);

  std::vector<Fuzzer> fuzzers;
  for (const fuzz::Target& target : fuzz::targets) {
    if (only.empty() ? !target.only_if_named : only == target.name) fuzzers.emplace_back(target, seed);
  }
  if (fuzzers.empty()) return replay(only, 0, nullptr);
  for (Fuzzer& fuzzer : fuzzers) {
    fuzzer.add({});
    fuzzer.add(Bytes(std::min<size_t>(fuzzer.target().most, 512), 7));
    const std::filesystem::path folder = std::filesystem::path(corpus) / fuzzer.target().name;
    if (corpus.empty() || !std::filesystem::is_directory(folder)) continue;
    std::vector<std::filesystem::path> files(std::filesystem::directory_iterator(folder), {});
    std::sort(files.begin(), files.end());
    for (const auto& file : files) fuzzer.add(read(file));
  }

  const auto begin = Clock::now();
  const auto elapsed = [&] { return std::chrono::duration<double>(Clock::now() - begin).count(); };
  double next = 1;
  const auto report = [&](double now) {
    size_t inputs = 0;
    for (const Fuzzer& fuzzer : fuzzers) inputs += fuzzer.corpus();
    std::printf("%4.0f s: %llu executions, %.0f/s, corpus of %zu inputs\n", now,
                static_cast<unsigned long long>(executions), static_cast<double>(executions) / now, inputs);
    std::fflush(stdout);
  };
  while (elapsed() < seconds) {
    for (Fuzzer& fuzzer : fuzzers) {
      const double end = std::min(elapsed() + 0.02, seconds);
      do fuzzer.step();
      while (elapsed() < end);
    }
    if (const double now = elapsed(); now >= next) report(now), next = now + std::max(1.0, seconds / 30);
  }
  report(elapsed());
  for (const Fuzzer& fuzzer : fuzzers) {
    std::printf("  %-14s %llu executions, corpus of %zu inputs\n", fuzzer.target().name,
                static_cast<unsigned long long>(fuzzer.count()), fuzzer.corpus());
  }
  return 0;
}
