// F.normalize's backward is eight passes over the features: of a batch of 1000 they take a third of a matrix product.
// Here a row stays in L1 from its norm to its result, and its gradient likewise:
//
//     z = x / |x|        dx = (g - z (z . g)) / |x|        and g / 1e-12 where |x| is below 1e-12
#include "normalize.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "tile.h"

namespace fc {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr double kLeastNorm = 1e-12;
constexpr int64_t kGrain = 64;  // rows

template <class F>
void for_each_row(int64_t rows, const F& f) {
  at::parallel_for(0, rows, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// z and the norms, as they are before the least one.
template <class T>
void forward(const at::Tensor& x, const at::Tensor& z, const at::Tensor& norms) {
  const int64_t d = x.size(-1);
  const T* in = x.const_data_ptr<T>();
  T *out = z.mutable_data_ptr<T>(), *norm = norms.mutable_data_ptr<T>();
  for_each_row(norms.numel(), [&](int64_t i) {
    const T* own = in + i * d;
    T* row = out + i * d;
    std::memcpy(row, own, d * sizeof(T));
    norm[i] = static_cast<T>(std::sqrt(kernels<T>().finish_row(row, own, nullptr, T(0), T(1), d)));
    kernels<T>().finish_row(row, own, nullptr, T(0), T(1) / std::max(norm[i], T(kLeastNorm)), d);
  });
}

template <class T>
void backward(const at::Tensor& g, const at::Tensor& z, const at::Tensor& norms, const at::Tensor& dx) {
  const int64_t d = z.size(-1);
  const T *upstream = g.const_data_ptr<T>(), *unit = z.const_data_ptr<T>(), *norm = norms.const_data_ptr<T>();
  T* out = dx.mutable_data_ptr<T>();
  for_each_row(norms.numel(), [&](int64_t i) {
    const T* own = unit + i * d;
    T* row = out + i * d;
    std::memcpy(row, upstream + i * d, d * sizeof(T));
    const auto dot = static_cast<T>(kernels<T>().finish_row(row, own, nullptr, T(0), T(1), d));
    const bool constant = norm[i] < T(kLeastNorm);  // the divisor
    kernels<T>().finish_row(row, own, constant ? nullptr : own, -dot, T(1) / std::max(norm[i], T(kLeastNorm)), d);
  });
}

struct Normalize : torch::autograd::Function<Normalize> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& given) {
    const at::Tensor x = given.resolve_neg().contiguous(), z = at::empty_like(x);
    const at::Tensor norms = at::empty({x.numel() / std::max<int64_t>(1, x.size(-1))}, x.options());
    x.scalar_type() == at::kDouble ? fc::forward<double>(x, z, norms) : fc::forward<float>(x, z, norms);
    ctx->save_for_backward({given, z, norms});
    return z;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    const variable_list saved = ctx->get_saved_variables();
    if (at::GradMode::is_enabled()) return {recorded(saved[0], upstream[0])};
    const at::Tensor g = upstream[0].resolve_neg().contiguous(), dx = at::empty_like(saved[1]);
    const bool wide = dx.scalar_type() == at::kDouble;
    wide ? fc::backward<double>(g, saved[1], saved[2], dx) : fc::backward<float>(g, saved[1], saved[2], dx);
    return {dx};
  }

 private:
  // The same for create_graph=True, as operations that autograd records.
  static at::Tensor recorded(const at::Tensor& x, const at::Tensor& g) {
    const at::Tensor norm = at::linalg_vector_norm(x, 2, at::IntArrayRef{-1}, /*keepdim=*/true);
    const at::Tensor least = norm.clamp_min(kLeastNorm), z = x / least;
    const at::Tensor dot = (z * g).sum(-1, /*keepdim=*/true) * (norm >= kLeastNorm);
    return (g - z * dot) / least;
  }
};

}  // namespace

at::Tensor normalize(const at::Tensor& x) {
  return Normalize::apply(x);
}

}  // namespace fc
