// Late interaction on the CPU: the two functions that backends/contract.py asks for.
#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <tuple>

#include "common/input.h"
#include "common/interrupt.h"

namespace fc {

// The C++ view of core/tokens.py's TokenSpec. All tensors are on the CPU.
struct TokenProblem {
  at::Tensor x, y;           // (M, T, D), (N, P, D), one floating dtype, any strides; N = M * own if `own` is not 0
  OptionalTensor x_lengths;  // (M,) int64: how many tokens of each item are real; absent: all
  OptionalTensor y_lengths;  // (N,)
  OptionalTensor x_order;    // (M, T) int64: an order of each item's tokens, the real ones first; absent: as they are
  OptionalTensor y_order;    // (N, P)
  bool both;                 // whether the maxima of y's tokens over x's are needed too
  int64_t own;               // 0: all pairs; else only items [m * own, (m + 1) * own) of y are scored for item m of x
  double smooth;             // tau: tau * log(sum exp(s / tau)) in place of the maximum; 0: the maximum

  // Every pair by itself, not blocks of all pairs.
  bool by_item() const { return own || smooth != 0; }
  // How many scores an item of x has: N, or K = `own`.
  int64_t columns() const { return own ? own : y.size(0); }
};

// In what follows, C is N for all pairs and K for own items. With `own` or `smooth`, `both` must be false; with
// `smooth`, nothing is kept.

// Returns x_sums and y_sums (M, C) in float32 (float64 for float64 tokens), the sums of the maxima of x's tokens over
// y's and of y's tokens over x's; and the argmaxima of the first `kept_rows` items of x, argmax_x (kept_rows, C, T) and
// argmax_y (kept_rows, C, P). Without `both`, y_sums and argmax_y have 0 elements.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> max_sim_forward(const TokenProblem& problem,
                                                                           int64_t kept_rows,
                                                                           const Interrupt& interrupt);

// Returns dx and dy, undefined where `needs` is false. A gradient `g_x` or `g_y` that is absent counts as zero.
std::array<at::Tensor, 2> max_sim_backward(const TokenProblem& problem, const at::Tensor& argmax_x,
                                           const at::Tensor& argmax_y, const OptionalTensor& g_x,
                                           const OptionalTensor& g_y, std::array<bool, 2> needs,
                                           const Interrupt& interrupt);

}  // namespace fc
