// One pass over the teacher rows (softmax, clamp, entropy), then one over the student rows, each with its pairs.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "kernels/distillation/distillation.h"
#include "kernels/distillation/pair.h"
#include "kernels/fast_exp.h"

namespace scf {
namespace {

// Rows a thread takes at least: about 20 microseconds of work at width 512.
constexpr int64_t kGrain = 8;

struct RowSums {
  float largest;
  float sum;
  float log_sum;  // log sum exp(row / temperature)
};

// out = exp((row - largest) / temperature)
RowSums exponentials(const float* row, int64_t width, float temperature, float* out) {
  float largest = -INFINITY;
  int poisoned = 0;
  // Without the pragma the order of comparisons is kept: one after another, four cycles each.
#pragma omp simd reduction(max : largest) reduction(| : poisoned)
  for (int64_t j = 0; j < width; ++j) {
    largest = row[j] > largest ? row[j] : largest;
    poisoned |= row[j] != row[j];
  }
  if (poisoned) largest = NAN;  // the comparison drops NaN, and a plausible number must never come out of one
  const float inverse_temperature = 1 / temperature;
  float sum = 0;
  for (int64_t j = 0; j < width; ++j) {
    out[j] = fast_exp((row[j] - largest) * inverse_temperature);
  }
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < width; ++j) sum += out[j];
  return {largest, sum, largest * inverse_temperature + std::log(sum)};
}

}  // namespace

int64_t distillation_scratch(const DistillationProblem& problem) {
  // Targets [teachers, width], their masses and entropies.
  return problem.teachers * (problem.width + 2);
}

void distillation_forward_cpu(const DistillationProblem& p, Parallel parallel) {
  float* targets = p.scratch;
  float* masses = targets + p.teachers * p.width;
  float* entropies = masses + p.teachers;

  parallel(p.teachers, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* target = targets + t * p.width;
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
      masses[t] = mass;
      entropies[t] = entropy;
    }
  });

  // Pairs by student row, in the order they came: sums do not depend on the number of threads.
  int64_t* starts = p.order;
  int64_t* pairs = p.order + p.students + 1;
  std::fill(starts, starts + p.students + 1, 0);
  for (int64_t k = 0; k < p.pairs; ++k) ++starts[p.student_index[k] + 1];
  std::partial_sum(starts, starts + p.students + 1, starts);
  for (int64_t k = 0; k < p.pairs; ++k) pairs[starts[p.student_index[k]]++] = k;

  const float temperature = *p.student_temperature;
  const float inverse_width = 1.0f / static_cast<float>(p.width);
  parallel(p.students, kGrain, [&](int64_t begin, int64_t end) {
    std::vector<float> probabilities(p.width);
    float* q = probabilities.data();
    for (int64_t s = begin; s < end; ++s) {
      const float* row = p.student + s * p.width;
      float* gradient = p.d_student ? p.d_student + s * p.width : nullptr;
      if (gradient) std::fill(gradient, gradient + p.width, 0.0f);
      p.loss[s] = p.d_temperature[s] = 0;
      const int64_t first = s == 0 ? 0 : starts[s - 1];  // the counting sort has moved each start to its end
      if (first == starts[s]) continue;

      const RowSums row_sums = exponentials(row, p.width, temperature, q);
      const float inverse_sum = 1 / row_sums.sum, log_sum = row_sums.log_sum;
      float mean = 0;
#pragma omp simd reduction(+ : mean)
      for (int64_t j = 0; j < p.width; ++j) {
        q[j] *= inverse_sum;
        mean += q[j] * row[j];
      }
      mean /= temperature;
      for (int64_t k = first; k < starts[s]; ++k) {
        const int64_t t = p.teacher_index[pairs[k]];
        const float* target = targets + t * p.width;
        const TargetSums sums{masses[t], entropies[t]};
        const float scale = p.weight[pairs[k]] * inverse_width;
        float cross = 0;
#pragma omp simd reduction(+ : cross)
        for (int64_t j = 0; j < p.width; ++j) cross += target[j] * row[j];
        cross /= temperature;
        p.loss[s] += scale * pair_loss(sums, cross, log_sum, temperature);
        p.d_temperature[s] += scale * pair_d_temperature(sums, cross, log_sum, mean, temperature);
        if (gradient) {
          for (int64_t j = 0; j < p.width; ++j) {
            gradient[j] += scale * pair_d_student(sums.mass, q[j], target[j], temperature);
          }
        }
      }
    }
  });
}

}  // namespace scf
