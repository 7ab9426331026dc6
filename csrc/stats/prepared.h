// A problem as the kernels read it: contiguous features in the dtypes of products and of statistics, and the rule that
// makes logits of products.
#pragma once
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/input.h"
#include "kernels/product_kernels.h"
#include "stats/stats.h"
#include "kernels/tile_kernels.h"
#include "stats/unit_rows.h"

namespace fc {

// Rows [begin, end) of t; t itself where that is all of it, which spares small problems a view.
inline at::Tensor rows_of(const at::Tensor& t, int64_t begin, int64_t end) {
  return end - begin == t.size(0) ? t : t.slice(0, begin, end);
}

// Some rows of features in elements of E; `row(i)` counts from the features' first.
template <class E>
struct Rows {
  const typename Stored<E>::Type* elements;  // of row `begin`
  int64_t begin, d;
  const E* row(int64_t i) const { return reinterpret_cast<const E*>(elements + (i - begin) * d); }
};

// Features (rows, D) as products of E read them: as they are or, `unit`, each divided by its length. Unit features are
// made, a part at a time, where they are read: the whole of them would be a copy to hold.
template <class E>
struct Features {
  using Element = typename Stored<E>::Type;
  using T = typename Accumulator<E>::Type;
  static constexpr bool kPairs = std::is_same_v<E, Bf16Pair>;
  at::Tensor tensor, norms;  // (rows, D); (rows,) undefined unless unit
  const Element* elements;
  int64_t rows, d;  // d in elements

  Features(const char* name, const at::Tensor& t, bool unit) : rows(t.size(0)), d(t.size(1)) {
    constexpr auto dtype = c10::CppTypeToScalarType<T>::value;
    tensor = readable(name, t, kPairs ? at::kBFloat16 : dtype);
    elements = static_cast<const Element*>(tensor.const_data_ptr());
    if constexpr (!kPairs)
      if (unit) {
        norms = at::empty({rows}, tensor.options());
        T* norm = norms.template mutable_data_ptr<T>();
        for_each_part([&](int64_t begin, int64_t end) {
          std::vector<T> room(d);
          for (int64_t i = begin; i < end; ++i) norm[i] = copy_and_norm(elements + i * d, room.data(), d);
        });
      }
  }
  bool unit() const { return norms.defined(); }
  T norm(int64_t i) const { return norms.template const_data_ptr<T>()[i]; }
  int64_t row_stride() const { return d / Stored<E>::rows; }  // in E, and the length of a row

