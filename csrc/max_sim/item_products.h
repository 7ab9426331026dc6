// Products of single items, each by one thread: an item's tokens are packed as the right-hand matrix of many products.
#pragma once
#include <ATen/ATen.h>

#include <algorithm>
#include <memory>

#include "common/integers.h"
#include "kernels/product_kernels.h"

namespace fc {

// Memory of one thread that grows as needed. Its contents are lost when it grows.
template <class T>
class Scratch {
 public:
  T* of(int64_t size) {
    if (size > size_) memory_.reset(new T[size_ = size]);
    return memory_.get();
  }

 private:
  std::unique_ptr<T[]> memory_;
  int64_t size_ = 0;
};

// A matrix (k, n) on the right of products, in panels of `kWidth` columns, each (k, kWidth), row after row, the last
// one padded.
template <class T>
class ItemPanels {
 public:
  // How many columns are multiplied at a time. The baseline leaves products to the vendor's library, for any width.
  static int64_t width() { return kernels().multiply ? kernels().panel : 32; }

  // Packs the rows (n, k) of a matrix as columns.
  void set_transposed(const T* rows, int64_t n, int64_t k) {
    T* at = resize(k, n);
    for (int64_t j = 0; j < n; j += width(), at += k * width()) {
      const int64_t columns = std::min(width(), n - j);
      if (kernels().multiply) {
        kernels().pack_transposed(rows + j * k, k, k, columns, at);
        continue;
      }
      for (int64_t s = 0; s < k; ++s)
        for (int64_t c = 0; c < width(); ++c) at[s * width() + c] = c < columns ? rows[(j + c) * k + s] : T(0);
    }
  }
  // Packs a matrix (k, n) as it is.
  void set(const T* rows, int64_t k, int64_t n) {
    T* at = resize(k, n);
    for (int64_t j = 0; j < n; j += width(), at += k * width()) {
      const int64_t columns = std::min(width(), n - j);
      if (kernels().multiply) {
        kernels().pack(rows + j, n, k, columns, at);
        continue;
      }
      for (int64_t s = 0; s < k; ++s)
        for (int64_t c = 0; c < width(); ++c) at[s * width() + c] = c < columns ? rows[s * n + j + c] : T(0);
    }
  }

  // The panel that begins at column `first`, a multiple of width().
  const T* panel(int64_t first) const { return memory_ + first * k_; }
  int64_t columns() const { return n_; }

  // Sets c (m, n) to, or adds to it, a (m, k) times the panels at b; a has any strides, c rows of `c_row`.
  static void multiply(int64_t m, int64_t n, int64_t k, const T* a, int64_t a_row, int64_t a_k, const T* b, T* c,
                       int64_t c_row, bool add) {
    if (kernels().multiply) {
      kernels().multiply({m, n, k, a, a_row, a_k, b, k * width(), c, c_row, add});
      return;
    }
    const at::AutoDispatchBelowADInplaceOrView plain;  // threads of a parallel region begin without the guard
    const auto options = at::TensorOptions(c10::CppTypeToScalarType<T>::value);
    const at::Tensor left = at::from_blob(const_cast<T*>(a), {m, k}, {a_row, a_k}, options);
    for (int64_t j = 0; j < n; j += width(), b += k * width()) {
      const int64_t columns = std::min(width(), n - j);
      at::Tensor out = at::from_blob(c + j, {m, columns}, {c_row, 1}, options);
      const at::Tensor right = at::from_blob(const_cast<T*>(b), {k, columns}, {width(), 1}, options);
      if (add)
        out.addmm_(left, right);
      else
        at::mm_out(out, left, right);
    }
  }

 private:
  static const ProductKernels<T>& kernels() { return product_kernels<T>(); }
  T* resize(int64_t k, int64_t n) {
    k_ = k, n_ = n;
    return memory_ = scratch_.of(k * round_up(n, width()));
  }

  Scratch<T> scratch_;
  T* memory_ = nullptr;
  int64_t k_ = 0, n_ = 0;
};

}  // namespace fc
