// Computes the statistics in one pass over S, which takes one matrix product: each tile's products are reduced while
// they are in the cache of the thread that made them.
#pragma once
#include <algorithm>
#include <vector>

#include "kernels/tile_kernels.h"
#include "stats/panels.h"
#include "stats/prepared.h"
#include "stats/running_statistic.h"
#include "stats/stats.h"
#include "stats/tiling.h"

namespace fc {

// The statistics of a problem: `pos` (M,), the positives' logits, and the running statistics of both directions.
template <class T>
struct Statistics {
  at::Tensor pos;
  RunningStatistic<T> row, col;

  Statistics(const StatsProblem& problem, const at::TensorOptions& options)
      : pos(at::empty({problem.x.size(0)}, options)),
        row(problem.want_row, problem.x.size(0), !problem.softplus),
        col(problem.want_col || problem.upper, problem.y.size(0), true) {}
  // Returns the rows' statistic, (M,) in double. For an upper triangle it includes the columns' values, because these
  // are the rows of the lower triangle.
  at::Tensor row_value(const StatsProblem& problem) const {
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

// Fills `stats`, and `kept` with the products of the tiling's kept rows.
template <class E, class T = SumType<E>>
void forward_pass(const StatsProblem& problem, const Prepared<E>& p, const Tiling& tiling, Statistics<T>& stats,
                  T* kept, const Interrupt& interrupt) {
  const int64_t n = p.y.rows;
  const TileScratch<T> scratch(tiling, p.options());
  T* pos = stats.pos.template mutable_data_ptr<T>();
  at::Tensor units;
  const FeatureRows<E> x = p.x.read_rows(0, p.x.rows, units);
  Panels<E> y;
  for (const Range& group : tiling.column_groups()) {
    y.set_transposed(p.y, group.begin, group.end);
    for (const Section& s : tiling.sections(group)) {
      stats.row.start(tiling.tile_cols(s), s.rows.size());
      stats.col.start(tiling.tile_rows(s), s.cols.size());
      tiling.for_each_tile(
          s,
          [&](const TileBounds& at, int64_t tile_row, int64_t tile_col) {
            const int64_t r = at.row - s.rows.begin, c = at.col - s.cols.begin;
            T* tile = s.kept ? kept + kept_offset(at, n) : scratch.get();
            const int64_t stride = s.kept ? at.cols : kTileCols;
            multiply_tile(x, y, at, s.cols.begin, tile, stride);
            tile_kernels<T>().forward(
                p.rule, {at, tile, stride, pos, stats.row.part_max(tile_col, r), stats.row.part_sum(tile_col, r),
                         stats.col.part_max(tile_row, c), stats.col.part_sum(tile_row, c)});
          },
          [&](const TileBounds& at, int64_t tile_row, int64_t tile_col) {
            stats.row.skip(tile_col, at.row - s.rows.begin, at.rows);
            stats.col.skip(tile_row, at.col - s.cols.begin, at.cols);
          });
      stats.row.merge(s.rows.begin);
      stats.col.merge(s.cols.begin);
      interrupt();
    }
  }
  if (problem.upper && p.targets)  // targets come in pairs, t(t(i)) = i, and S is symmetric
    for (int64_t i = 0; i < p.x.rows; ++i)
      if (p.rule.target(i) < i) pos[i] = pos[p.rule.target(i)];
}

}  // namespace fc
