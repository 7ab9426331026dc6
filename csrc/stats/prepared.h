// A problem as the kernels read it: contiguous features in the dtype of the products, and the rule that turns products
// into logits.
#pragma once
#include <ATen/ATen.h>

#include <tuple>
#include <utility>

#include "common/input.h"
#include "kernels/product_kernels.h"
#include "kernels/tile_kernels.h"
#include "stats/features.h"
#include "stats/stats.h"

namespace fc {

// How many ids a row or column has.
inline int64_t ids_of(const at::Tensor& ids) {
  return ids.dim() == 2 ? ids.size(1) : 1;
}

// Raises a TypeError or ValueError unless sizes and dtypes fit together, so that no kernel reads past a tensor's end.
inline void check(const StatsProblem& p) {
  for (const auto& [name, t] : {std::pair("x", &p.x), std::pair("y", &p.y)}) {
    TORCH_CHECK_VALUE(t->dim() == 2 && t->size(1) == p.x.size(1), name, ": got shape ", t->sizes(), ", expected ",
                      "(rows, D), the same D for both");
    TORCH_CHECK_TYPE(at::isFloatingType(t->scalar_type()), name, ": got dtype ", t->scalar_type(),
                     ", expected a floating dtype");
  }
  check_dtype("y", p.y, p.x.scalar_type());
  const int64_t m = p.x.size(0), n = p.y.size(0);
  TORCH_CHECK_VALUE(p.scale.numel() == 1, "scale: got shape ", p.scale.sizes(), ", expected one element");
  TORCH_CHECK_VALUE(p.softplus || p.upper ? p.want_row && !p.want_col : p.want_row || p.want_col,
                    "want_row, want_col: expected at least one, for softplus and upper want_row alone");
  TORCH_CHECK_VALUE(!p.upper || m == n, "upper: got M = ", m, " and N = ", n, ", expected M = N");
  TORCH_CHECK_VALUE(p.targets || m <= n || !p.paired, "targets: got None for M = ", m, " rows and N = ", n,
                    " columns, expected targets where M > N");
  TORCH_CHECK_VALUE(p.kept_rows >= 0 && p.kept_rows <= m, "kept_rows: got ", p.kept_rows, ", expected 0 to ", m);
  TORCH_CHECK_VALUE(p.row_ids.has_value() == p.col_ids.has_value(), "row_ids, col_ids: expected both or neither");
  if (p.targets) check_sizes("targets", *p.targets, {m});
  if (p.col_bias && p.col_bias->dim()) check_sizes("col_bias", *p.col_bias, {n});
  for (const auto& [name, t, size] : {std::tuple("row_ids", &p.row_ids, m), std::tuple("col_ids", &p.col_ids, n)}) {
    if (!*t) continue;
    const int64_t ids = ids_of(**t);
    TORCH_CHECK_VALUE((*t)->dim() <= 2 && ids >= 1 && ids <= kMostIds && ids == ids_of(*p.row_ids), name,
                      ": got shape ", (*t)->sizes(), ", expected one id a row and column, or the same number, up to ",
                      kMostIds);
    check_sizes(name, (*t)->dim() == 2 ? (*t)->select(1, 0) : **t, {size});
    check_dtype(name, **t, at::kLong);
  }
  if (p.row_limit) check_sizes("row_limit", *p.row_limit, {m});
  if (p.col_limit) check_sizes("col_limit", *p.col_limit, {n});
  if (p.row_reference) check_sizes("row_reference", *p.row_reference, {m});
  if (p.col_reference) check_sizes("col_reference", *p.col_reference, {n});
  TORCH_CHECK_VALUE(p.row_guide.has_value() == p.col_guide.has_value(),
                    "row_guide, col_guide: expected both or neither");
  if (p.row_guide) {
    check_sizes("row_guide", *p.row_guide, {m, p.row_guide->size(-1)});
    check_sizes("col_guide", *p.col_guide, {n, p.row_guide->size(-1)});
  }
  TORCH_CHECK_VALUE(!has_related(p) || (p.row_ids && !p.upper), "equal_ids: expected ids, and no upper");
  TORCH_CHECK_VALUE(!p.teacher || (p.row_guide && !p.paired && !p.row_ids && !p.row_limit && !p.col_limit && !p.upper),
                    "statistic: expected for a teacher a guide, no positives, ids, limits or upper");
  TORCH_CHECK_VALUE(!is_ranked(p) || (!has_related(p) && !p.teacher && (p.row_reference || !p.want_row) &&
                                      (p.col_reference || !(p.want_col || p.upper))),
                    "row_reference, col_reference: expected one for each direction, and no teacher or statistics of "
                    "related pairs");
  TORCH_CHECK_VALUE(p.equal_ids != EqualIds::kAdd || !p.softplus, "equal_ids: expected another for softplus");
  TORCH_CHECK_VALUE((!p.row_limit && !p.col_limit) || (!has_related(p) && !p.upper && !p.softplus),
                    "row_limit, col_limit: expected None with upper, softplus or statistics of related pairs");
}

// Checks a problem and calls f(E{}) for the E that its products are made of. bfloat16 features are multiplied as they
// are where the CPU can and D is even, since an odd D would leave half a pair. Otherwise they are multiplied in
// float32, as float16 ones are.
template <class F>
auto with_elements(const StatsProblem& problem, const F& f) {
  check(problem);
  const at::ScalarType dtype = problem.x.scalar_type();
  if (dtype == at::kDouble) return f(double{});
  const bool pairs = dtype == at::kBFloat16 && problem.y.scalar_type() == dtype && problem.x.size(1) % 2 == 0 &&
                     product_kernels<Bf16Pair>().multiply;
  return pairs ? f(Bf16Pair{}) : f(float{});
}

template <class E, class T = SumType<E>>
struct Prepared {
  Features<E> x, y;
  OptionalTensor targets, col_bias, row_limit, col_limit, row_reference, col_reference;
  OptionalTensor row_codes, col_codes;  // (ids, M), (ids, N): ids as dense codes that fit a 32-bit lane
  bool one_bias = false;                // all columns share one bias, and its gradient is one number
  LogitRule<T> rule{};

