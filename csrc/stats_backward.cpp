// Gradients by a second walk over S. A section at a time, first each tile of S becomes the gradient G of its logits, by
// products that were kept or are computed again; then dx and dy gain G's products with y and x. 2 or 3 products in all.
#include <ATen/ATen.h>

#include <vector>

#include "gradients.h"
#include "panels.h"
#include "prepared.h"
#include "stats.h"
#include "tile.h"
#include "tiles.h"
#include "totals.h"

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
  OptionalTensor pos_grad, row_grad, col_grad;
  if (g_pos) pos_grad = contiguous_as(*g_pos, dtype);
  if (g_row) row_grad = contiguous_as(*g_row, dtype);
  if (g_col) col_grad = contiguous_as(*g_col, dtype);
  const Normaliser<T> row_norm(g_row && !problem.softplus ? row : at::empty({0}, at::kDouble));
  const Normaliser<T> col_norm(g_col ? col : at::empty({0}, at::kDouble));

  const Walk walk(p.x.rows, n, kGroupCols<E>, problem.kept_rows, problem.upper);
  FeatureGradients<E> gradients(p, needs, joint);
  at::Tensor room;
  const Rows<E> x = p.x.read_rows(0, p.x.rows, room);
  Panels<E> y_transposed;
  const T* kept_data = problem.kept_rows ? kept.const_data_ptr<T>() : nullptr;
  if (g_row || g_col) gradients.round_groups(pos_grad, problem.y.scalar_type());
  for (const Range& group : g_row || g_col ? walk.groups() : std::vector<Range>()) {
    if (problem.kept_rows < p.x.rows) y_transposed.set_transposed(p.y, group.begin, group.end);
    gradients.start_group(group);
    for (const Section& s : walk.sections(group)) {
      gradients.add(walk, s, [&](const Place& at, T* tile, int64_t stride) {
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
