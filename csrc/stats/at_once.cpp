// The loss and its gradients in one walk over the rows of S: 3 products, where a forward and a backward take 4 that
// keep no products between them. For sums over rows alone, all of one weight: some hundred rows of S
// are held until their normalisers are, become the gradient of their logits, and are forgotten.
#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "autograd/cross_entropy.h"
#include "stats/feature_gradients.h"
#include "stats/panels.h"
#include "stats/prepared.h"
#include "stats/stats.h"
#include "kernels/tile_kernels.h"
#include "stats/tiling.h"
#include "stats/running_stats.h"

namespace fc {
namespace {

// Rows held, by the length of one alone: where blocks of rows begin decides how their sums are rounded. Of many groups
// of columns all of y is packed for each block, and all of dy is read and written. With 256 in place of 512, N = 4096
// took 1.1 times as long.
int64_t rows_at_once(int64_t n) {
  return std::clamp<int64_t>((int64_t(1) << 24) / n / 128 * 128, 128, 512);
}

struct Term {
  double loss, g_row, g_pos;
};

// One row's loss, unweighted, and its derivatives by the row's statistics.
Term term(double pos, double row, bool is_softplus, bool decoupled) {
  const double z = is_softplus ? -pos : row - pos;
  if (is_softplus) return {row + softplus(z), 1, -sigmoid(z)};
  return decoupled ? Term{z, 1, -1} : Term{softplus(z), sigmoid(z), -sigmoid(z)};
}

template <class E>
LossAndGradients loss_and_gradients(const Problem& problem, double weight, double margin, bool decoupled,
                                    std::array<bool, 4> needs, bool normalize, const Interrupt& interrupt) {
  using T = typename Accumulator<E>::Type;
  const Prepared<E> p(problem, normalize);
  const int64_t m = p.x.rows, n = p.y.rows, stride = round_up(n, 32) + 16;
  TORCH_CHECK_VALUE(m > 0 && n > 0, "x, y: got ", m, " and ", n, " rows, expected at least one");
  const at::Tensor pos = at::empty({m}, p.options());
  const at::Tensor losses = at::empty({m}, at::kDouble), g_pos = at::empty({m}, p.options());
  const at::Tensor g_row = at::empty({m}, p.options());
  const std::vector<Range> all = pieces(0, m, rows_at_once(n));
  const at::Tensor held = at::empty({all.front().size(), stride}, p.options());
  Normaliser<T> norm(problem.softplus ? 0 : m);
  T *s = held.mutable_data_ptr<T>(), *pos_data = pos.mutable_data_ptr<T>();

  const Walk walk(m, n, kGroupCols<E>, 0, false);
  FeatureGradients<E> gradients(p, walk, needs);
  // Of several groups each is packed again for every block of rows, and the products with y and y.T share memory.
  Panels<E> whole;
  Panels<E>& y_transposed = walk.groups().size() > 1 ? gradients.panels() : whole;
  for (const Range& rows : all) {
    const auto products = [&](const Place& at) { return s + (at.row - rows.begin) * stride + at.col; };
    at::Tensor units;
    const Rows<E> x = p.x.read_rows(rows.begin, rows.end, units);
    Totals<T> row(true, rows.size(), !problem.softplus);
    for (const Range& group : walk.groups()) {
      const Section section{rows, group, true};
      y_transposed.set_transposed(p.y, group.begin, group.end);
      row.start(walk.strips(section), rows.size());
      walk.for_each_tile(
          section,
          [&](const Place& at, int64_t, int64_t strip) {
            T* tile = products(at);
            const int64_t r = at.row - rows.begin;
            multiply_tile(x, y_transposed, at, at.col - group.begin, tile, stride);
            kernels<T>().forward(
                p.rule, {at, tile, stride, pos_data, row.part_max(strip, r), row.part_sum(strip, r), nullptr, nullptr});
          },
          [](const Place&, int64_t, int64_t) {});
      row.merge(0);
      interrupt();
    }
    units.reset();
    const at::Tensor value = row.value();
    if (!problem.softplus) norm.set(rows.begin, value);
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      const Term t = term(static_cast<double>(pos_data[i]) - margin, value.const_data_ptr<double>()[i - rows.begin],
                          problem.softplus, decoupled);
      losses.mutable_data_ptr<double>()[i] = t.loss * weight;
      g_row.mutable_data_ptr<T>()[i] = static_cast<T>(t.g_row * weight);
      g_pos.mutable_data_ptr<T>()[i] = static_cast<T>(t.g_pos * weight);
    }
    for (const Range& group : walk.groups()) {
      gradients.start_group(group);
      const auto logits_gradient = [&](const Place& at, T* tile, int64_t tile_stride) {
        kernels<T>().backward(p.rule, {at, products(at), stride, tile, tile_stride, norm.high.data(), norm.low.data(),
                                       g_row.const_data_ptr<T>(), nullptr, nullptr, nullptr});
      };
      gradients.add({rows, group, true}, logits_gradient, s + group.begin, stride);  // where the products were
      interrupt();
    }
  }
  return {losses.sum(), gradients.finish(g_pos, p.scalar_type(), p.scalar_type())};
}

}  // namespace

LossAndGradients stats_at_once(const Problem& problem, double weight, double margin, bool decoupled, bool normalize,
                               std::array<bool, 4> needs, const Interrupt& interrupt) {
  return with_elements(problem, [&](auto element) {
    return loss_and_gradients<decltype(element)>(problem, weight, margin, decoupled, needs, normalize, interrupt);
  });
}

}  // namespace fc
