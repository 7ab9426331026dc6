// Features as the products read them.
#pragma once
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <utility>
#include <vector>

#include "common/input.h"
#include "kernels/product_kernels.h"
#include "stats/unit_rows.h"

namespace fc {

// A range of feature rows, as elements of E. `row(i)` takes the index of a row among all rows.
template <class E>
struct FeatureRows {
  const StoredType<E>* elements;  // of row `begin`
  int64_t begin, d;
  const E* row(int64_t i) const { return reinterpret_cast<const E*>(elements + (i - begin) * d); }
};

// Features (rows, D), as given or, if `unit`, with each row divided by its length. Unit rows are computed where they
// are read, a part at a time, so that no copy of all of them is held.
template <class E>
struct Features {
  using Element = StoredType<E>;
  using T = SumType<E>;
  at::Tensor tensor, norms;  // (rows, D); (rows,) undefined unless unit
  const Element* elements;
  int64_t rows, d;  // d in elements

  Features(const char* name, const at::Tensor& t, bool unit) : rows(t.size(0)), d(t.size(1)) {
    constexpr auto dtype = c10::CppTypeToScalarType<T>::value;
    tensor = readable(name, t, kIsPair<E> ? at::kBFloat16 : dtype);
    elements = static_cast<const Element*>(tensor.const_data_ptr());
    if constexpr (!kIsPair<E>)
      if (unit) {
        norms = at::empty({rows}, tensor.options());
        T* norm = norms.template mutable_data_ptr<T>();
        for_each_part([&](int64_t begin, int64_t end) {
          std::vector<T> scratch(d);
          for (int64_t i = begin; i < end; ++i) norm[i] = copy_and_norm(elements + i * d, scratch.data(), d);
        });
      }
  }
  bool unit() const { return norms.defined(); }
  T norm(int64_t i) const { return norms.template const_data_ptr<T>()[i]; }
  int64_t row_stride() const { return d / kStoredPer<E>; }  // in E, and the length of a row

  // Returns where columns [col, col + cols) of rows [row, row + count) can be read, and their row stride. Unit features
  // are written to `scratch`.
  std::pair<const Element*, int64_t> read(int64_t row, int64_t count, int64_t col, int64_t cols,
                                          std::vector<Element>& scratch) const {
    if (!unit()) return {elements + row * d + col, d};
    scratch.resize(count * cols);
    write_units(row, count, col, cols, scratch.data());
    return {scratch.data(), cols};
  }
  // Rows [begin, end). Unit features are written to `scratch`.
  FeatureRows<E> read_rows(int64_t begin, int64_t end, at::Tensor& scratch) const {
    if (!unit()) return {elements, 0, d};
    scratch = units(begin, end);
    return {static_cast<const Element*>(scratch.const_data_ptr()), begin, d};
  }
  // Returns rows [begin, end). For all rows it returns the tensor itself, which saves small problems the cost of a
  // view.
  at::Tensor as_tensor(int64_t begin, int64_t end) const {
    if (unit()) return units(begin, end);
    return end - begin == rows ? tensor : tensor.slice(0, begin, end);
  }
  // Returns row i in T. A bfloat16 row is widened in `scratch`, and a unit row is computed there.
  const T* wide_row(int64_t i, std::vector<T>& scratch) const {
    if constexpr (kIsPair<E>) {
      scratch.resize(d);
      for (int64_t j = 0; j < d; ++j) scratch[j] = c10::detail::f32_from_bits(elements[i * d + j]);
      return scratch.data();
    } else {
      return read(i, 1, 0, d, scratch).first;
    }
  }

 private:
  template <class F>
  void for_each_part(const F& f, int64_t begin = 0, int64_t end = -1) const {
    at::parallel_for(begin, end < 0 ? rows : end, 64, f);
  }
  at::Tensor units(int64_t begin, int64_t end) const {
    const at::Tensor all = at::empty({end - begin, d}, tensor.options());
    auto* out = static_cast<Element*>(all.mutable_data_ptr());
    for_each_part(
        [&](int64_t first, int64_t last) { write_units(first, last - first, 0, d, out + (first - begin) * d); }, begin,
        end);
    return all;
  }
  void write_units(int64_t row, int64_t count, int64_t col, int64_t cols, Element* out) const {
    if constexpr (!kIsPair<E>)
      for (int64_t i = row; i < row + count; ++i, out += cols) {
        const T inverse = inverse_of(norm(i));
        const Element* in = elements + i * d + col;
        for (int64_t j = 0; j < cols; ++j) out[j] = in[j] * inverse;
      }
  }
};

}  // namespace fc
