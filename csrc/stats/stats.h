// The C++ backend's statistics, on ATen tensors: what backends/contract.py asks a backend for.
#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <tuple>

#include "common/input.h"
#include "common/interrupt.h"
#include "kernels/tile_kernels.h"

namespace fc {

// What the logits are made of and which are excluded; the C++ view of core/spec.py. All tensors are on the CPU.
struct StatsProblem {
  at::Tensor x, y;                              // (M, D), (N, D), one floating dtype, any strides
  at::Tensor scale;                             // 0-d
  OptionalTensor targets;                       // (M,) int64
  OptionalTensor col_bias;                      // (N,) or ()
  OptionalTensor row_ids;                       // (M,) or (M, K) int64, compared with col_ids
  OptionalTensor col_ids;                       // (N,) or (N, K) int64
  OptionalTensor row_limit, col_limit;          // (M,), (N,): excludes pairs with scale x . y above it
  OptionalTensor row_guide, col_guide;          // (M, G), (N, G), whose products are compared with the limits instead
  OptionalTensor row_lengths, col_lengths;      // (B,) int64: each group's rows and columns are a problem of their own
  OptionalTensor row_reference, col_reference;  // (M,), (N,): row and col are (M, 3) and (N, 3), see core/spec.py
  bool paired;                                  // row i has a positive; otherwise pos has 0 elements
  bool exclude_self;
  bool want_row, want_col;  // the directions that are asked for
  bool upper;               // x is y: only pairs j > i are computed, and `row` is over both triangles
  EqualIds equal_ids;
  bool softplus;      // `row` is the sum of softplus(s), not a log-sum-exp; there are no columns then
  bool teacher;       // the guide's products are a teacher's logits; `row` is (M, 3), `col` (N, 3)
  int64_t kept_rows;  // rows of products to keep for the backward; with groups, of a loss, see core/spec.py

  // Calls f(name, tensor) for every tensor that a rule may need. These are read from Python and saved for a backward.
  template <class F>
  void for_each_tensor(const F& f) {
    f("targets", targets);
    f("col_bias", col_bias);
    f("row_ids", row_ids);
    f("col_ids", col_ids);
    f("row_limit", row_limit);
    f("col_limit", col_limit);
    f("row_guide", row_guide);
    f("col_guide", col_guide);
    f("row_lengths", row_lengths);
    f("col_lengths", col_lengths);
    f("row_reference", row_reference);
    f("col_reference", col_reference);
  }
};

// Whether related pairs have statistics of their own.
inline bool has_related(const StatsProblem& p) {
  return p.equal_ids == EqualIds::kApart || p.equal_ids == EqualIds::kAdd;
}

// Whether logits are compared with references.
inline bool is_ranked(const StatsProblem& p) {
  return p.row_reference || p.col_reference;
}

// How many of a row's or column's logits are above its reference, in [:, 0], and the highest, in [:, 1], in float64.
struct Ranks {
  at::Tensor row, col;  // (M, 2), (N, 2); 0 rows for a direction that was not asked for
};

// Returns pos (M,), row (M,) and col (N,) in float64, where a direction that was not asked for has 0 elements. Row and
// col are (M, 2) and (N, 2) if related pairs have statistics of their own, in [:, 1]. With a teacher they are (M, 3)
// and (N, 3): the log-sum-exp of the logits, their mean weighted by the teacher's softmax, and the log-sum-exp of the
// teacher's logits. With references, their [:, 1:] are the ranks. It also returns the products x @ y.T of the first
// `kept_rows` rows, (kept_rows, N) elements in float32 (float64 for float64 features). They lie tile by tile
// (`kept_offset`), and only `stats_backward` reads them.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> stats_forward(const StatsProblem& problem,
                                                                         const Interrupt& interrupt);

// What `stats_forward` returned beside pos.
struct Saved {
  at::Tensor row, col, kept;
};
// Gradients of the statistics that `stats_forward` returned; one that is absent is zero.
struct Upstream {
  OptionalTensor pos, row, col;
};

// Which of the gradients of x, y, scale and col_bias are needed. With `joint` y is x: both gradients are summed in the
// gradient of x, and y's is not needed. Zeros, if given, become the gradients of x and y, which are then in the dtype
// of sums.
struct Needs {
  std::array<bool, 4> of;
  bool joint;
  at::Tensor zeros_for_x{}, zeros_for_y{};
};
using Gradients = std::array<at::Tensor, 4>;  // dx, dy, dscale, dcol_bias; undefined where not needed

Gradients stats_backward(const StatsProblem& problem, const Saved& saved, const Upstream& upstream, const Needs& needs,
                         const Interrupt& interrupt);

// The loss is `weight` times the sum of softplus(row - (pos - margin)), or of row - (pos - margin) if decoupled, over
// the rows and, if `want_col`, the same over the first M columns. For softplus problems it is `weight` times the sum of
// row + softplus(-pos).
struct RowLoss {
  double weight, margin;
  bool decoupled;
  bool normalize;  // x and y, float32 or float64, are divided by their rows' lengths first
  // (M,) int64, for an upper problem: the loss is row minus the mean logit of the other rows with the same label. A row
  // whose label no other row has does not count.
  OptionalTensor labels;
  bool over_counted;  // with labels: the weight is 1 / (number of rows that count), not `weight`
};
struct LossAndGradients {
  double loss;
  Gradients grads;  // in float32 (float64)
  at::Tensor pos;   // (M,) the positives' logits
  Ranks ranks;      // undefined without references
};

// Over rows and columns, targets are not supported, and products that are not kept are computed twice.
LossAndGradients loss_and_gradients(const StatsProblem& problem, const RowLoss& loss, const Needs& needs,
                                    const Interrupt& interrupt);

}  // namespace fc
