#include "stats/forward.h"

#include <ATen/ATen.h>

#include <tuple>

#include "common/memory.h"
#include "stats/stats.h"

namespace fc {
namespace {

template <class E>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward(const StatsProblem& problem,
                                                                   const Interrupt& interrupt) {
  using T = SumType<E>;
  const Prepared<E> p(problem);
  const int64_t n = p.y.rows;
  const at::Tensor kept = reused_matrix(problem.kept_rows, n, p.options());
  Statistics<T> stats(problem, p.options());
  const Tiling tiling(p.x.rows, n, kPackedCols<E>, problem.kept_rows, problem.upper);
  forward_pass<E>(problem, p, tiling, stats, kept.mutable_data_ptr<T>(), interrupt);
  const Ranks ranks = stats.ranks(problem);
  const auto with = [](const at::Tensor& value, const at::Tensor& ranks) {
    return ranks.defined() ? at::cat({value.unsqueeze(1), ranks}, 1) : value;
  };
  const at::Tensor col = problem.upper ? at::empty({0}, at::kDouble) : stats.col_value(problem);
  return {stats.pos.to(at::kDouble), with(stats.row_value(problem), ranks.row), with(col, ranks.col), kept};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> stats_forward(const StatsProblem& problem,
                                                                         const Interrupt& interrupt) {
  return with_elements(problem, [&](auto element) { return forward<decltype(element)>(problem, interrupt); });
}

}  // namespace fc