  explicit Prepared(const StatsProblem& p, bool unit = false) : x("x", p.x, unit), y("y", p.y, unit) {
    if (p.targets) targets = indices("targets", *p.targets, y.rows);
    col_bias = readable("col_bias", p.col_bias, scalar_type());
    one_bias = col_bias && col_bias->dim() == 0;
    if (one_bias) col_bias = col_bias->expand({y.rows}).contiguous();
    row_limit = readable("row_limit", p.row_limit, scalar_type());
    col_limit = readable("col_limit", p.col_limit, scalar_type());
    row_reference = readable("row_reference", p.row_reference, scalar_type());
    col_reference = readable("col_reference", p.col_reference, scalar_type());
    if (p.row_ids) encode_ids(*p.row_ids, *p.col_ids);
    rule = {readable("scale", p.scale, scalar_type()).template item<T>(),
            data<T>(col_bias),
            data<int64_t>(targets),
            data<int32_t>(row_codes),
            data<int32_t>(col_codes),
            p.row_ids ? ids_of(*p.row_ids) : 0,
            x.rows,
            y.rows,
            data<T>(row_limit),
            data<T>(col_limit),
            data<T>(row_reference),
            data<T>(col_reference),
            p.equal_ids,
            p.paired,
            p.exclude_self,
            p.upper,
            p.softplus,
            p.teacher};
  }

  static constexpr at::ScalarType scalar_type() { return c10::CppTypeToScalarType<T>::value; }
  at::TensorOptions options() const { return x.tensor.options().dtype(scalar_type()); }

 private:
  // A column's code is the rank of its id among the columns' ids. A row has the code of the columns with its id, or -1.
  void encode_ids(const at::Tensor& row_ids, const at::Tensor& col_ids) {
    const int64_t ids = ids_of(row_ids);
    const at::TensorOptions codes = at::TensorOptions(at::kInt);
    row_codes = at::empty({ids, x.rows}, codes), col_codes = at::empty({ids, y.rows}, codes);
    for (int64_t k = 0; k < ids; ++k) {
      const auto column = [&](const char* name, const at::Tensor& t) {
        return readable(name, t.dim() == 2 ? t.select(1, k) : t, at::kLong);
      };
      const at::Tensor of_rows = column("row_ids", row_ids), of_cols = column("col_ids", col_ids);
      const at::Tensor sorted = std::get<0>(at::sort(of_cols));
      col_codes->select(0, k).copy_(at::searchsorted(sorted, of_cols, /*out_int32=*/true));
      if (y.rows == 0) continue;
      const at::Tensor rank = at::searchsorted(sorted, of_rows).clamp_max(y.rows - 1);
      const at::Tensor found = sorted.index_select(0, rank) == of_rows;
      row_codes->select(0, k).copy_(at::where(found, rank, at::scalar_tensor(-1, rank.options())));
    }
  }
};

}  // namespace fc
