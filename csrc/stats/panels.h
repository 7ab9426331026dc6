// The right-hand matrix of many products, packed once for all of them.
#pragma once
#include <ATen/ATen.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/parallel.h"
#include "stats/prepared.h"
#include "kernels/product_kernels.h"
#include "common/integers.h"

namespace fc {

// Where `products<E>()` can multiply, panels; where it cannot, the tensor itself, for the vendor's library. Setting it
// to what it holds already takes no time: the features must stay as they are.
template <class E>
class Panels {
 public:
  using T = typename Accumulator<E>::Type;

  // Rows [begin, end) of the features as the columns of a (D, rows) matrix.
  void set_transposed(const Features<E>& f, int64_t begin, int64_t end) {
    hold({&f, begin, end, true}, [&] {
      if (!own()) return set_vendor(f.as_tensor(begin, end).t());
      fill(f.row_stride(), end - begin, [&](int64_t column, int64_t columns, E* panel) {
        std::vector<typename Features<E>::Element> room;
        const auto rows = f.read(begin + column, columns, 0, f.d, room).first;
        products<E>().pack_transposed(reinterpret_cast<const E*>(rows), f.row_stride(), k_, columns, panel);
      });
    });
  }
  // Rows [begin, end) of the features as a (rows, D) matrix.
  void set(const Features<E>& f, int64_t begin, int64_t end) {
    hold({&f, begin, end, false}, [&] {
      if (!own()) return set_vendor(f.as_tensor(begin, end));
      fill(ceil_div(end - begin, Stored<E>::rows), f.d, [&](int64_t column, int64_t columns, E* panel) {
        std::vector<typename Features<E>::Element> room;
        const auto [first, stride] = f.read(begin, end - begin, column, columns, room);
        products<E>().pack(first, stride, end - begin, columns, panel);
      });
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

  using Held = std::tuple<const Features<E>*, int64_t, int64_t, bool>;  // rows [begin, end), and whether transposed

  // `pack`s what is wanted, unless it is held already.
  template <class F>
  void hold(const Held& wanted, const F& pack) {
    if (held_ == wanted) return;
    held_ = {};
    pack();
    held_ = wanted;
  }

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
      if (p.n == 1)
        times_column(p, b.template const_data_ptr<T>(), b.stride(0));
      else if (p.add)
        c.addmm_(a, b);
      else
        at::mm_out(c, a, b);
    }
  }

  // Of features of one dimension the terms of a sum may all be equal, and their rounding errors then add up. No library
  // says how it sums: here a few terms at a time, and in double.
  static void times_column(const Product<E>& p, const T* b, int64_t b_stride) {
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
  at::Tensor memory_;
  int64_t k_ = 0;
  at::Tensor matrix_;
};

}  // namespace fc
