// A row divided by its length, and the gradient that goes back through that.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "tile.h"

namespace fc {

constexpr double kLeastNorm = 1e-12;  // F.normalize's: what a shorter row is divided by

// 0 for a row of zeros, which has no direction: it stays zeros and gets a gradient of zeros, and not 1e12 times z's.
template <class T>
T inverse_of(T norm) {
  return norm == T(0) ? T(0) : T(1) / std::max(norm, T(kLeastNorm));
}

// z (d,) gets x; returns x's length.
template <class T>
T copy_and_norm(const T* x, T* z, int64_t d) {
  std::memcpy(z, x, d * sizeof(T));
  return static_cast<T>(std::sqrt(kernels<T>().finish_row(z, x, nullptr, T(0), T(1), d)));
}

// The gradient of z = x / |x| becomes that of x: (g - z (z . g)) / |x|, g / 1e-12 where |x| is below 1e-12, 0 where it is 0.
template <class T>
void project_row(T* grad, const T* z, T norm, int64_t d) {
  const auto dot = static_cast<T>(kernels<T>().finish_row(grad, z, nullptr, T(0), T(1), d));
  const bool constant = norm < T(kLeastNorm);  // the divisor
  kernels<T>().finish_row(grad, z, constant ? nullptr : z, -dot, inverse_of(norm), d);
}

}  // namespace fc
