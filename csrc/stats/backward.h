// The walk of a backward over S. A section at a time, first each tile of S becomes the gradient G of its logits, by
// products that were kept or are computed again; then dx and dy gain G's products with y and x. 2 or 3 products in all.
#pragma once
#include <functional>

#include "kernels/tile_kernels.h"
#include "stats/feature_gradients.h"
#include "stats/panels.h"
#include "stats/prepared.h"
#include "stats/running_stats.h"
#include "stats/stats.h"
#include "stats/tiling.h"

namespace fc {

// One direction as a backward reads it: finite normalisers, and the gradients of the statistics. Absent without those.
template <class T>
struct Direction {
  Normaliser<T> norm;
  OptionalTensor grad;
};

// `add_more` adds to the sums dx, if they are asked, what is not a product with G. Gradients in T, or of features in
// `x_dtype` and `y_dtype`. `kept`: the products of the walk's kept rows.
template <class E, class T = typename Accumulator<E>::Type>
FeatureGrads backward_walk(const Prepared<E>& p, const Walk& walk, const T* kept, int64_t kept_rows,
                           const OptionalTensor& pos, const Direction<T>& row, const Direction<T>& col,
                           const Needs& needs, at::ScalarType x_dtype, at::ScalarType y_dtype,
                           const Interrupt& interrupt, const std::function<void(T*)>& add_more = {}) {
  const int64_t n = p.y.rows;
  FeatureGradients<E> gradients(p, walk, needs);
  const bool has_negatives = row.grad || col.grad;
  if (has_negatives) {
    at::Tensor units;
    const bool all_kept = kept_rows == p.x.rows;
    const Rows<E> x = all_kept ? Rows<E>{} : p.x.read_rows(0, p.x.rows, units);
    Panels<E> y_transposed;
    gradients.round_groups(pos, y_dtype);
    for (const Range& group : walk.groups()) {
      if (!all_kept) y_transposed.set_transposed(p.y, group.begin, group.end);
      gradients.start_group(group);
      for (const Section& s : walk.sections(group)) {
        gradients.add(s, [&](const Place& at, T* tile, int64_t stride) {
          if (!s.kept) multiply_tile(x, y_transposed, at, at.col - group.begin, tile, stride);
          kernels<T>().backward(p.rule,
                                {at, s.kept ? kept + kept_offset(at, n) : tile, s.kept ? at.cols : stride, tile, stride,
                                 row.grad ? row.norm.high.data() : nullptr, row.norm.low.data(), data<T>(row.grad),
                                 col.grad ? col.norm.high.data() : nullptr, col.norm.low.data(), data<T>(col.grad)});
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
