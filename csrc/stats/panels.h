// Packs the right-hand matrix of many products once for all of them.
#pragma once
#include <ATen/ATen.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/integers.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "kernels/product_kernels.h"
#include "stats/features.h"

namespace fc {

// Holds the matrix in panels (kernels/product_kernels.h) if `product_kernels<E>()` can multiply, otherwise as a tensor
// for the vendor's library. Setting rows that are already held does nothing, so the features must not change meanwhile.
template <class E>
class Panels {
 public:
  using T = SumType<E>;

  // Holds rows [begin, end) of the features as the columns of a (D, rows) matrix.
  void set_transposed(const Features<E>& f, int64_t begin, int64_t end) {
    hold({&f, begin, end, true}, [&] {
      if (!packs()) return set_vendor(f.as_tensor(begin, end).t());
      fill(f.row_stride(), end - begin, [&](int64_t column, int64_t columns, E* panel) {
        std::vector<StoredType<E>> scratch;
        const auto rows = f.read(begin + column, columns, 0, f.d, scratch).first;
        product_kernels<E>().pack_transposed(reinterpret_cast<const E*>(rows), f.row_stride(), k_, columns, panel);
      });
    });
  }
  // Holds rows [begin, end) of the features as a (rows, D) matrix.
  void set(const Features<E>& f, int64_t begin, int64_t end) {
    hold({&f, begin, end, false}, [&] {
      if (!packs()) return set_vendor(f.as_tensor(begin, end));
      fill(ceil_div(end - begin, kStoredPer<E>), f.d, [&](int64_t column, int64_t columns, E* panel) {
        std::vector<StoredType<E>> scratch;
        const auto [first, stride] = f.read(begin, end - begin, column, columns, scratch);
        product_kernels<E>().pack(first, stride, end - begin, columns, panel);
      });
    });
  }

  // Sets p.c (m, n) to, or adds to it, p.a (m, k) times rows [from, from + k) and columns [first, first + n) of the
  // held matrix. `from` and k count elements E; `first` must be a multiple of 32. Any thread may call it.
  void multiply(MatrixProduct<E> p, int64_t from, int64_t first) const {
    if (!packs()) return multiply_by_vendor(p, from, first);
    p.b = packed() + first * k_ + from * product_kernels<E>().panel;
    p.b_panel = k_ * product_kernels<E>().panel;
    product_kernels<E>().multiply(p);
  }

 private:
  static bool packs() { return product_kernels<E>().multiply != nullptr; }

  using Held = std::tuple<const Features<E>*, int64_t, int64_t, bool>;  // rows [begin, end), and whether transposed

  // Calls `pack` unless what is wanted is held already.
  template <class F>
  void hold(const Held& wanted, const F& pack) {
    if (held_ == wanted) return;
    held_ = {};
    pack();
    held_ = wanted;
  }

  template <class F>
  void fill(int64_t k, int64_t n, const F& pack_panel) {
    const int64_t width = product_kernels<E>().panel, panels = ceil_div(n, width), size = k * width * panels;
    k_ = k;
    const auto bytes = static_cast<int64_t>(size * sizeof(E));
    if (!memory_.defined() || memory_.numel() < bytes) memory_ = small_block(bytes);
    E* memory = packed();
    const int64_t at_once = 1 + 32768 / (k * width + 1);  // panels of one task: small ones share a task
    for_each_task(ceil_div(panels, at_once), [&](int64_t task) {
      for (int64_t j = task * at_once; j < std::min(panels, (task + 1) * at_once); ++j)
        pack_panel(j * width, std::min(width, n - j * width), memory + j * k * width);
    });
  }

  void set_vendor(const at::Tensor& matrix) {
    matrix_ = matrix;
    k_ = matrix.size(0);
  }
  void multiply_by_vendor(const MatrixProduct<E>& p, int64_t from, int64_t first) const {
    if constexpr (!kIsPair<E>) {
      const at::AutoDispatchBelowADInplaceOrView plain;  // threads of a parallel region begin without the guard
      const at::TensorOptions options = matrix_.options();
      at::Tensor c = at::from_blob(p.c, {p.m, p.n}, {p.c_row, 1}, options);
      const at::Tensor a = at::from_blob(const_cast<E*>(p.a), {p.m, p.k}, {p.a_row, p.a_k}, options);
      const at::Tensor b = matrix_.slice(0, from, from + p.k).slice(1, first, first + p.n);
      if (p.n == 1)
        times_column(p, b.template const_data_ptr<T>(), b.stride(0));
      else if (p.add)
        c.addmm_(a, b);
      else
        at::mm_out(c, a, b);
    }
  }

  // With features of one dimension all terms of a sum may be equal, and their rounding errors then add up. The
  // vendor's library does not say how it sums; this function sums a few terms at a time, in double.
  static void times_column(const MatrixProduct<E>& p, const T* b, int64_t b_stride) {
    constexpr int64_t kTerms = 16;
    std::vector<double> sums(p.m), some(p.m);
    for (int64_t first = 0; first < p.k; first += kTerms) {
      some.assign(p.m, 0);
      for (int64_t k = first; k < std::min(p.k, first + kTerms); ++k)
        for (int64_t i = 0; i < p.m; ++i)
          some[i] += static_cast<double>(p.a[i * p.a_row + k * p.a_k]) * b[k * b_stride];
      for (int64_t i = 0; i < p.m; ++i) sums[i] += some[i];
    }
    for (int64_t i = 0; i < p.m; ++i) p.c[i * p.c_row] = static_cast<T>(p.add ? p.c[i * p.c_row] + sums[i] : sums[i]);
  }

  E* packed() const { return static_cast<E*>(memory_.data_ptr()); }

  Held held_{};
  at::Tensor memory_;  // the panels
  int64_t k_ = 0;
  at::Tensor matrix_;  // or the matrix, for the vendor's library
};

// Writes a tile's products x @ y.T to `tile`. `y` has the columns of S from `first` on.
template <class E, class T = SumType<E>>
void multiply_tile(const FeatureRows<E>& x, const Panels<E>& y, const TileBounds& at, int64_t first, T* tile,
                   int64_t stride) {
  const int64_t d = x.d / kStoredPer<E>;
  y.multiply({at.rows, at.cols, d, x.row(at.row), d, 1, nullptr, 0, tile, stride, false}, 0, at.col - first);
}

// The same of elements [begin, end) of each row alone, which are added to the tile unless `begin` is 0.
template <class E, class T = SumType<E>>
void multiply_part(const FeatureRows<E>& x, const Panels<E>& y, const TileBounds& at, int64_t first, int64_t begin,
                   int64_t end, T* tile, int64_t stride) {
  const int64_t from = begin / kStoredPer<E>, d = x.d / kStoredPer<E>, k = end / kStoredPer<E> - from;
  y.multiply({at.rows, at.cols, k, x.row(at.row) + from, d, 1, nullptr, 0, tile, stride, from > 0}, from,
             at.col - first);
}

}  // namespace fc
