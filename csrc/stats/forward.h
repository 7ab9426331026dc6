// The walk of a forward over S: each tile's products are swept where they were multiplied, 1 product in all.
#pragma once
#include <algorithm>
#include <vector>

#include "kernels/tile_kernels.h"
#include "stats/panels.h"
#include "stats/prepared.h"
#include "stats/running_stats.h"
#include "stats/stats.h"
#include "stats/tiling.h"

namespace fc {

// Statistics of a problem: logits of the positives, (M,), and log-sum-exps or sums of both directions.
template <class T>
struct Statistics {
  at::Tensor pos;
  Totals<T> row, col;

  Statistics(const Problem& problem, const at::TensorOptions& options)
      : pos(at::empty({problem.x.size(0)}, options)),
        row(problem.want_row, problem.x.size(0), !problem.softplus),
        col(problem.want_col || problem.upper, problem.y.size(0), true) {}
  // (M,) in double. Of an upper triangle, whose columns are the lower one's rows, of both.
  at::Tensor row_value(const Problem& problem) const {
    const at::Tensor value = row.value();
    if (!problem.upper) return value;
    const at::Tensor of_cols = col.value();
    double* r = value.mutable_data_ptr<double>();
    const double* c = of_cols.const_data_ptr<double>();
    for (int64_t i = 0; i < value.numel(); ++i) r[i] = log_add(r[i], c[i]);
    return value;
  }

 private:
  static double log_add(double a, double b) {
    const double most = std::max(a, b), least = std::min(a, b);
    if (std::isnan(a) || std::isnan(b)) return a + b;
    return std::isinf(most) ? most : most + std::log1p(std::exp(least - most));
  }
};

// Fills `stats`, and `kept` with the products of the walk's kept rows.
template <class E, class T = typename Accumulator<E>::Type>
void forward_walk(const Problem& problem, const Prepared<E>& p, const Walk& walk, Statistics<T>& stats, T* kept,
                  const Interrupt& interrupt) {
  const int64_t n = p.y.rows;
  const TileScratch<T> scratch(walk, p.options());
  T* pos = stats.pos.template mutable_data_ptr<T>();
  at::Tensor units;
  const Rows<E> x = p.x.read_rows(0, p.x.rows, units);
  Panels<E> y;
  for (const Range& group : walk.groups()) {
    y.set_transposed(p.y, group.begin, group.end);
    for (const Section& s : walk.sections(group)) {
      stats.row.start(walk.strips(s), s.rows.size());
      stats.col.start(walk.stories(s), s.cols.size());
      walk.for_each_tile(
          s,
          [&](const Place& at, int64_t story, int64_t strip) {
            const int64_t r = at.row - s.rows.begin, c = at.col - s.cols.begin;
            T* tile = s.kept ? kept + kept_offset(at, n) : scratch.get();
            const int64_t stride = s.kept ? at.cols : kTileCols;
            multiply_tile(x, y, at, c, tile, stride);
            kernels<T>().forward(p.rule,
                                 {at, tile, stride, pos, stats.row.part_max(strip, r), stats.row.part_sum(strip, r),
                                  stats.col.part_max(story, c), stats.col.part_sum(story, c)});
          },
          [&](const Place& at, int64_t story, int64_t strip) {
            stats.row.skip(strip, at.row - s.rows.begin, at.rows);
            stats.col.skip(story, at.col - s.cols.begin, at.cols);
          });
      stats.row.merge(s.rows.begin);
      stats.col.merge(s.cols.begin);
      interrupt();
    }
  }
  if (problem.upper && p.targets)  // a positive below the diagonal is one above it, too: targets come in pairs
    for (int64_t i = 0; i < p.x.rows; ++i)
      if (p.rule.target(i) < i) pos[i] = pos[p.rule.target(i)];
}

}  // namespace fc
