// The arithmetic of one (student, teacher) pair, shared by the CPU and CUDA kernels. Notation of README.md: z = s /
// T_s.
#pragma once

#include <cmath>

#include "kernels/host_device.h"

namespace scf {

// The published clamp of the teacher's probabilities.
constexpr float kSmallestTarget = 1e-8f;

SCF_HD float clamped_target(float exponential, float inverse_sum) {
  const float p = exponential * inverse_sum;
  return p < kSmallestTarget ? kSmallestTarget : p;  // not fmaxf, which drops NaN
}

// The same clamp of ln p; infinities in a teacher row give NaN in both.
SCF_HD float clamped_log_target(float log_probability) {
  constexpr float smallest = -18.420680744f;  // ln 1e-8
  return log_probability < smallest ? smallest : log_probability;
}

// What the coordinates of one teacher row sum to.
struct TargetSums {
  float mass = 0;     // A = sum p, which the clamp lifts a little above 1
  float entropy = 0;  // sum p ln p
};

// D T_s^2 KL, from the cross term C = sum p z and the student's L = log sum exp z.
SCF_HD float pair_loss(TargetSums target, float cross, float log_sum, float temperature) {
  return temperature * temperature * (target.entropy - cross + target.mass * log_sum);
}

// d (D T_s^2 KL) / d T_s, with the student's own mean E = sum q z.
SCF_HD float pair_d_temperature(TargetSums target, float cross, float log_sum, float mean, float temperature) {
  return temperature * (2 * (target.entropy - cross + target.mass * log_sum) + cross - target.mass * mean);
}

// d (D T_s^2 KL) / d s_j.
SCF_HD float pair_d_student(float mass, float student_probability, float target, float temperature) {
  return temperature * (mass * student_probability - target);
}

}  // namespace scf
