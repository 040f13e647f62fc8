// Threads for the CPU kernels without torch's headers: csrc/parallel.h passes in torch's thread pool.
#pragma once

#include <cstdint>
#include <type_traits>

namespace scf {

class Parallel {
 public:
  using Body = void (*)(int64_t begin, int64_t end, void* context);
  using Run = void (*)(int64_t count, int64_t grain, Body body, void* context);

  explicit Parallel(Run run) : run_(run) {}

  // Calls body(begin, end) on ranges that cover [0, count), each of at least `grain` items except the last.
  template <class F>
  void operator()(int64_t count, int64_t grain, F&& body) const {
    run_(
        count, grain,
        [](int64_t begin, int64_t end, void* context) {
          (*static_cast<std::remove_reference_t<F>*>(context))(begin, end);
        },
        const_cast<void*>(static_cast<const void*>(&body)));
  }

 private:
  Run run_;
};

}  // namespace scf
