// Late interaction on the CPU: the two functions of the backend, and the contract with their vector kernels
// (max_sim.inl).
#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <tuple>

#include "stats/stats.h"

namespace fc {

// The C++ view of core/tokens.py. All tensors are on the CPU.
struct TokenProblem {
  at::Tensor x, y;           // (M, T, D), (N, P, D), one floating dtype, any strides
  OptionalTensor x_lengths;  // (M,) int64, how many tokens of each item are real, the first ones; none: all
  OptionalTensor y_lengths;  // (N,)
  bool both;                 // also the direction y
};

// Sums (M, N) in float32 (float64 for float64 tokens) and the argmaxima of the first `kept_rows` items of x, for the
// directions x and y: x_sums, y_sums, argmax_x (kept, N, T), argmax_y (kept, N, P). Without `both`, those of y have 0
// elements.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> max_sim_forward(const TokenProblem& problem,
                                                                           int64_t kept_rows,
                                                                           const Interrupt& interrupt);

// dx, dy; undefined where `needs` says no. A gradient that is absent is zero.
std::array<at::Tensor, 2> max_sim_backward(const TokenProblem& problem, const at::Tensor& argmax_x,
                                           const at::Tensor& argmax_y, const OptionalTensor& g_x,
                                           const OptionalTensor& g_y, std::array<bool, 2> needs,
                                           const Interrupt& interrupt);

}  // namespace fc
