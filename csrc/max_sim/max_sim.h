// Late interaction on the CPU: the two functions that backends/contract.py asks for.
#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <tuple>

#include "common/input.h"
#include "common/interrupt.h"

namespace fc {

// The C++ view of core/tokens.py. All tensors are on the CPU.
struct TokenProblem {
  at::Tensor x, y;           // (M, T, D), (N, P, D), one floating dtype, any strides
  OptionalTensor x_lengths;  // (M,) int64: how many tokens of each item, from its first, are real; absent: all
  OptionalTensor y_lengths;  // (N,)
  bool both;                 // whether the maxima of y's tokens over x's are needed too
};

// Returns x_sums and y_sums (M, N) in float32 (float64 for float64 tokens), the sums of the maxima of x's tokens over
// y's and of y's tokens over x's; and the argmaxima of the first `kept_rows` items of x, argmax_x (kept_rows, N, T) and
// argmax_y (kept_rows, N, P). Without `both`, y_sums and argmax_y have 0 elements.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> max_sim_forward(const TokenProblem& problem,
                                                                           int64_t kept_rows,
                                                                           const Interrupt& interrupt);

// Returns dx and dy, undefined where `needs` is false. A gradient `g_x` or `g_y` that is absent counts as zero.
std::array<at::Tensor, 2> max_sim_backward(const TokenProblem& problem, const at::Tensor& argmax_x,
                                           const at::Tensor& argmax_y, const OptionalTensor& g_x,
                                           const OptionalTensor& g_y, std::array<bool, 2> needs,
                                           const Interrupt& interrupt);

}  // namespace fc
