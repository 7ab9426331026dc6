#include "stats/backward.h"

#include <ATen/ATen.h>

#include "stats/stats.h"

namespace fc {
namespace {

template <class E>
Gradients backward(const StatsProblem& problem, const Saved& saved, const Upstream& upstream, const Needs& needs,
                   const Interrupt& interrupt) {
  using T = SumType<E>;
  constexpr auto dtype = Prepared<E>::scalar_type();
  const Prepared<E> p(problem);
  const int64_t m = p.x.rows, n = p.y.rows;
  TORCH_CHECK_VALUE(!needs.joint || (n == m && !needs.of[3]), "joint: expected y to be x, without a bias");
  const auto gradient = [](const char* name, const OptionalTensor& g, int64_t size) {
    if (g) check_sizes(name, *g, {size});
    return readable(name, g, dtype);
  };
  const auto direction = [&](const char* name, const at::Tensor& value, const char* g_name, const OptionalTensor& g,
                             int64_t size) {
    const int64_t length = g && !problem.softplus ? size : 0;
    if (length) check_sizes(name, value, {length});
    return Direction<T>{Normaliser<T>(length ? readable(name, value, at::kDouble) : at::empty({0}, at::kDouble)),
                        gradient(g_name, g, size)};
  };
  const Direction<T> row = direction("row", saved.row, "g_row", upstream.row, m);
  // The lower triangle's rows are the upper one's columns.
  const Direction<T> col = problem.upper ? row : direction("col", saved.col, "g_col", upstream.col, n);
  at::Tensor products;
  if (problem.kept_rows) {
    check_sizes("kept", saved.kept, {problem.kept_rows, n});
    check_dtype("kept", saved.kept, dtype);
    products = readable("kept", saved.kept, dtype);
  }
  const Tiling tiling(m, n, kPackedCols<E>, problem.kept_rows, problem.upper);
  return backward_pass<E>(p, tiling, problem.kept_rows ? products.const_data_ptr<T>() : nullptr, problem.kept_rows,
                          gradient("g_pos", upstream.pos, m), row, col, needs, problem.x.scalar_type(),
                          problem.y.scalar_type(), interrupt);
}

}  // namespace

Gradients stats_backward(const StatsProblem& problem, const Saved& saved, const Upstream& upstream, const Needs& needs,
                         const Interrupt& interrupt) {
  return with_elements(
      problem, [&](auto element) { return backward<decltype(element)>(problem, saved, upstream, needs, interrupt); });
}

}  // namespace fc
