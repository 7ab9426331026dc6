// Computes the statistics in one pass over S, which takes one matrix product: each tile's products are reduced while
// they are in the cache of the thread that made them.
#pragma once
#include <algorithm>
#include <vector>

#include "kernels/tile_kernels.h"
#include "stats/guide.h"
#include "stats/panels.h"
#include "stats/prepared.h"
#include "stats/running_statistic.h"
#include "stats/stats.h"
#include "stats/tiling.h"

namespace fc {

// The statistics of a problem: `pos` (M,), the positives' logits, and the running statistics of both directions, over
// the pairs that are not related and, if these are reduced by themselves, over those that are.
template <class T>
struct Statistics {
  at::Tensor pos;
  RunningStatistic<T> row, col, related_row, related_col;
  WeightedStatistic<T> teacher_row, teacher_col;
  RankStatistic<T> row_ranks, col_ranks;

  Statistics(const StatsProblem& p, const at::TensorOptions& options)
      : pos(at::empty({p.paired ? p.x.size(0) : 0}, options)),
        row(p.want_row, p.x.size(0), !p.softplus),
        col(p.want_col || p.upper, p.y.size(0), true),
        related_row(p.want_row && has_related(p), p.x.size(0), !p.softplus && p.equal_ids != EqualIds::kAdd),
        related_col(p.want_col && has_related(p), p.y.size(0), p.equal_ids != EqualIds::kAdd),
        teacher_row(p.teacher && p.want_row, p.x.size(0)),
        teacher_col(p.teacher && p.want_col, p.y.size(0)),
        row_ranks(is_ranked(p) && p.want_row, p.x.size(0)),
        col_ranks(is_ranked(p) && (p.want_col || p.upper), p.y.size(0)) {}
  void start(const Tiling& tiling, const Section& s) {
    for (auto* each : {&row, &related_row}) each->start(tiling.tile_cols(s), s.rows.size());
    for (auto* each : {&col, &related_col}) each->start(tiling.tile_rows(s), s.cols.size());
    teacher_row.start(tiling.tile_cols(s), s.rows.size());
    teacher_col.start(tiling.tile_rows(s), s.cols.size());
    row_ranks.start(tiling.tile_cols(s), s.rows.size());
    col_ranks.start(tiling.tile_rows(s), s.cols.size());
  }
  void skip(const TileBounds& at, int64_t r, int64_t c, int64_t tile_row, int64_t tile_col) {
    row.skip(tile_col, r, at.rows);
    col.skip(tile_row, c, at.cols);
    row_ranks.skip(tile_col, r, at.rows);
    col_ranks.skip(tile_row, c, at.cols);
  }
  void merge(const Section& s) {
    for (auto* each : {&row, &related_row}) each->merge(s.rows.begin);
    for (auto* each : {&col, &related_col}) each->merge(s.cols.begin);
    teacher_row.merge(s.rows.begin);
    teacher_col.merge(s.cols.begin);
    row_ranks.merge(s.rows.begin);
    col_ranks.merge(s.cols.begin);
  }
  // Where a tile's sums of related pairs, or of the teacher's logits, go.
  TileSums<T> second_row(bool teacher, int64_t tile_col, int64_t r) {
    return teacher ? teacher_row.part(tile_col, r) : related_row.part(tile_col, r);
  }
  TileSums<T> second_col(bool teacher, int64_t tile_row, int64_t c) {
    return teacher ? teacher_col.part(tile_row, c) : related_col.part(tile_row, c);
  }
  // Returns the columns' statistic in double, as `stats_forward` does, but without ranks.
  at::Tensor col_value(const StatsProblem& p) const { return together(p, col, related_col, teacher_col); }
  // Returns the rows' statistic likewise. For an upper triangle it includes the columns' values,
  // because these are the rows of the lower triangle.
  at::Tensor row_value(const StatsProblem& problem) const {
    const at::Tensor value = together(problem, row, related_row, teacher_row);
    if (!problem.upper) return value;
    const at::Tensor of_cols = col.value();
    double* r = value.mutable_data_ptr<double>();
    const double* c = of_cols.const_data_ptr<double>();
    for (int64_t i = 0; i < value.numel(); ++i) r[i] = log_add(r[i], c[i]);
    return value;
  }

  // Returns the ranks of the rows, (M, 2), and of the columns, (N, 2).
  Ranks ranks(const StatsProblem& p) const {
    if (!is_ranked(p)) return {};
    if (!p.upper) return {row_ranks.value(), col_ranks.value()};
    RankStatistic<T> both = row_ranks;
    both.add(col_ranks);
    return {both.value(), at::empty({0, 2}, at::kDouble)};
  }

 private:
  static at::Tensor together(const StatsProblem& p, const RunningStatistic<T>& all, const RunningStatistic<T>& related,
                             const WeightedStatistic<T>& teacher) {
    if (p.teacher) {
      const auto [mean, log] = teacher.value();
      return at::stack({all.value(), mean, log}, 1);
    }
    return has_related(p) ? at::stack({all.value(), related.value()}, 1) : all.value();
  }
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
  const TileScratch<T> scratch(tiling, p.options(), problem.kept_rows < p.x.rows);
  T* pos = p.rule.paired ? stats.pos.template mutable_data_ptr<T>() : nullptr;
  at::Tensor units;
  const FeatureRows<E> x = p.x.read_rows(0, p.x.rows, units);
  Panels<E> y;
  Guide<T> guide(problem.row_guide, problem.col_guide, tiling, p.options());
  for (const Range& group : tiling.column_groups()) {
    y.set_transposed(p.y, group.begin, group.end);
    guide.start_group(group);
    for (const Section& s : tiling.sections(group)) {
      stats.start(tiling, s);
      tiling.for_each_tile(
          s,
          [&](const TileBounds& at, int64_t tile_row, int64_t tile_col) {
            const int64_t r = at.row - s.rows.begin, c = at.col - s.cols.begin;
            T* tile = s.kept ? kept + kept_offset(at, n) : scratch.get();
            const int64_t stride = s.kept ? at.cols : kTileCols;
            multiply_tile(x, y, at, s.cols.begin, tile, stride);
            tile_kernels<T>().forward(
                p.rule,
                {at, tile, stride, guide.tile(at), pos, stats.row.part(tile_col, r), stats.col.part(tile_row, c),
                 stats.second_row(p.rule.teacher, tile_col, r), stats.second_col(p.rule.teacher, tile_row, c),
                 stats.row_ranks.part(tile_col, r), stats.col_ranks.part(tile_row, c),
                 stats.teacher_row.weighted(tile_col, r), stats.teacher_col.weighted(tile_row, c)});
          },
          [&](const TileBounds& at, int64_t tile_row, int64_t tile_col) {
            stats.skip(at, at.row - s.rows.begin, at.col - s.cols.begin, tile_row, tile_col);
          });
      stats.merge(s);
      interrupt();
    }
  }
  if (problem.upper && p.targets)  // targets come in pairs, t(t(i)) = i, and S is symmetric
    for (int64_t i = 0; i < p.x.rows; ++i)
      if (p.rule.target(i) < i) pos[i] = pos[p.rule.target(i)];
}

}  // namespace fc
