// A loss as one node of the autograd graph, whose gradients are formed in the forward.
#pragma once
#include <ATen/core/Tensor.h>

#include "stats/stats.h"

namespace fc {

// `loss`, 0-d, in float32 (float64 for float64 features), can be differentiated once, by x, y, scale and col_bias.
struct RowLossOutput {
  at::Tensor loss;
  at::Tensor pos;  // (M,) the positives' logits
  Ranks ranks;     // undefined without references
};

// `same`: y is x.
RowLossOutput row_loss(const StatsProblem& problem, const RowLoss& loss, bool same, const Interrupt& interrupt);

}  // namespace fc
