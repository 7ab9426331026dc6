// The losses of nested prefixes (Matryoshka) from one walk over S. A tile's products grow by the elements that each
// prefix adds, and after each the tile is swept as a problem of its own. In the backward, the elements of a prefix that
// a shorter one lacks get the sum of the G of all prefixes that contain them, so that dx and dy take one product each.
#include "stats/prefixes.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <numeric>
#include <utility>

#include "common/memory.h"
#include "common/parallel.h"
#include "kernels/tile_kernels.h"
#include "stats/backward.h"
#include "stats/feature_gradients.h"
#include "stats/forward.h"
#include "stats/prefix_tiles.h"
#include "stats/prepared.h"
#include "stats/running_statistic.h"
#include "stats/tiling.h"

namespace fc {
namespace {

void check(const StatsProblem& p, const Prefixes& prefixes) {
  const auto count = static_cast<int64_t>(prefixes.dims.size());
  int64_t before = 0;
  for (const int64_t dim : prefixes.dims) {
    TORCH_CHECK_VALUE(dim > before && dim % 32 == 0 && dim <= p.x.size(1), "dims: got ", dim, " after ", before,
                      ", expected growing multiples of 32 up to D = ", p.x.size(1));
    before = dim;
  }
  TORCH_CHECK_VALUE(before == p.x.size(1), "dims: got ", before, " as the last, expected D = ", p.x.size(1));
  TORCH_CHECK_VALUE(prefixes.kept >= 0 && prefixes.kept <= count, "kept: got ", prefixes.kept, ", expected 0 to ",
                    count);
  TORCH_CHECK_VALUE(prefixes.row.has_value() == prefixes.col.has_value(), "row, col: expected both or neither");
  if (prefixes.row) check_sizes("row_factors", *prefixes.row, {count, p.x.size(0)});
  if (prefixes.col) check_sizes("col_factors", *prefixes.col, {count, p.y.size(0)});
  TORCH_CHECK_VALUE(p.paired && p.want_row && !p.upper && !p.softplus && !p.teacher && !has_related(p) &&
                        !p.row_limit && !p.col_limit && !p.row_lengths && !is_ranked(p) && !p.col_bias,
                    "problem: expected log-sum-exps over the pairs without equal ids");
}

at::Tensor stacked(int64_t count, const std::function<at::Tensor(int64_t)>& of) {
  std::vector<at::Tensor> all;
  for (int64_t k = 0; k < count; ++k) all.push_back(of(k));
  return at::stack(all);
}

template <class E>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward(const StatsProblem& problem,
                                                                   const Prefixes& prefixes,
                                                                   const Interrupt& interrupt) {
  using T = SumType<E>;
  PrefixTiles<E> tiles(problem, prefixes);
  const Tiling& tiling = tiles.tiling;
  const int64_t count = tiles.count();
  const at::TensorOptions options = tiles.p.options();
  const at::Tensor kept = reused_matrix(problem.kept_rows, tiles.p.y.rows * prefixes.kept, options);
  T* kept_data = kept.mutable_data_ptr<T>();
  const TileScratch<T> products(tiling, options), cosines(tiling, options);
  std::deque<Statistics<T>> stats;
  for (int64_t k = 0; k < count; ++k) stats.emplace_back(problem, options);
  for (const Range& group : tiling.column_groups()) {
    tiles.start_group(group);
    for (const Section& s : tiling.sections(group)) {
      for (auto& each : stats) each.start(tiling, s);
      const auto sweep = [&](const TileBounds& at, int64_t tile_row, int64_t tile_col) {
        const int64_t r = at.row - s.rows.begin, c = at.col - s.cols.begin;
        for (int64_t k = 0; k < count; ++k) {
          const bool keeps = tiles.keeps(s, k), plain = !keeps && tiles.is_plain();
          const int64_t stride = keeps ? at.cols : kTileCols;
          T* tile = keeps ? kept_data + tiles.kept(k, at) : plain ? products.get() : cosines.get();
          if (plain)
            tiles.add(k, at, tile);
          else
            tiles.make(k, at, products.get(), tile, stride);
          Statistics<T>& of = stats[k];
          tile_kernels<T>().forward(tiles.p.rule, {at,
                                                   tile,
                                                   stride,
                                                   nullptr,
                                                   of.pos.template mutable_data_ptr<T>(),
                                                   of.row.part(tile_col, r),
                                                   of.col.part(tile_row, c),
                                                   {},
                                                   {},
                                                   {},
                                                   {},
                                                   nullptr,
                                                   nullptr});
        }
      };
      tiling.for_each_tile(s, sweep, [](const TileBounds&, int64_t, int64_t) {});
      for (auto& each : stats) each.merge(s);
      interrupt();
    }
  }
  return {stacked(count, [&](int64_t k) { return stats[k].pos.to(at::kDouble); }),
          stacked(count, [&](int64_t k) { return stats[k].row.value(); }),
          stacked(count, [&](int64_t k) { return stats[k].col.value(); }), kept};
}

// One walk over S in the backward, which makes G of every prefix, and what is done with it.
template <class E>
class PrefixBackward {
 public:
  using T = SumType<E>;

