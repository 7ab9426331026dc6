// The C++ CPU backend: the two functions every backend provides, on ATen tensors.
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
  OptionalTensor col_bias;  // (N,)
  OptionalTensor row_ids;   // (M,) int64, compared with col_ids
  OptionalTensor col_ids;   // (N,) int64
  bool exclude_self;
  bool rows, cols;  // the directions asked
  bool upper;       // only pairs j > i
  EqualIds equal_ids;
  bool softplus;      // sums of softplus, rows alone
  int64_t kept_rows;  // rows of products to keep for the backward
};

using Interrupt = std::function<void()>;  // called between blocks; throws to stop

// pos (M,), row (M,), col (N,) in float64, and the products x @ y.T of the first `kept_rows` rows in float32 (float64
// for float64 features): (kept_rows, N) elements, tile by tile (`kept_offset`), which only `stats_backward` reads. A
// direction that is not asked has 0 elements.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> stats_forward(const Problem& problem,
                                                                         const Interrupt& interrupt);

// dx, dy, dscale, dcol_bias; undefined where `needs` says no. A gradient that is absent is zero. `joint`, where y is x:
// dx is the sum of both, and g_pos absent.
std::array<at::Tensor, 4> stats_backward(const Problem& problem, const at::Tensor& row, const at::Tensor& col,
                                         const at::Tensor& kept, const OptionalTensor& g_pos,
                                         const OptionalTensor& g_row, const OptionalTensor& g_col,
                                         std::array<bool, 4> needs, bool joint, const Interrupt& interrupt);

struct LossAndGradients {
  at::Tensor loss;                  // 0-d float64
  std::array<at::Tensor, 4> grads;  // dx, dy, dscale, dcol_bias in float32 (float64), undefined where not needed
};

// `weight` times the sum over rows of softplus(row - (pos - margin)), or of row - (pos - margin) where decoupled; for
// softplus problems of row + softplus(-pos). And its gradients. Needs rows alone, and all pairs: not `upper`.
// `normalize`: x and y, float32 or float64, are divided by their lengths first.
LossAndGradients stats_at_once(const Problem& problem, double weight, double margin, bool decoupled, bool normalize,
                               std::array<bool, 4> needs, const Interrupt& interrupt);

}  // namespace fc
