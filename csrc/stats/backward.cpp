#include "stats/backward.h"

#include <ATen/ATen.h>

#include <vector>

#include "stats/groups.h"
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
  const int64_t parts = problem.teacher ? 3 : has_related(problem) ? 2 : 1;
  // A statistic over the pairs that are not related (part 0), or over those that are or by the teacher (part 1).
  const auto direction = [&](const char* name, const at::Tensor& value, const char* g_name, const OptionalTensor& g,
                             int64_t size, int64_t part) {
    const int64_t length = g && !problem.softplus ? size : 0;
    if (!g || part >= parts) return Direction<T>{Normaliser<T>(0), std::nullopt};
    const auto select = [&](const char* of, const at::Tensor& t, int64_t column) {
      if (parts > 1) check_sizes(of, t, {size, parts});
      return parts > 1 ? t.select(1, column) : t;
    };
    const int64_t normaliser = part && problem.teacher ? 2 : part;
    if (length) check_sizes(name, select(name, value, normaliser), {length});
    return Direction<T>{Normaliser<T>(length ? readable(name, select(name, value, normaliser), at::kDouble)
                                             : at::empty({0}, at::kDouble)),
                        gradient(g_name, select(g_name, *g, part), size)};
  };
  const auto rows = [&](int64_t part) { return direction("row", saved.row, "g_row", upstream.row, m, part); };
  const auto cols = [&](int64_t part) { return direction("col", saved.col, "g_col", upstream.col, n, part); };
  // The lower triangle's rows are the upper one's columns.
  const Directions<T> directions{rows(0), problem.upper ? rows(0) : cols(0), rows(1), cols(1)};
  at::Tensor products;
  if (problem.kept_rows) {
    check_sizes("kept", saved.kept, {problem.kept_rows, n});
    check_dtype("kept", saved.kept, dtype);
    products = readable("kept", saved.kept, dtype);
  }
  const Tiling tiling(m, n, kPackedCols<E>, problem.kept_rows, problem.upper);
  return backward_pass<E>(problem, p, tiling, problem.kept_rows ? products.const_data_ptr<T>() : nullptr,
                          problem.kept_rows, problem.paired ? gradient("g_pos", upstream.pos, m) : std::nullopt,
                          directions, needs, problem.x.scalar_type(), problem.y.scalar_type(), interrupt);
}

Gradients grouped(const StatsProblem& p, const Saved& saved, const Upstream& upstream, const Needs& needs,
                  const Interrupt& interrupt) {
  check(p);
  const int64_t m = p.x.size(0), n = p.y.size(0);
  const auto check_length = [](const char* name, const at::Tensor& t, int64_t size) {
    TORCH_CHECK_VALUE(t.dim() && t.size(0) == size, name, ": got shape ", t.sizes(), ", expected ", size, " rows");
  };
  if (upstream.pos) check_length("g_pos", *upstream.pos, m);
  if (upstream.row) check_length("g_row", *upstream.row, m), check_length("row", saved.row, m);
  if (upstream.col) check_length("g_col", *upstream.col, n), check_length("col", saved.col, n);
  const std::vector<Group> groups = groups_of(p);
  const auto dtype = p.x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  GroupedGradients all(p, needs, static_cast<int64_t>(groups.size()), p.x.scalar_type(), p.y.scalar_type(), dtype);
  for_each_group(groups, interrupt, [&](int64_t k, const Interrupt& at_times) {
    const auto& [rows, cols] = groups[k];
    const Saved own{upstream.row ? part(saved.row, rows) : saved.row, upstream.col ? part(saved.col, cols) : saved.col,
                    saved.kept};
    const Upstream arriving{part(upstream.pos, rows), part(upstream.row, rows), part(upstream.col, cols)};
    all.set(k, groups[k], stats_backward(part(p, groups[k]), own, arriving, all.needs(groups[k]), at_times));
  });
  return all.finish();
}

}  // namespace

Gradients stats_backward(const StatsProblem& problem, const Saved& saved, const Upstream& upstream, const Needs& needs,
                         const Interrupt& interrupt) {
  if (problem.row_lengths) return grouped(problem, saved, upstream, needs, interrupt);
  return with_elements(
      problem, [&](auto element) { return backward<decltype(element)>(problem, saved, upstream, needs, interrupt); });
}

}  // namespace fc
