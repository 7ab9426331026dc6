// What one row or column adds to a loss, as a function of its log-normaliser minus its positive's logit, and the
// derivative.
#pragma once
#include <algorithm>
#include <cmath>

namespace fc {

inline double softplus(double x) {
  return std::max(x, 0.) + std::log1p(std::exp(-std::abs(x)));
}

inline double sigmoid(double x) {
  return 1 / (1 + std::exp(-x));
}

// `decoupled` leaves the positive out of the denominator.
inline double loss_term(double difference, bool decoupled) {
  return decoupled ? difference : softplus(difference);
}

inline double loss_term_gradient(double difference, bool decoupled) {
  return decoupled ? 1 : sigmoid(difference);
}

}  // namespace fc
