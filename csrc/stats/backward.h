// Computes the gradients in a second pass over S, one section (stats/tiling.h) at a time. The products, kept or
// computed again, become G, the gradient of the logits, tile by tile; then G y is added to dx and G.T x to dy. This
// takes two matrix products, or three if none were kept.
#pragma once
#include <functional>

#include "kernels/tile_kernels.h"
#include "stats/feature_gradients.h"
#include "stats/guide.h"
#include "stats/panels.h"
#include "stats/prepared.h"
#include "stats/running_statistic.h"
#include "stats/stats.h"
#include "stats/tiling.h"

namespace fc {

// One statistic as a backward reads it: its normalisers, and the gradient that arrives at it if there is one.
template <class T>
struct Direction {
  Normaliser<T> norm;
  OptionalTensor grad;

  Normalised<T> kernel() const { return {grad ? norm.high.data() : nullptr, norm.low.data(), data<T>(grad)}; }
};

// Both directions; those of the related pairs have a gradient only if these are reduced by themselves.
template <class T>
struct Directions {
  Direction<T> row, col, related_row, related_col;
};

// Returns the gradients of x and y in `x_dtype` and `y_dtype`, the others in T. `kept` has the products of the first
// `kept_rows` rows; `pos` is the gradient of the positives' logits. If dx is formed, `add_more` is called on its sums
// before they are multiplied by the scale, to add terms that are not products with G.
template <class E, class T = SumType<E>>
Gradients backward_pass(const StatsProblem& problem, const Prepared<E>& p, const Tiling& tiling, const T* kept,
                        int64_t kept_rows, const OptionalTensor& pos, const Directions<T>& of, const Needs& needs,
                        at::ScalarType x_dtype, at::ScalarType y_dtype, const Interrupt& interrupt,
                        const std::function<void(T*)>& add_more = {}) {
  const int64_t n = p.y.rows;
  FeatureGradients<E> gradients(p, tiling, needs);
  const bool has_negatives = of.row.grad || of.col.grad;
  if (has_negatives) {
    at::Tensor units;
    const bool all_kept = kept_rows == p.x.rows;
    const FeatureRows<E> x = all_kept ? FeatureRows<E>{} : p.x.read_rows(0, p.x.rows, units);
    Panels<E> y_transposed;
    Guide<T> guide(problem.row_guide, problem.col_guide, tiling, p.options());
    gradients.round_groups(pos, y_dtype);
    for (const Range& group : tiling.column_groups()) {
      if (!all_kept) y_transposed.set_transposed(p.y, group.begin, group.end);
      gradients.start_group(group);
      guide.start_group(group);
      for (const Section& s : tiling.sections(group)) {
        gradients.add(s, [&](const TileBounds& at, T* tile, int64_t stride) {
          if (!s.kept) multiply_tile(x, y_transposed, at, group.begin, tile, stride);
          tile_kernels<T>().backward(
              p.rule, {at, s.kept ? kept + kept_offset(at, n) : tile, s.kept ? at.cols : stride, guide.tile(at), tile,
                       stride, of.row.kernel(), of.col.kernel(), of.related_row.kernel(), of.related_col.kernel()});
        });
        interrupt();
      }
      gradients.end_group();
    }
  }
  if (add_more) gradients.add_to_x(add_more);
  return gradients.finish(pos, x_dtype, y_dtype);
}

}  // namespace fc