  PrefixBackward(PrefixTiles<E>& tiles, const std::array<bool, 3>& needs, std::vector<Direction<T>> rows,
                 std::vector<Direction<T>> cols, const OptionalTensor& pos)
      : tiles_(tiles), rows_(std::move(rows)), cols_(std::move(cols)), pos_(pos), needs_(needs) {
    const Prepared<E>& p = tiles.p;
    const at::TensorOptions options = p.options();
    if (needs[0]) dx_ = at::zeros({p.x.rows, p.x.d}, options);
    if (needs[1]) dy_ = at::zeros({p.y.rows, p.y.d}, options);
    for (int64_t k = 0; k < tiles.count(); ++k) {
      row_dots_.emplace_back(needs[0] ? !tiles.is_plain() : needs[2] && !needs[1], p.x.rows, false);
      col_dots_.emplace_back(needs[1] && !tiles.is_plain(), p.y.rows, false);
      cosines_.emplace_back(tiles.tiling, options);
      g_.emplace_back(options);
    }
    products_.emplace_back(tiles.tiling, options);
    for (int k = 0; k < 2; ++k) rounded_.emplace_back(tiles.tiling, options, kIsPair<E>);
  }

  void walk(const T* kept, const Interrupt& interrupt) {
    for (const Range& group : tiles_.tiling.column_groups()) {
      tiles_.start_group(group);
      if (dx_.defined()) y_.set(tiles_.p.y, group.begin, group.end);
      for (const Section& s : tiles_.tiling.sections(group)) {
        if (dy_.defined()) x_.set(tiles_.p.x, s.rows.begin, s.rows.end);
        for (int64_t k = 0; k < tiles_.count(); ++k) {
          g_[k].start(s, nullptr, 0);
          row_dots_[k].start(tiles_.tiling.tile_cols(s), s.rows.size());
          col_dots_[k].start(tiles_.tiling.tile_rows(s), s.cols.size());
        }
        const auto sweep = [&](const TileBounds& at, int64_t tile_row, int64_t tile_col) {
          make_gradients(s, at, tile_row, tile_col, kept);
        };
        tiles_.tiling.for_each_tile(s, sweep, [](const TileBounds&, int64_t, int64_t) {});
        for (int64_t k = 0; k < tiles_.count(); ++k) {
          add_products<E>(tiles_.tiling, s, g_[k], y_, x_, memory(dx_), memory(dy_), 0, tiles_.p.x.d, tiles_.part(k));
          row_dots_[k].merge(s.rows.begin);
          col_dots_[k].merge(s.cols.begin);
        }
        interrupt();
      }
    }
  }

  PrefixGradients finish(at::ScalarType x_dtype, at::ScalarType y_dtype) {
    const Prepared<E>& p = tiles_.p;
    const auto dots = [&](const std::deque<RunningStatistic<T>>& all) {
      return stacked(tiles_.count(), [&](int64_t k) { return all[k].value(); });
    };
    at::Tensor row_dots = dots(row_dots_), col_dots = dots(col_dots_);
    if (pos_ && row_dots.size(1) + col_dots.size(1)) add_positives(row_dots, col_dots);
    const bool by_target = p.targets.has_value();
    double dscale = 0;
    if (dy_.defined()) {
      for (int64_t i = 0; by_target && pos_ && i < p.x.rows; ++i) {
        std::vector<T> scratch;
        const int64_t j = p.rule.target(i);
        add_positive(memory(dy_) + j * p.y.d, p.y.wide_row(j, scratch), p.x, i, i, T(1));
      }
      dscale = finish_rows_of(dy_, p.y, p.x, tiles_.col(0), col_dots,
                              [&](int64_t j) { return pos_ && !by_target && j < p.x.rows ? j : -1; });
    }
    if (dx_.defined())
      dscale = finish_rows_of(dx_, p.x, p.y, tiles_.row(0), row_dots,
                              [&](int64_t i) { return pos_ ? p.rule.target(i) : -1; });
    else if (!dy_.defined() && needs_[2])
      dscale = row_dots.sum().template item<double>();
    const auto as = [](at::Tensor& t, at::ScalarType dtype) {
      return t.defined() ? converted(std::exchange(t, {}), dtype) : at::Tensor();
    };
    at::Tensor of_scale = needs_[2] ? at::scalar_tensor(dscale, at::kDouble).to(p.options()) : at::Tensor();
    return {as(dx_, x_dtype), as(dy_, y_dtype), std::move(of_scale)};
  }

