// The C++ CPU backend's statistics: the functions that backends/contract.py asks for, on ATen tensors.
#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <functional>
#include <tuple>

#include "common/input.h"
#include "kernels/tile_kernels.h"

namespace fc {

// What the logits are made of and which are excluded; the C++ view of core/spec.py. All tensors are on the CPU.
struct Problem {
  at::Tensor x, y;          // (M, D), (N, D), one floating dtype, any strides
  at::Tensor scale;         // 0-d
  OptionalTensor targets;   // (M,) int64
  OptionalTensor col_bias;  // (N,) or ()
  OptionalTensor row_ids;   // (M,) int64, compared with col_ids
  OptionalTensor col_ids;   // (N,) int64
  bool exclude_self;
  bool want_row, want_col;  // the directions asked
  bool upper;               // x is y: only pairs j > i are computed, and `row` is over both triangles
  EqualIds equal_ids;
  bool softplus;      // sums of softplus, rows alone
  int64_t kept_rows;  // rows of products to keep for the backward

  // Calls f(name, tensor) for every tensor that a rule may ask for: what is read from Python and saved for a backward.
  template <class F>
  void for_each_tensor(const F& f) {
    f("targets", targets);
    f("col_bias", col_bias);
    f("row_ids", row_ids);
    f("col_ids", col_ids);
  }
};

using Interrupt = std::function<void()>;  // called between blocks; throws to stop

// pos (M,), row (M,), col (N,) in float64, and the products x @ y.T of the first `kept_rows` rows in float32 (float64
// for float64 features): (kept_rows, N) elements, tile by tile (`kept_offset`), which only `stats_backward` reads. A
// direction that is not asked has 0 elements.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> stats_forward(const Problem& problem,
                                                                         const Interrupt& interrupt);

// What `stats_forward` returned beside pos, and gradients of what it returned; one that is absent is zero.
struct Saved {
  at::Tensor row, col, kept;
};
struct Upstream {
  OptionalTensor pos, row, col;
};

// The gradients asked: of x, y, scale and col_bias. `joint`, where y is x: that of x is the sum of both, y's is not
// asked.
struct Needs {
  std::array<bool, 4> of;
  bool joint;
};
using FeatureGrads = std::array<at::Tensor, 4>;  // dx, dy, dscale, dcol_bias; undefined where not needed

FeatureGrads stats_backward(const Problem& problem, const Saved& saved, const Upstream& upstream, const Needs& needs,
                            const Interrupt& interrupt);

// `weight` times the sum of softplus(row - (pos - margin)), or of row - (pos - margin) where decoupled, over rows and,
// where they are asked, over the first M columns. For softplus problems of row + softplus(-pos).
struct RowLoss {
  double weight, margin;
  bool decoupled;
  bool normalize;  // x and y, float32 or float64, are divided by their rows' lengths first
  // (M,) int64, of an upper problem: the loss is row minus the mean logit of the other rows with the same label, and
  // rows alone with theirs do not count. `over_counted`: the weight is one over the number of those that do.
  OptionalTensor labels;
  bool over_counted;
};
struct LossAndGradients {
  at::Tensor loss;     // 0-d float64
  FeatureGrads grads;  // in float32 (float64)
};

// For rows alone, or where all rows of products are kept.
LossAndGradients loss_and_gradients(const Problem& problem, const RowLoss& loss, const Needs& needs,
                                    const Interrupt& interrupt);

}  // namespace fc
