// A loss as one node of the autograd graph, whose gradients are formed in the forward.
#pragma once
#include <ATen/core/Tensor.h>

#include "stats/stats.h"

namespace fc {

// The loss, 0-d, in float32 (float64 for float64 features). It can be differentiated once, by x, y, scale and col_bias.
// `same`: y is x.
at::Tensor row_loss(const StatsProblem& problem, const RowLoss& loss, bool same, const Interrupt& interrupt);

}  // namespace fc
