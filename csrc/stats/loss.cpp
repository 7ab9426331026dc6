// Computes a loss and its gradients in one call. For a loss over rows alone, a few hundred rows of S at a time are held
// until their normalisers are known and then become G. This takes 3 products, where a forward and a backward that keep
// none take 4. For a loss over rows and columns, or a triangle, there are two passes, and products that are not kept
// are computed again.
#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <vector>

#include "common/memory.h"
#include "common/loss_term.h"
#include "kernels/tile_kernels.h"
#include "stats/backward.h"
#include "stats/class_means.h"
#include "stats/feature_gradients.h"
#include "stats/forward.h"
#include "stats/groups.h"
#include "stats/guide.h"
#include "stats/panels.h"
#include "stats/prepared.h"
#include "stats/running_statistic.h"
#include "stats/stats.h"
#include "stats/tiling.h"

namespace fc {
namespace {

// Returns how many rows are held at a time. It depends on N alone, since where blocks begin decides how sums are
// rounded. Each block packs all of y and reads and writes all of dy: with 256 rows in place of 512, N = 4096 took 1.1
// times as long.
int64_t rows_at_once(int64_t n) {
  return std::clamp<int64_t>((int64_t(1) << 24) / n / 128 * 128, 128, 512);
}

// Sums in pairs, since equal terms that are added to one sum all round alike.
double sum_in_pairs(const double* terms, int64_t count) {
  if (count <= 8) return std::accumulate(terms, terms + count, 0.);
  return sum_in_pairs(terms, count / 2) + sum_in_pairs(terms + count / 2, count - count / 2);
}
double sum_of(const at::Tensor& losses) {
  return sum_in_pairs(losses.const_data_ptr<double>(), losses.numel());
}

struct WeightedTerm {
  double loss, g_normaliser, g_pos;
};

// One row's or column's loss, and its derivatives by its normaliser and its positive's logit.
WeightedTerm weighted_term(double pos, double normaliser, bool is_softplus, const RowLoss& loss) {
  const double z = is_softplus ? -pos : normaliser - (pos - loss.margin), w = loss.weight;
  if (is_softplus) return {w * (normaliser + softplus(z)), w, -w * sigmoid(z)};
  const double g = w * loss_term_gradient(z, loss.decoupled);
  return {w * loss_term(z, loss.decoupled), g, -g};
}

template <class E>
LossAndGradients from_rows(const StatsProblem& problem, const RowLoss& loss, const Needs& needs,
                           const Interrupt& interrupt) {
  using T = SumType<E>;
  const Prepared<E> p(problem, loss.normalize);
  const int64_t m = p.x.rows, n = p.y.rows, stride = round_up(n, 32) + 16;
  const at::Tensor pos = at::empty({m}, p.options());
  const at::Tensor losses = at::empty({m}, at::kDouble), g_pos = at::empty({m}, p.options());
  const at::Tensor g_row = at::empty({m}, p.options());
  const std::vector<Range> all = pieces(0, m, rows_at_once(n));
  std::vector<at::Tensor> ranks;
  const at::Tensor held = small_block(all.front().size() * stride * static_cast<int64_t>(sizeof(T)));
  Normaliser<T> norm(problem.softplus ? 0 : m);
  T *s = static_cast<T*>(held.mutable_data_ptr()), *pos_data = pos.mutable_data_ptr<T>();

  const Tiling tiling(m, n, kPackedCols<E>, 0, false);
  FeatureGradients<E> gradients(p, tiling, needs);
  // With several groups of columns, y is packed again for every block of rows; panels of y and y.T then share memory.
  Panels<E> whole;
  Panels<E>& y_transposed = tiling.column_groups().size() > 1 ? gradients.panels() : whole;
  Guide<T> guide(problem.row_guide, problem.col_guide, tiling, p.options());
  for (const Range& rows : all) {
    const auto products = [&](const TileBounds& at) { return s + (at.row - rows.begin) * stride + at.col; };
    at::Tensor units;
    const FeatureRows<E> x = p.x.read_rows(rows.begin, rows.end, units);
    RunningStatistic<T> row(true, rows.size(), !problem.softplus);
    RankStatistic<T> row_ranks(is_ranked(problem), rows.size());
    for (const Range& group : tiling.column_groups()) {
      const Section section{rows, group, true};
      y_transposed.set_transposed(p.y, group.begin, group.end);
      guide.start_group(group);
      row.start(tiling.tile_cols(section), rows.size());
      row_ranks.start(tiling.tile_cols(section), rows.size());
      tiling.for_each_tile(
          section,
          [&](const TileBounds& at, int64_t, int64_t tile_col) {
            T* tile = products(at);
            const int64_t r = at.row - rows.begin;
            multiply_tile(x, y_transposed, at, group.begin, tile, stride);
            tile_kernels<T>().forward(p.rule, {at,
                                               tile,
                                               stride,
                                               guide.tile(at),
                                               pos_data,
                                               row.part(tile_col, r),
                                               {},
                                               {},
                                               {},
                                               row_ranks.part(tile_col, r),
                                               {},
                                               nullptr,
                                               nullptr});
          },
          [](const TileBounds&, int64_t, int64_t) {});
      row.merge(0);
      row_ranks.merge(0);
      interrupt();
    }
    units.reset();
    const at::Tensor value = row.value();
    if (is_ranked(problem)) ranks.push_back(row_ranks.value());
    if (!problem.softplus) norm.set(rows.begin, value);
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      const WeightedTerm t =
          weighted_term(pos_data[i], value.const_data_ptr<double>()[i - rows.begin], problem.softplus, loss);
      losses.mutable_data_ptr<double>()[i] = t.loss;
      g_row.mutable_data_ptr<T>()[i] = static_cast<T>(t.g_normaliser);
      g_pos.mutable_data_ptr<T>()[i] = static_cast<T>(t.g_pos);
    }
    for (const Range& group : tiling.column_groups()) {
      gradients.start_group(group);
      guide.start_group(group);
      const auto logit_gradient = [&](const TileBounds& at, T* tile, int64_t tile_stride) {
        const Normalised<T> by_row{norm.high.data(), norm.low.data(), g_row.const_data_ptr<T>()};
        tile_kernels<T>().backward(p.rule,
                                   {at, products(at), stride, guide.tile(at), tile, tile_stride, by_row, {}, {}, {}});
      };
      gradients.add({rows, group, true}, logit_gradient, s + group.begin, stride);  // G takes the products' place
      interrupt();
    }
  }
  LossAndGradients result{sum_of(losses), gradients.finish(g_pos, p.scalar_type(), p.scalar_type()), pos, {}};
  if (is_ranked(problem)) result.ranks = {at::cat(ranks), at::empty({0, 2}, at::kDouble)};
  return result;
}

// Adds one direction's losses to `losses` and their derivatives by the positives' logits to `g_pos`. Writes their
// derivatives by the normalisers to `g_normaliser`.
template <class T>
void add_direction(const at::Tensor& normaliser, const at::Tensor& losses, const T* pos, const RowLoss& loss,
                   T* g_normaliser, T* g_pos) {
  const double* value = normaliser.const_data_ptr<double>();
  double* sum = losses.mutable_data_ptr<double>();
  for (int64_t i = 0; i < losses.numel(); ++i) {
    const WeightedTerm t = weighted_term(pos[i], value[i], false, loss);
    sum[i] += t.loss;
    g_normaliser[i] = static_cast<T>(t.g_normaliser);
    g_pos[i] += static_cast<T>(t.g_pos);
  }
}

// Writes SupCon's losses, the weighted log-sum-exp over all other rows minus the mean logit of the row's class, and
// their derivatives by the log-sum-exps. A row that is alone in its class does not count.
template <class E, class T = SumType<E>>
void set_classes(const ClassMeans<E>& classes, const at::Tensor& normaliser, const at::Tensor& losses, double scale,
                 double weight, T* g_normaliser) {
  const double* value = normaliser.const_data_ptr<double>();
  for (int64_t i = 0; i < losses.numel(); ++i) {
    if (classes.positives(i) == 0) continue;
    losses.mutable_data_ptr<double>()[i] = weight * (value[i] - classes.logit(i, scale));
    g_normaliser[i] = static_cast<T>(weight);
  }
}

template <class E>
LossAndGradients from_two_passes(const StatsProblem& problem, const RowLoss& loss, const Needs& needs,
                                 const Interrupt& interrupt) {
  using T = SumType<E>;
  const Prepared<E> p(problem, loss.normalize);
  const int64_t m = p.x.rows, n = p.y.rows;
  TORCH_CHECK_VALUE(problem.upper || !p.targets, "targets: expected none for losses over columns");
  const at::Tensor kept = reused_matrix(problem.kept_rows, n, p.options());
  T* products = kept.mutable_data_ptr<T>();
  Statistics<T> stats(problem, p.options());
  const Tiling tiling(m, n, kPackedCols<E>, problem.kept_rows, problem.upper);
  forward_pass<E>(problem, p, tiling, stats, products, interrupt);

  const auto zeros = [&](int64_t size) { return at::zeros({size}, p.options()); };
  const at::Tensor g_row = zeros(m), row_value = stats.row_value(problem);
  const at::Tensor losses = at::zeros({m}, at::kDouble);
  const auto dtype = p.scalar_type();
  const Direction<T> none{Normaliser<T>(0), std::nullopt};
  const auto gradients = [&](const OptionalTensor& g_pos, const Direction<T>& row, const Direction<T>& col,
                             const std::function<void(T*)>& add_more) {
    return LossAndGradients{sum_of(losses),
                            backward_pass<E>(problem, p, tiling, products, problem.kept_rows, g_pos,
                                             {row, col, none, none}, needs, dtype, dtype, interrupt, add_more),
                            stats.pos, stats.ranks(problem)};
  };
  const Direction<T> row{Normaliser<T>(row_value), g_row};
  if (loss.labels) {
    const ClassMeans<E> classes(p.x, *loss.labels);
    const double weight =
        loss.over_counted ? 1 / static_cast<double>(std::max<int64_t>(1, classes.counted())) : loss.weight;
    set_classes<E>(classes, row_value, losses, p.rule.scale, weight, g_row.mutable_data_ptr<T>());
    const double factor = needs.joint ? -2 * weight : -weight;  // each pair of a class is in the loss of both its rows
    return gradients(std::nullopt, row, row, [&](T* dx) { classes.add_to(dx, factor); });
  }
  const at::Tensor g_pos = zeros(m);
  const T* pos = stats.pos.template const_data_ptr<T>();
  T* g_pos_data = g_pos.mutable_data_ptr<T>();
  add_direction<T>(row_value, losses, pos, loss, g_row.mutable_data_ptr<T>(), g_pos_data);
  if (problem.upper) return gradients(g_pos, row, row, {});  // the lower triangle's rows are the upper's columns
  const at::Tensor g_col = zeros(n), col_value = stats.col_value(problem);
  add_direction<T>(col_value, losses, pos, loss, g_col.mutable_data_ptr<T>(), g_pos_data);
  return gradients(g_pos, row, {Normaliser<T>(col_value), g_col}, {});
}

// Returns how many rows share their label with another row of their group.
int64_t counted(const at::Tensor& labels, const std::vector<Group>& groups) {
  check_dtype("labels", labels, at::kLong);
  const at::Tensor sorted = readable("labels", labels, at::kLong).clone();
  int64_t* all = sorted.mutable_data_ptr<int64_t>();
  int64_t count = 0;
  for (const Group& group : groups) {
    int64_t *at = all + group.rows.begin, *end = all + group.rows.end;
    std::sort(at, end);
    while (at < end) {
      int64_t* next = std::upper_bound(at, end, *at);
      count += next - at > 1 ? next - at : 0;
      at = next;
    }
  }
  return count;
}

// Gathers the groups' ranks and positives' logits, if the problem has references. A group without pairs sets nothing:
// its ranks stay 0 and its highest logits -inf.
class GroupedRanks {
 public:
  GroupedRanks(const StatsProblem& p, at::ScalarType dtype) {
    if (!is_ranked(p)) return;
    pos_ = at::zeros({p.x.size(0)}, dtype);
    all_ = {no_ranks(p.x.size(0)), no_ranks(p.want_col ? p.y.size(0) : 0)};
  }
  // Sets the elements of one group. Threads may call it at the same time for different groups.
  void set(const Group& g, const LossAndGradients& found) const {
    if (!pos_.defined()) return;
    put(pos_, g.rows, found.pos);
    put(all_.row, g.rows, found.ranks.row);
    if (all_.col.size(0)) put(all_.col, g.cols, found.ranks.col);
  }
  const at::Tensor& pos() const { return pos_; }
  const Ranks& ranks() const { return all_; }