 private:
  static T* memory(const at::Tensor& t) { return t.defined() ? t.mutable_data_ptr<T>() : nullptr; }

  // Writes a tile's G, from the longest prefix to the shortest: each is added to the sum of those before.
  void make_gradients(const Section& s, const TileBounds& at, int64_t tile_row, int64_t tile_col, const T* kept) {
    const int64_t r = at.row - s.rows.begin, c = at.col - s.cols.begin;
    for (int64_t k = 0; k < tiles_.count() && !tiles_.keeps(s, k); ++k)
      tiles_.make(k, at, products_[0].get(), cosines_[k].get(), kTileCols);
    const T* longer = nullptr;
    for (int64_t k = tiles_.count() - 1; k >= 0; --k) {
      const bool keeps = tiles_.keeps(s, k);
      const T* cosines = keeps ? kept + tiles_.kept(k, at) : cosines_[k].get();
      const int64_t stride = keeps ? at.cols : kTileCols;
      T* tile = g_[k].tile(r, c, rounded_[k % 2]);
      const int64_t grad_stride = g_[k].tile_stride();
      tile_kernels<T>().backward(
          tiles_.p.rule,
          {at, cosines, stride, nullptr, tile, grad_stride, rows_[k].kernel(), cols_[k].kernel(), {}, {}});
      const T *row = tiles_.row(k), *col = tiles_.col(k);
      tile_kernels<T>().weigh({at.rows, at.cols, row ? row + at.row : nullptr, col ? col + at.col : nullptr, cosines,
                               stride, tile, longer, grad_stride, row_dots_[k].part_sum(tile_col, r),
                               col_dots_[k].part_sum(tile_row, c)});
      g_[k].store(tile, r, c, at.rows, at.cols);
      longer = tile;
    }
  }

  // The gradient of the product of rows i and j, a positive pair, in the elements that prefix k adds.
  T of_positive(int64_t k, int64_t i, int64_t j) const {
    T sum = 0;
    for (int64_t l = tiles_.count() - 1; l >= k; --l)
      sum += data<T>(pos_)[l * tiles_.p.x.rows + i] * tiles_.factor(l, i, j);
    return sum;
  }

  // Adds to `out`, the gradient of the features `own`, the term of row i's positive: its gradient times row `other` of
  // `features` (none: -1). Returns `out` . `own`, and multiplies `out` by `scale` afterwards.
  double add_positive(T* out, const T* own, const Features<E>& features, int64_t other, int64_t i, T scale) const {
    std::vector<T> scratch;
    const T* of_other = other < 0 ? nullptr : features.wide_row(other, scratch);
    double dot = 0;
    for (int64_t k = 0; k < tiles_.count(); ++k) {
      const auto [begin, end] = tiles_.part(k);
      const T g = of_other ? of_positive(k, i, tiles_.p.rule.target(i)) : T(0);
      dot += tile_kernels<T>().add_scale_dot(out + begin, own + begin, of_other ? of_other + begin : nullptr, g, scale,
                                             end - begin);
    }
    return dot;
  }

  // Turns sums over the negatives into the gradient of `features`; row i's positive, or the row whose positive it is,
  // is row other_row(i) of `others`, or none: -1. Returns the gradient of the scale.
  template <class F>
  double finish_rows_of(const at::Tensor& grad, const Features<E>& features, const Features<E>& others,
                        const T* factors, const at::Tensor& dots, const F& other_row) const {
    std::vector<double> parts(features.rows);  // summed in a fixed order
    for_each_task(features.rows, [&](int64_t row) {
      std::vector<T> scratch;
      const T* own = features.wide_row(row, scratch);
      T* out = memory(grad) + row * features.d;
      parts[row] = add_positive(out, own, others, other_row(row), row, tiles_.p.rule.scale);
      if (factors) project(out, own, row, features.rows, factors, dots);
    });
    return std::accumulate(parts.begin(), parts.end(), 0.);
  }

  // Removes from a row of a gradient what would change the norms of its prefixes: `dots` has the sums of G times the
  // cosines, which are the products of this gradient with the prefixes.
  void project(T* out, const T* own, int64_t row, int64_t rows, const T* factors, const at::Tensor& dots) const {
    double along = 0;
    for (int64_t k = tiles_.count() - 1; k >= 0; --k) {
      const auto [begin, end] = tiles_.part(k);
      const double factor = factors[k * rows + row];
      along += dots.const_data_ptr<double>()[k * rows + row] * factor * factor * tiles_.p.rule.scale;
      tile_kernels<T>().add_scale_dot(out + begin, own + begin, own + begin, static_cast<T>(-along), T(1), end - begin);
    }
  }

