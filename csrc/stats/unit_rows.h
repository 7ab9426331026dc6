// Divides a row by its length, and computes the gradient of that.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/tile_kernels.h"

namespace fc {

constexpr double kLeastNorm = 1e-12;  // a shorter row is divided by this, as in F.normalize

template <class T>
T inverse_of(T norm) {
  return T(1) / std::max(norm, T(kLeastNorm));
}

// Copies x (d,) to z and returns x's length. For d = 1 that is |x|, as in torch: the square of 2e19 overflows float.
template <class T>
T copy_and_norm(const T* x, T* z, int64_t d) {
  std::memcpy(z, x, d * sizeof(T));
  if (d == 1) return std::abs(*x);
  return static_cast<T>(std::sqrt(tile_kernels<T>().add_scale_dot(z, x, nullptr, T(0), T(1), d)));
}

// `grad` holds g, the gradient of z = x / |x|, and becomes the gradient of x: (g - z (z . g)) / |x|. Where |x| is below
// 1e-12 it becomes 0 instead of 1e12 times g, because so short a row has no meaningful direction.
template <class T>
void project_row(T* grad, const T* z, T norm, int64_t d) {
  if (norm < T(kLeastNorm)) {
    std::fill_n(grad, d, T(0));
    return;
  }
  const auto dot = static_cast<T>(tile_kernels<T>().add_scale_dot(grad, z, nullptr, T(0), T(1), d));
  tile_kernels<T>().add_scale_dot(grad, z, z, -dot, inverse_of(norm), d);
}

}  // namespace fc
