// A row divided by its length, and the gradient that goes back through that.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/tile_kernels.h"

namespace fc {

constexpr double kLeastNorm = 1e-12;  // F.normalize's: what a shorter row is divided by

template <class T>
T inverse_of(T norm) {
  return T(1) / std::max(norm, T(kLeastNorm));
}

// z (d,) gets x; returns x's length. For d = 1 the length is |x|, as in torch: the square of 2e19 overflows float.
template <class T>
T copy_and_norm(const T* x, T* z, int64_t d) {
  std::memcpy(z, x, d * sizeof(T));
  if (d == 1) return std::abs(*x);
  return static_cast<T>(std::sqrt(kernels<T>().finish_row(z, x, nullptr, T(0), T(1), d)));
}

// The gradient of z = x / |x| becomes that of x: (g - z (z . g)) / |x|. Where |x| is below 1e-12 it
// is 0, and not 1e12 times g: so short a row has no direction to turn.
template <class T>
void project_row(T* grad, const T* z, T norm, int64_t d) {
  if (norm < T(kLeastNorm)) {
    std::fill_n(grad, d, T(0));
    return;
  }
  const auto dot = static_cast<T>(kernels<T>().finish_row(grad, z, nullptr, T(0), T(1), d));
  kernels<T>().finish_row(grad, z, z, -dot, inverse_of(norm), d);
}

}  // namespace fc
