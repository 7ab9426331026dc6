// The right-hand matrix of many products, packed once for all of them.
#pragma once
#include <ATen/ATen.h>

#include <algorithm>

#include "parallel.h"
#include "prepared.h"
#include "product.h"

namespace fc {

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Where `products<E>()` can multiply, panels; where it cannot, the tensor itself, for the vendor's library.
template <class E>
class Panels {
 public:
  using T = typename Accumulator<E>::Type;

  // Rows [begin, end) of the features as the columns of a (D, rows) matrix.
  void set_transposed(const Features<E>& f, int64_t begin, int64_t end) {
    if (!own()) return set_vendor(rows_of(f.tensor, begin, end).t());
    fill(f.row_stride(), end - begin, [&](int64_t column, int64_t columns, E* panel) {
      products<E>().pack_transposed(f.row(begin + column), f.row_stride(), k_, columns, panel);
    });
  }
  // Rows [begin, end) of the features as a (rows, D) matrix.
  void set(const Features<E>& f, int64_t begin, int64_t end) {
    if (!own()) return set_vendor(rows_of(f.tensor, begin, end));
    fill(ceil_div(end - begin, Stored<E>::rows), f.d, [&](int64_t column, int64_t columns, E* panel) {
      products<E>().pack(f.elements + begin * f.d + column, f.d, end - begin, columns, panel);
    });
  }

  // c (m, columns) = or += a (m, k) times rows [from, from + k) and columns [first, first + columns) of the matrix, all
  // in E and `first` a multiple of 32. From any thread.
  void multiply(Product<E> p, int64_t from, int64_t first) const {
    if (!own()) return vendor(p, from, first);
    p.b = packed() + first * k_ + from * products<E>().panel;
    p.b_panel = k_ * products<E>().panel;
    products<E>().multiply(p);
  }

 private:
  static bool own() { return products<E>().multiply != nullptr; }

  template <class F>
  void fill(int64_t k, int64_t n, const F& pack_panel) {
    const int64_t width = products<E>().panel, panels = ceil_div(n, width), size = k * width * panels;
    k_ = k;
    const auto bytes = static_cast<int64_t>(size * sizeof(E));
    if (!memory_.defined() || memory_.numel() < bytes) memory_ = at::empty({bytes}, at::kByte);
    E* memory = packed();
    const int64_t at_once = 1 + 32768 / (k * width + 1);  // panels too small for a task each
    for_each_task(ceil_div(panels, at_once), [&](int64_t task) {
      for (int64_t j = task * at_once; j < std::min(panels, (task + 1) * at_once); ++j)
        pack_panel(j * width, std::min(width, n - j * width), memory + j * k * width);
    });
  }

  void set_vendor(const at::Tensor& matrix) {
    matrix_ = matrix;
    k_ = matrix.size(0);
  }
  void vendor(const Product<E>& p, int64_t from, int64_t first) const {
    if constexpr (!std::is_same_v<E, Bf16Pair>) {
      const at::AutoDispatchBelowADInplaceOrView plain;  // the threads of a parallel region begin without it
      const at::TensorOptions options = matrix_.options();
      at::Tensor c = at::from_blob(p.c, {p.m, p.n}, {p.c_row, 1}, options);
      const at::Tensor a = at::from_blob(const_cast<E*>(p.a), {p.m, p.k}, {p.a_row, p.a_k}, options);
      const at::Tensor b = matrix_.slice(0, from, from + p.k).slice(1, first, first + p.n);
      if (p.n == 1) {  // dot products, which sum in many lanes
        at::Tensor column = c.select(1, 0);
        column.addmv_(a, b.select(1, 0), p.add);
      } else if (p.add)
        c.addmm_(a, b);
      else
        at::mm_out(c, a, b);
    }
  }

  E* packed() const { return static_cast<E*>(memory_.data_ptr()); }

  at::Tensor memory_;
  int64_t k_ = 0;
  at::Tensor matrix_;
};

}  // namespace fc
