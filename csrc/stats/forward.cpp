// Statistics in one pass over S: each tile's products are swept where they were multiplied, 1 product in all.
#include <ATen/ATen.h>

#include <tuple>

#include "common/memory.h"
#include "stats/panels.h"
#include "stats/prepared.h"
#include "stats/stats.h"
#include "kernels/tile_kernels.h"
#include "stats/tiling.h"
#include "stats/running_stats.h"

namespace fc {
namespace {

template <class E>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward(const Problem& problem, const Interrupt& interrupt) {
  using T = typename Accumulator<E>::Type;
  const Prepared<E> p(problem);
  const int64_t m = p.x.rows, n = p.y.rows;
  at::Tensor pos = at::empty({m}, p.options());
  at::Tensor kept = reused_matrix(problem.kept_rows, n, p.options());
  Totals<T> row(problem.rows, m, !problem.softplus), col(problem.cols, n, true);
  const Walk walk(m, n, kGroupCols<E>, problem.kept_rows, problem.upper);
  const TileScratch<T> scratch(walk, p.options());
  T *pos_data = pos.mutable_data_ptr<T>(), *kept_data = kept.mutable_data_ptr<T>();

  at::Tensor room;
  const Rows<E> x = p.x.read_rows(0, m, room);
  Panels<E> y;
  for (const Range& group : walk.groups()) {
    y.set_transposed(p.y, group.begin, group.end);
    for (const Section& s : walk.sections(group)) {
      row.start(walk.strips(s), s.rows.size());
      col.start(walk.stories(s), s.cols.size());
      walk.for_each_tile(
          s,
          [&](const Place& at, int64_t story, int64_t strip) {
            const int64_t r = at.row - s.rows.begin, c = at.col - s.cols.begin;
            T* tile = s.kept ? kept_data + kept_offset(at, n) : scratch.get();
            const int64_t stride = s.kept ? at.cols : kTileCols;
            multiply_tile(x, y, at, c, tile, stride);
            kernels<T>().forward(p.rule, {at, tile, stride, pos_data, row.part_max(strip, r), row.part_sum(strip, r),
                                          col.part_max(story, c), col.part_sum(story, c)});
          },
          [&](const Place& at, int64_t story, int64_t strip) {
            row.skip(strip, at.row - s.rows.begin, at.rows);
            col.skip(story, at.col - s.cols.begin, at.cols);
          });
      row.merge(s.rows.begin);
      col.merge(s.cols.begin);
      interrupt();
    }
  }
  return {pos.to(at::kDouble), row.value(), col.value(), kept};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> stats_forward(const Problem& problem,
                                                                         const Interrupt& interrupt) {
  return with_elements(problem, [&](auto element) { return forward<decltype(element)>(problem, interrupt); });
}

}  // namespace fc
