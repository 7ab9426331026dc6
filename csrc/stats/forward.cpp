#include "stats/forward.h"

#include <ATen/ATen.h>

#include <tuple>
#include <vector>

#include "common/memory.h"
#include "stats/groups.h"
#include "stats/stats.h"

namespace fc {
namespace {

// Returns a statistic (n,) and its ranks (n, 2) side by side, (n, 3), or the statistic itself if there are no ranks.
at::Tensor beside(const at::Tensor& statistic, const at::Tensor& ranks) {
  if (!ranks.defined()) return statistic;
  const at::Tensor both = at::empty({statistic.numel(), 3}, at::kDouble);
  const double *value = statistic.const_data_ptr<double>(), *rank = ranks.const_data_ptr<double>();
  double* out = both.mutable_data_ptr<double>();
  for (int64_t i = 0; i < statistic.numel(); ++i)
    out[3 * i] = value[i], out[3 * i + 1] = rank[2 * i], out[3 * i + 2] = rank[2 * i + 1];
  return both;
}

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
  const at::Tensor col = problem.upper ? at::empty({0}, at::kDouble) : stats.col_value(problem);
  return {stats.pos.to(at::kDouble), beside(stats.row_value(problem), ranks.row), beside(col, ranks.col), kept};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> grouped(const StatsProblem& p, const Interrupt& interrupt) {
  check(p);
  const std::vector<Group> groups = groups_of(p);
  const int64_t m = p.x.size(0), n = p.y.size(0), parts = p.teacher || is_ranked(p) ? 3 : has_related(p) ? 2 : 1;
  const auto statistic = [parts](int64_t size) {
    return at::empty(parts > 1 ? at::DimVector{size, parts} : at::DimVector{size}, at::kDouble);
  };
  const at::Tensor pos = at::empty({p.paired ? m : 0}, at::kDouble);
  const at::Tensor row = statistic(p.want_row ? m : 0), col = statistic(p.want_col ? n : 0);
  for_each_group(groups, interrupt, [&](int64_t k, const Interrupt& at_times) {
    const auto [of_pos, of_row, of_col, unused] = stats_forward(part(p, groups[k]), at_times);
    if (p.paired) part(pos, groups[k].rows).copy_(of_pos);
    if (p.want_row) part(row, groups[k].rows).copy_(of_row);
    if (p.want_col) part(col, groups[k].cols).copy_(of_col);
  });
  const auto dtype = p.x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return {pos, row, col, at::empty({0, n}, dtype)};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> stats_forward(const StatsProblem& problem,
                                                                         const Interrupt& interrupt) {
  if (problem.row_lengths) return grouped(problem, interrupt);
  return with_elements(problem, [&](auto element) { return forward<decltype(element)>(problem, interrupt); });
}

}  // namespace fc
