// The arithmetic of (student, teacher) pairs, shared by the CPU and CUDA kernels. Notation of README.md: z = s / T_s.
#pragma once

#include <cmath>

#include "kernels/host_device.h"

namespace scf {

// The published clamp of the teacher's probabilities.
constexpr float kSmallestTarget = 1e-8f;

SCF_HD float clamped_target(float exponential, float inverse_sum) {
  const float p = exponential * inverse_sum;
  return p < kSmallestTarget ? kSmallestTarget : p;  // not fmaxf, which would drop NaN
}

// The same clamp of ln p; infinities in a teacher row give NaN in both.
SCF_HD float clamped_log_target(float log_probability) {
  constexpr float smallest = -18.420680744f;  // ln 1e-8
  return log_probability < smallest ? smallest : log_probability;
}

// Sums over the pairs of one student row, each weighted by w / D. Loss and gradients are linear in them, so the terms
// of the row itself (L, q, E) are applied once per row rather than per pair.
struct PairSums {
  float mass = 0;     // of A = sum p, slightly above 1 because of the clamp
  float entropy = 0;  // of H = sum p ln p
  float cross = 0;    // of C = sum p z
};

// L = log sum exp z.
SCF_HD float row_divergence(PairSums sums, float log_sum) { return sums.entropy - sums.cross + sums.mass * log_sum; }

SCF_HD float row_loss(PairSums sums, float log_sum, float temperature) {
  return temperature * temperature * row_divergence(sums, log_sum);
}

// d loss / d T_s, with the row's mean E = sum q z.
SCF_HD float row_d_temperature(PairSums sums, float log_sum, float mean, float temperature) {
  return temperature * (2 * row_divergence(sums, log_sum) + sums.cross - sums.mass * mean);
}

// d loss / d s_j, with the row's q_j and the sum of p_j over its pairs.
SCF_HD float row_d_student(float mass, float student_probability, float targets, float temperature) {
  return temperature * (mass * student_probability - targets);
}

}  // namespace scf
