// Gradients by a second walk over S. A section at a time, first each tile of S becomes the gradient G of its logits, by
// products that were kept or are computed again; then dx and dy gain G's products with y and x. 2 or 3 products in all.
#include <ATen/ATen.h>

#include <vector>

#include "stats/feature_gradients.h"
#include "stats/panels.h"
#include "stats/prepared.h"
#include "stats/stats.h"
#include "kernels/tile_kernels.h"
#include "stats/tiling.h"
#include "stats/running_stats.h"

namespace fc {
namespace {

template <class E>
std::array<at::Tensor, 4> backward(const Problem& problem, const at::Tensor& row, const at::Tensor& col,
                                   const at::Tensor& kept, const OptionalTensor& g_pos, const OptionalTensor& g_row,
                                   const OptionalTensor& g_col, std::array<bool, 4> needs, bool joint,
                                   const Interrupt& interrupt) {
  using T = typename Accumulator<E>::Type;
  constexpr auto dtype = Prepared<E>::scalar_type();
  const Prepared<E> p(problem);
  const int64_t n = p.y.rows;
  TORCH_CHECK_VALUE(!joint || (n == p.x.rows && !g_pos && !needs[3]), "joint: expected y to be x, without positives");
  const auto gradient = [](const char* name, const OptionalTensor& g, int64_t size) {
    if (g) check_sizes(name, *g, {size});
    return readable(name, g, dtype);
  };
  const OptionalTensor pos_grad = gradient("g_pos", g_pos, p.x.rows), row_grad = gradient("g_row", g_row, p.x.rows);
  const OptionalTensor col_grad = gradient("g_col", g_col, n);
  const auto normaliser = [](const char* name, const at::Tensor& value, int64_t size) {
    if (size) check_sizes(name, value, {size});
    return Normaliser<T>(size ? readable(name, value, at::kDouble) : at::empty({0}, at::kDouble));
  };
  const Normaliser<T> row_norm = normaliser("row", row, g_row && !problem.softplus ? p.x.rows : 0);
  const Normaliser<T> col_norm = normaliser("col", col, g_col ? n : 0);
  at::Tensor products;
  if (problem.kept_rows) {
    check_sizes("kept", kept, {problem.kept_rows, n});
    check_dtype("kept", kept, dtype);
    products = readable("kept", kept, dtype);
  }

  const Walk walk(p.x.rows, n, kGroupCols<E>, problem.kept_rows, problem.upper);
  FeatureGradients<E> gradients(p, walk, needs, joint);
  at::Tensor room;
  const Rows<E> x = p.x.read_rows(0, p.x.rows, room);
  Panels<E> y_transposed;
  const T* kept_data = problem.kept_rows ? products.const_data_ptr<T>() : nullptr;
  if (g_row || g_col) gradients.round_groups(pos_grad, problem.y.scalar_type());
  for (const Range& group : g_row || g_col ? walk.groups() : std::vector<Range>()) {
    if (problem.kept_rows < p.x.rows) y_transposed.set_transposed(p.y, group.begin, group.end);
    gradients.start_group(group);
    for (const Section& s : walk.sections(group)) {
      gradients.add(s, [&](const Place& at, T* tile, int64_t stride) {
        if (!s.kept) multiply_tile(x, y_transposed, at, at.col - group.begin, tile, stride);
        kernels<T>().backward(
            p.rule, {at, s.kept ? kept_data + kept_offset(at, n) : tile, s.kept ? at.cols : stride, tile, stride,
                     g_row ? row_norm.high.data() : nullptr, row_norm.low.data(), data<T>(row_grad),
                     g_col ? col_norm.high.data() : nullptr, col_norm.low.data(), data<T>(col_grad)});
      });
      interrupt();
    }
    gradients.end_group();
  }
  return gradients.finish(pos_grad, problem.x.scalar_type(), problem.y.scalar_type());
}

}  // namespace

std::array<at::Tensor, 4> stats_backward(const Problem& problem, const at::Tensor& row, const at::Tensor& col,
                                         const at::Tensor& kept, const OptionalTensor& g_pos,
                                         const OptionalTensor& g_row, const OptionalTensor& g_col,
                                         std::array<bool, 4> needs, bool joint, const Interrupt& interrupt) {
  return with_elements(problem, [&](auto element) {
    return backward<decltype(element)>(problem, row, col, kept, g_pos, g_row, g_col, needs, joint, interrupt);
  });
}

}  // namespace fc