  // Where to read columns [col, col + cols) of rows [row, row + count), and how far apart the rows are. Unit features
  // are written to `room`.
  std::pair<const Element*, int64_t> read(int64_t row, int64_t count, int64_t col, int64_t cols,
                                          std::vector<Element>& room) const {
    if (!unit()) return {elements + row * d + col, d};
    room.resize(count * cols);
    write_units(row, count, col, cols, room.data());
    return {room.data(), cols};
  }
  // Rows [begin, end); of unit features in `room`.
  Rows<E> read_rows(int64_t begin, int64_t end, at::Tensor& room) const {
    if (!unit()) return {elements, 0, d};
    room = units(begin, end);
    return {static_cast<const Element*>(room.const_data_ptr()), begin, d};
  }
  at::Tensor as_tensor(int64_t begin, int64_t end) const {
    return unit() ? units(begin, end) : rows_of(tensor, begin, end);
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
    if constexpr (!kPairs)
      for (int64_t i = row; i < row + count; ++i, out += cols) {
        const T inverse = inverse_of(norm(i));
        const Element* in = elements + i * d + col;
        for (int64_t j = 0; j < cols; ++j) out[j] = in[j] * inverse;
      }
  }
};

// Raises a TypeError or ValueError unless sizes and dtypes fit together, so that no kernel reads past a tensor's end.
inline void check(const Problem& p) {
  for (const auto& [name, t] : {std::pair("x", &p.x), std::pair("y", &p.y)}) {
    TORCH_CHECK_VALUE(t->dim() == 2 && t->size(1) == p.x.size(1), name, ": got shape ", t->sizes(), ", expected ",
                      "(rows, D), the same D for both");
    TORCH_CHECK_TYPE(at::isFloatingType(t->scalar_type()), name, ": got dtype ", t->scalar_type());
  }
  check_dtype("y", p.y, p.x.scalar_type());
  const int64_t m = p.x.size(0), n = p.y.size(0);
  TORCH_CHECK_VALUE(p.scale.numel() == 1, "scale: got shape ", p.scale.sizes(), ", expected one element");
  TORCH_CHECK_VALUE(p.softplus || p.upper ? p.want_row && !p.want_col : p.want_row || p.want_col,
                    "want_row, want_col: expected a direction, for softplus and upper rows alone");
  TORCH_CHECK_VALUE(!p.upper || m == n, "upper: got M = ", m, " and N = ", n, ", expected as many");
  TORCH_CHECK_VALUE(p.targets || m <= n, "targets: got None for M = ", m, " rows and N = ", n, " columns");
  TORCH_CHECK_VALUE(p.kept_rows >= 0 && p.kept_rows <= m, "kept_rows: got ", p.kept_rows, ", expected 0 to ", m);
  TORCH_CHECK_VALUE(p.row_ids.has_value() == p.col_ids.has_value(), "row_ids, col_ids: expected both or neither");
  if (p.targets) check_sizes("targets", *p.targets, {m});
  if (p.col_bias && p.col_bias->dim()) check_sizes("col_bias", *p.col_bias, {n});
  for (const auto& [name, t, size] : {std::tuple("row_ids", &p.row_ids, m), std::tuple("col_ids", &p.col_ids, n)}) {
    if (!*t) continue;
    check_sizes(name, **t, {size});
    check_dtype(name, **t, at::kLong);
  }
}

// Calls f(E{}) for the E that the features' products are made of, of a problem that is checked. bfloat16 features are
// multiplied as they are where the CPU can (an odd D would leave half a pair), and otherwise in float32, as float16
// ones are.
template <class F>
auto with_elements(const Problem& problem, const F& f) {
  check(problem);
  const at::ScalarType dtype = problem.x.scalar_type();
  if (dtype == at::kDouble) return f(double{});
  const bool pairs = dtype == at::kBFloat16 && problem.y.scalar_type() == dtype && problem.x.size(1) % 2 == 0 &&
                     products<Bf16Pair>().multiply;
  return pairs ? f(Bf16Pair{}) : f(float{});
}

// T: dtype of the statistics.
template <class E, class T = typename Accumulator<E>::Type>
struct Prepared {
  Features<E> x, y;
  OptionalTensor targets, col_bias, row_codes, col_codes;  // ids as dense codes that fit a 32-bit lane
  bool one_bias = false;                                   // all columns share one: its gradient is one number
  LogitRule<T> rule{};

  explicit Prepared(const Problem& p, bool unit = false) : x("x", p.x, unit), y("y", p.y, unit) {
    if (p.targets) targets = indices("targets", *p.targets, y.rows);
    col_bias = readable("col_bias", p.col_bias, scalar_type());
    one_bias = col_bias && col_bias->dim() == 0;
    if (one_bias) col_bias = col_bias->expand({y.rows}).contiguous();
    if (p.row_ids) encode_ids(readable("row_ids", *p.row_ids, at::kLong), readable("col_ids", *p.col_ids, at::kLong));
    rule = {readable("scale", p.scale, scalar_type()).template item<T>(),
            data<T>(col_bias),
            data<int64_t>(targets),
            data<int32_t>(row_codes),
            data<int32_t>(col_codes),
            p.equal_ids,
            p.exclude_self,
            p.upper,
            p.softplus};
  }

  static constexpr at::ScalarType scalar_type() { return c10::CppTypeToScalarType<T>::value; }
  at::TensorOptions options() const { return x.tensor.options().dtype(scalar_type()); }

 private:
  // A column's code is the rank of its id among the columns' ids; a row's is that of the equal column id, or -1.
  void encode_ids(const at::Tensor& row_ids, const at::Tensor& col_ids) {
    const at::Tensor sorted = std::get<0>(at::sort(col_ids));
    col_codes = at::searchsorted(sorted, col_ids, /*out_int32=*/true);
    const at::Tensor rank = at::searchsorted(sorted, row_ids).clamp_max(col_ids.size(0) - 1);
    const at::Tensor found = sorted.index_select(0, rank) == row_ids;
    row_codes = at::where(found, rank, at::scalar_tensor(-1, rank.options())).to(at::kInt);
  }
};

}  // namespace fc
