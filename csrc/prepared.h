// A problem as the kernels read it: contiguous features in the dtypes of products and of statistics, and the rule that
// makes logits of products.
#pragma once
#include <ATen/ATen.h>

#include <tuple>
#include <type_traits>

#include "product.h"
#include "stats.h"
#include "tile.h"

namespace fc {

// resolve_neg: a lazily negated tensor, such as z.conj().imag, holds the opposite of its values.
inline at::Tensor contiguous_as(const at::Tensor& t, at::ScalarType dtype) {
  return t.to(dtype).resolve_neg().contiguous();
}

template <class T>
const T* data(const OptionalTensor& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

// Rows [begin, end) of t; t itself where that is all of it, which spares small problems a view.
inline at::Tensor rows_of(const at::Tensor& t, int64_t begin, int64_t end) {
  return end - begin == t.size(0) ? t : t.slice(0, begin, end);
}

// Features (rows, D) as products of E read them.
template <class E>
struct Features {
  using Element = typename Stored<E>::Type;
  at::Tensor tensor;
  const Element* elements;
  int64_t rows, d;  // d in elements

  explicit Features(const at::Tensor& t) : rows(t.size(0)), d(t.size(1)) {
    constexpr bool kPairs = std::is_same_v<E, Bf16Pair>;
    constexpr auto dtype = kPairs ? at::kBFloat16 : c10::CppTypeToScalarType<typename Accumulator<E>::Type>::value;
    tensor = contiguous_as(t, dtype);
    elements = static_cast<const Element*>(tensor.const_data_ptr());
  }
  int64_t row_stride() const { return d / Stored<E>::rows; }  // in E, and the length of a row
  const E* row(int64_t i) const { return reinterpret_cast<const E*>(elements + i * d); }
};

// Calls f(E{}) for the E that the features' products are made of. bfloat16 features are multiplied as they are where
// the CPU can (an odd D would leave half a pair), and otherwise in float32, as float16 ones are.
template <class F>
auto with_elements(const Problem& problem, const F& f) {
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
  LogitRule<T> rule{};

  explicit Prepared(const Problem& p) : x(p.x), y(p.y) {
    if (p.targets) targets = p.targets->contiguous();
    if (p.col_bias) col_bias = contiguous_as(*p.col_bias, c10::CppTypeToScalarType<T>::value);
    if (p.row_ids) encode_ids(*p.row_ids, *p.col_ids);
    rule = {p.scale.item<T>(),
            data<T>(col_bias),
            data<int64_t>(targets),
            data<int32_t>(row_codes),
            data<int32_t>(col_codes),
            p.equal_ids,
            p.exclude_self,
            p.upper,
            p.softplus};
  }

  at::TensorOptions options() const { return x.tensor.options().dtype(c10::CppTypeToScalarType<T>::value); }

 private:
  // A column's code is the rank of its id among the columns' ids; a row's is that of the equal column id, or -1.
  void encode_ids(const at::Tensor& row_ids, const at::Tensor& col_ids) {
    const at::Tensor sorted = std::get<0>(at::sort(col_ids));
    col_codes = at::searchsorted(sorted, col_ids.contiguous(), /*out_int32=*/true);
    const at::Tensor rank = at::searchsorted(sorted, row_ids.contiguous()).clamp_max(col_ids.size(0) - 1);
    const at::Tensor found = sorted.index_select(0, rank) == row_ids;
    row_codes = at::where(found, rank, at::scalar_tensor(-1, rank.options())).to(at::kInt);
  }
};

}  // namespace fc
