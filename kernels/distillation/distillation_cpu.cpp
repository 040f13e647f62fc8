// One pass over the teacher rows (softmax, clamp, entropy), then one over the student rows, each with its pairs.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "kernels/clones.h"
#include "kernels/distillation/distillation.h"
#include "kernels/distillation/pair.h"
#include "kernels/fast_exp.h"

namespace scf {
namespace {

// Minimum rows per thread: about 10 microseconds of work at width 512.
constexpr int64_t kGrain = 16;

struct RowSums {
  float sum;
  float log_sum;  // log sum exp(row / temperature)
};

// out = exp((row - largest) / temperature). Inlined, so that it is compiled into each clone of its callers.
[[gnu::always_inline]] inline RowSums exponentials(const float* row, int64_t width, float temperature, float* out) {
  float largest = -INFINITY;
  int has_nan = 0;
  // Without the pragma the comparisons stay sequential, at four cycles each.
#pragma omp simd reduction(max : largest) reduction(| : has_nan)
  for (int64_t j = 0; j < width; ++j) {
    largest = row[j] > largest ? row[j] : largest;
    has_nan |= row[j] != row[j];
  }
  if (has_nan) largest = NAN;  // the comparison drops NaN, which must propagate
  const float inverse_temperature = 1 / temperature;
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < width; ++j) {
    out[j] = fast_exp((row[j] - largest) * inverse_temperature);
    sum += out[j];
  }
  return {sum, largest * inverse_temperature + std::log(sum)};
}

// The teacher's clamped softmax, with A and H of README.md.
struct Targets {
  float* p;        // [teachers, width]
  float* mass;     // [teachers]
  float* entropy;  // [teachers]
};

SCF_CLONES void target_row(const DistillationProblem& p, int64_t t, const Targets& targets) {
  float* target = targets.p + t * p.width;
  const float* row = p.teacher + t * p.width;
  const RowSums row_sums = exponentials(row, p.width, p.teacher_temperature, target);
  const float inverse_sum = 1 / row_sums.sum, inverse_temperature = 1 / p.teacher_temperature;
  float mass = 0, entropy = 0;
#pragma omp simd reduction(+ : mass, entropy)
  for (int64_t j = 0; j < p.width; ++j) {
    const float log_p = clamped_log_target(row[j] * inverse_temperature - row_sums.log_sum);
    target[j] = clamped_target(target[j], inverse_sum);
    mass += target[j];
    entropy += target[j] * log_p;
  }
  targets.mass[t] = mass;
  targets.entropy[t] = entropy;
}

// A student row with pairs[0, count): its gradient [width] and its contributions to the loss and to d_temperature.
// q: [width] scratch.
SCF_CLONES void student_row(const DistillationProblem& p, int64_t s, const int64_t* pairs, int64_t count,
                            const Targets& targets, float temperature, float* q, float* gradient, float& loss,
                            float& d_temperature) {
  const float* row = p.student + s * p.width;
  const float inverse_width = 1.0f / static_cast<float>(p.width), inverse_temperature = 1 / temperature;
  PairSums sums;
  for (int64_t k = 0; k < count; ++k) {
    const int64_t t = p.teacher_index[pairs[k]];
    const float* target = targets.p + t * p.width;
    const float scale = p.weight[pairs[k]] * inverse_width;
    float cross = 0;
    if (k == 0) {
#pragma omp simd reduction(+ : cross)
      for (int64_t j = 0; j < p.width; ++j) {
        cross += target[j] * row[j];
        gradient[j] = scale * target[j];
      }
    } else {
#pragma omp simd reduction(+ : cross)
      for (int64_t j = 0; j < p.width; ++j) {
        cross += target[j] * row[j];
        gradient[j] += scale * target[j];
      }
    }
    sums.mass += scale * targets.mass[t];
    sums.entropy += scale * targets.entropy[t];
    sums.cross += scale * (cross * inverse_temperature);
  }
  const RowSums row_sums = exponentials(row, p.width, temperature, q);
  const float inverse_sum = 1 / row_sums.sum;
  float mean = 0;
#pragma omp simd reduction(+ : mean)
  for (int64_t j = 0; j < p.width; ++j) {
    const float probability = q[j] * inverse_sum;
    mean += probability * row[j];
    gradient[j] = row_d_student(sums.mass, probability, gradient[j], temperature);
  }
  loss = row_loss(sums, row_sums.log_sum, temperature);
  d_temperature = row_d_temperature(sums, row_sums.log_sum, mean * inverse_temperature, temperature);
}

}  // namespace

void distillation_forward_cpu(const DistillationProblem& p, Parallel parallel) {
  float* losses = p.scratch;
  float* d_temperatures = losses + p.students;
  Targets targets{.p = d_temperatures + p.students, .mass = nullptr, .entropy = nullptr};
  targets.mass = targets.p + p.teachers * p.width;
  targets.entropy = targets.mass + p.teachers;
  parallel(p.teachers, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) target_row(p, t, targets);
  });

  // Counting sort of the pairs by student row, stable, so that sums do not depend on the number of threads.
  int64_t* starts = p.order;
  int64_t* pairs = p.order + p.students + 1;
  std::fill(starts, starts + p.students + 1, 0);
  for (int64_t k = 0; k < p.pairs; ++k) ++starts[p.student_index[k] + 1];
  std::partial_sum(starts, starts + p.students + 1, starts);
  for (int64_t k = 0; k < p.pairs; ++k) pairs[starts[p.student_index[k]]++] = k;

  const float temperature = p.student_temperature ? *p.student_temperature : p.student_temperature_value;
  parallel(p.students, kGrain, [&](int64_t begin, int64_t end) {
    std::vector<float> buffers(2 * p.width);
    float* discarded = buffers.data() + p.width;
    for (int64_t s = begin; s < end; ++s) {
      float* gradient = p.d_student ? p.d_student + s * p.width : discarded;
      const int64_t first = s == 0 ? 0 : starts[s - 1];  // the counting sort has moved each start to its end
      if (first == starts[s]) {
        std::fill(gradient, gradient + p.width, 0.0f);
        losses[s] = d_temperatures[s] = 0;
      } else {
        student_row(p, s, pairs + first, starts[s] - first, targets, temperature, buffers.data(), gradient, losses[s],
                    d_temperatures[s]);
      }
    }
  });
  *p.loss = static_cast<float>(std::accumulate(losses, losses + p.students, 0.0));
  *p.d_temperature = static_cast<float>(std::accumulate(d_temperatures, d_temperatures + p.students, 0.0));
}

}  // namespace scf
