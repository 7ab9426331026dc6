// F.normalize's backward is eight passes over the features; for a batch of 1000 they take a third of a matrix product.
// Here a row stays in L1 from its norm to its result, and so does its gradient.
#include "autograd/normalize.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <vector>

#include "common/input.h"
#include "stats/unit_rows.h"

namespace fc {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t kGrain = 64;  // rows

int64_t row_count(const at::Tensor& x) {
  return x.numel() / std::max<int64_t>(1, x.size(-1));
}

template <class F>
void for_each_row(const at::Tensor& x, const F& f) {
  at::parallel_for(0, row_count(x), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// Writes z = x / |x| and the norms. A norm below kLeastNorm is written unchanged.
template <class T>
void forward(const at::Tensor& x, T* z, T* norms) {
  const int64_t d = x.size(-1);
  const T* in = x.const_data_ptr<T>();
  for_each_row(x, [&](int64_t i) {
    T* row = z + i * d;
    norms[i] = copy_and_norm(in + i * d, row, d);
    tile_kernels<T>().add_scale_dot(row, row, nullptr, T(0), inverse_of(norms[i]), d);
  });
}

// Turns `grad`, the gradient of z, into the gradient of x.
template <class T>
void backward(const T* z, const T* norms, const at::Tensor& grad) {
  const int64_t d = grad.size(-1);
  T* out = grad.mutable_data_ptr<T>();
  for_each_row(grad, [&](int64_t i) { project_row(out + i * d, z + i * d, norms[i], d); });
}

// Calls f(T{}) for the dtype of t.
template <class F>
void with_dtype(const at::Tensor& t, const F& f) {
  t.scalar_type() == at::kDouble ? f(double{}) : f(float{});
}

// The views are normalised directly into one tensor. Concatenating them first would hold them twice.
struct Normalize : torch::autograd::Function<Normalize> {
  static at::Tensor forward(AutogradContext* ctx, at::TensorList views) {
    std::vector<int64_t> shape = views[0].sizes().vec();
    shape[0] = 0;
    for (const at::Tensor& x : views) {
      TORCH_CHECK_VALUE(x.dim() && x.sizes().slice(1) == views[0].sizes().slice(1), "views: got shape ", x.sizes(),
                        ", expected the first view's shape ", views[0].sizes(), ", except for the number of rows");
      check_dtype("views", x, views[0].scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
      shape[0] += x.size(0);
    }
    const at::Tensor z = at::empty(shape, views[0].options()), norms = at::empty({row_count(z)}, z.options());
    with_dtype(z, [&](auto zero) {
      using T = decltype(zero);
      T *out = z.mutable_data_ptr<T>(), *norm = norms.mutable_data_ptr<T>();
      for (const at::Tensor& x : views) {
        fc::forward<T>(readable("views", x, x.scalar_type()), out, norm);
        out += x.numel();
        norm += row_count(x);
      }
    });
    variable_list saved(views.begin(), views.end());
    saved.insert(saved.end(), {z, norms});
    ctx->save_for_backward(saved);
    return z;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    variable_list views = ctx->get_saved_variables(), grads;
    const at::ScalarType dtype = views[0].scalar_type();
    const at::Tensor z = readable("normalised", views[views.size() - 2], dtype);
    const at::Tensor norms = readable("norms", views.back(), dtype);
    check_sizes("gradient", upstream[0], z.sizes());
    check_sizes("norms", norms, {row_count(z)});
    views.resize(views.size() - 2);
    if (at::GradMode::is_enabled()) {
      int64_t first = 0;
      for (const at::Tensor& x : views) {
        grads.push_back(recorded(x, upstream[0].narrow(0, first, x.size(0))));
        first += x.size(0);
      }
      return grads;
    }
    const at::Tensor dx = readable("gradient", upstream[0], dtype);  // holds z's gradient first
    with_dtype(z, [&](auto zero) {
      using T = decltype(zero);
      fc::backward<T>(z.const_data_ptr<T>(), norms.const_data_ptr<T>(), dx);
    });
    if (views.size() == 1) return {dx};
    int64_t first = 0;
    for (const at::Tensor& x : views) {
      grads.push_back(dx.narrow(0, first, x.size(0)));
      first += x.size(0);
    }
    return grads;
  }

 private:
  // Computes the same gradient by operations that autograd records, for create_graph=True.
  static at::Tensor recorded(const at::Tensor& x, const at::Tensor& g) {
    const at::Tensor norm = at::linalg_vector_norm(x, 2, at::IntArrayRef{-1}, /*keepdim=*/true);
    const at::Tensor least = norm.clamp_min(kLeastNorm), z = x / least;
    const at::Tensor dot = (z * g).sum(-1, /*keepdim=*/true);
    return ((g - z * dot) / least).masked_fill(norm < kLeastNorm, 0);
  }
};

}  // namespace

at::Tensor normalize(at::TensorList views) {
  return Normalize::apply(views);
}

}  // namespace fc