  // Adds the positives' terms to the sums of G times cosines.
  void add_positives(at::Tensor& row_dots, at::Tensor& col_dots) const {
    const Prepared<E>& p = tiles_.p;
    const int64_t m = p.x.rows, n = p.y.rows;
    const at::Tensor terms = at::empty({tiles_.count(), m}, at::kDouble);
    double* term = terms.mutable_data_ptr<double>();
    for_each_task(m, [&](int64_t i) {
      std::vector<T> first, second;
      const int64_t j = p.rule.target(i);
      const T *x = p.x.wide_row(i, first), *y = p.y.wide_row(j, second);
      double dot = 0;
      for (int64_t k = 0; k < tiles_.count(); ++k) {
        const auto [begin, end] = tiles_.part(k);
        for (int64_t d = begin; d < end; ++d) dot += static_cast<double>(x[d]) * static_cast<double>(y[d]);
        term[k * m + i] = dot * tiles_.factor(k, i, j) * static_cast<double>(data<T>(pos_)[k * m + i]);
      }
    });
    if (row_dots.size(1)) row_dots.add_(terms);
    if (!col_dots.size(1)) return;
    double* of_col = col_dots.mutable_data_ptr<double>();
    for (int64_t k = 0; k < tiles_.count(); ++k)
      for (int64_t i = 0; i < m; ++i) of_col[k * n + p.rule.target(i)] += term[k * m + i];
  }

  PrefixTiles<E>& tiles_;
  std::vector<Direction<T>> rows_, cols_;
  OptionalTensor pos_;
  std::array<bool, 3> needs_;
  at::Tensor dx_, dy_;
  Panels<E> x_, y_;
  std::deque<RunningStatistic<T>> row_dots_, col_dots_;
  std::deque<TileScratch<T>> cosines_, products_, rounded_;
  std::deque<LogitGradients<E>> g_;
};

template <class E>
PrefixGradients backward(const StatsProblem& problem, const Prefixes& prefixes, const Saved& saved,
                         const Upstream& upstream, const std::array<bool, 3>& needs, const Interrupt& interrupt) {
  using T = SumType<E>;
  PrefixTiles<E> tiles(problem, prefixes);
  constexpr auto dtype = Prepared<E>::scalar_type();
  const int64_t m = tiles.p.x.rows, n = tiles.p.y.rows, count = tiles.count();
  const auto directions = [&](const char* name, const at::Tensor& value, const char* g_name, const OptionalTensor& g,
                              int64_t size) {
    std::vector<Direction<T>> all;
    if (g) check_sizes(name, value, {count, size}), check_sizes(g_name, *g, {count, size});
    for (int64_t k = 0; k < count; ++k)
      all.push_back(g ? Direction<T>{Normaliser<T>(readable(name, value[k], at::kDouble)),
                                     readable(g_name, OptionalTensor((*g)[k]), dtype)}
                      : Direction<T>{Normaliser<T>(0), std::nullopt});
    return all;
  };
  if (upstream.pos) check_sizes("g_pos", *upstream.pos, {count, m});
  PrefixBackward<E> all(tiles, needs, directions("row", saved.row, "g_row", upstream.row, m),
                        directions("col", saved.col, "g_col", upstream.col, n), readable("g_pos", upstream.pos, dtype));
  at::Tensor kept;
  if (problem.kept_rows) {
    check_sizes("kept", saved.kept, {problem.kept_rows, prefixes.kept * n});
    check_dtype("kept", saved.kept, dtype);
    kept = readable("kept", saved.kept, dtype);
  }
  if (upstream.row || upstream.col) all.walk(problem.kept_rows ? kept.const_data_ptr<T>() : nullptr, interrupt);
  return all.finish(problem.x.scalar_type(), problem.y.scalar_type());
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> prefixes_forward(const StatsProblem& problem,
                                                                            const Prefixes& prefixes,
                                                                            const Interrupt& interrupt) {
  check(problem, prefixes);
  return with_elements(problem, [&](auto element) { return forward<decltype(element)>(problem, prefixes, interrupt); });
}

PrefixGradients prefixes_backward(const StatsProblem& problem, const Prefixes& prefixes, const Saved& saved,
                                  const Upstream& upstream, const std::array<bool, 3>& needs,
                                  const Interrupt& interrupt) {
  check(problem, prefixes);
  return with_elements(problem, [&](auto element) {
    return backward<decltype(element)>(problem, prefixes, saved, upstream, needs, interrupt);
  });
}

}  // namespace fc