 private:
  static at::Tensor no_ranks(int64_t size) {
    const at::Tensor out = at::zeros({size, 2}, at::kDouble);
    out.select(1, 1).fill_(-std::numeric_limits<double>::infinity());
    return out;
  }
  // Copies `values` to the group's rows, without ATen: its calls would take as long as a small group's ranks.
  static void put(const at::Tensor& all, const Range& rows, const at::Tensor& values) {
    const size_t row_bytes = all.nbytes() / static_cast<size_t>(all.size(0));
    TORCH_INTERNAL_ASSERT(values.is_contiguous() && values.size(0) == rows.size());
    std::memcpy(static_cast<char*>(all.mutable_data_ptr()) + static_cast<size_t>(rows.begin) * row_bytes,
                values.const_data_ptr(), values.nbytes());
  }
  at::Tensor pos_;
  Ranks all_;
};

LossAndGradients grouped(const StatsProblem& p, const RowLoss& loss, const Needs& needs, const Interrupt& interrupt) {
  check(p);
  if (loss.labels) check_sizes("labels", *loss.labels, {p.x.size(0)});
  const std::vector<Group> groups = groups_of(p);
  RowLoss over_all = loss;
  over_all.over_counted = false;
  if (loss.labels && loss.over_counted)
    over_all.weight = 1 / static_cast<double>(std::max<int64_t>(1, counted(*loss.labels, groups)));
  const auto count = static_cast<int64_t>(groups.size());
  const auto dtype = p.x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const int64_t most_kept = p.kept_rows * p.y.size(0);
  GroupedGradients all(p, needs, count, dtype, dtype, dtype);
  const GroupedRanks ranks(p, dtype);
  std::vector<double> losses(count, 0);
  for_each_group(groups, interrupt, [&](int64_t k, const Interrupt& at_times) {
    const Group& group = groups[k];
    if (group.empty()) return all.set(k, group, {});
    StatsProblem own = part(p, group);
    own.kept_rows = std::min(group.rows.size(), most_kept / group.cols.size());
    RowLoss of_group = over_all;
    of_group.labels = part(loss.labels, group.rows);
    const LossAndGradients found = loss_and_gradients(own, of_group, all.needs(group), at_times);
    losses[k] = found.loss;
    all.set(k, group, found.grads);
    ranks.set(group, found);
  });
  return {std::accumulate(losses.begin(), losses.end(), 0.), all.finish(), ranks.pos(), ranks.ranks()};
}

}  // namespace

LossAndGradients loss_and_gradients(const StatsProblem& problem, const RowLoss& loss, const Needs& needs,
                                    const Interrupt& interrupt) {
  if (problem.row_lengths) return grouped(problem, loss, needs, interrupt);
  return with_elements(problem, [&](auto element) {
    using E = decltype(element);
    TORCH_CHECK_VALUE(problem.paired || loss.labels, "paired: expected a problem whose rows have positives");
    TORCH_CHECK_VALUE(!has_related(problem) && !problem.teacher,
                      "equal_ids, statistic: expected log-sum-exps or sums of softplus over all pairs");
    TORCH_CHECK_VALUE(!loss.labels || problem.upper, "labels: expected a problem of features against themselves");
    TORCH_CHECK_VALUE(problem.x.size(0) > 0 && problem.y.size(0) > 0, "x, y: got ", problem.x.size(0), " and ",
                      problem.y.size(0), " rows, expected at least one");
    if (problem.want_col || problem.upper) return from_two_passes<E>(problem, loss, needs, interrupt);
    return from_rows<E>(problem, loss, needs, interrupt);
  });
}

}  // namespace fc
