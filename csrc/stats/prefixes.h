// Statistics of the prefixes of features, from one set of products: what backends/contract.py asks of a backend.
#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <tuple>
#include <vector>

#include "common/input.h"
#include "common/interrupt.h"
#include "stats/stats.h"

namespace fc {

// Prefix k is the first dims[k] elements of the features; its logits are scale * row[k, i] * col[k, j] times the
// product of the prefixes of x[i] and y[j]. dims grow, are multiples of 32, and the last is D.
struct Prefixes {
  std::vector<int64_t> dims;
  OptionalTensor row, col;  // (P, M), (P, N), both or neither
  int64_t kept;             // of how many of the longest prefixes cosines are kept
};

// Returns pos (P, M), row (P, M) and col (P, N) as `stats_forward` does for one prefix, and the cosines, products times
// factors, of the first `kept_rows` rows, (kept_rows, kept * N) elements.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> prefixes_forward(const StatsProblem& problem,
                                                                            const Prefixes& prefixes,
                                                                            const Interrupt& interrupt);

// The gradients of x, y and scale, undefined where not needed. Factors, if given, are one over the prefixes' norms,
// or 0; the gradients are then of the features before the division.
using PrefixGradients = std::array<at::Tensor, 3>;

PrefixGradients prefixes_backward(const StatsProblem& problem, const Prefixes& prefixes, const Saved& saved,
                                  const Upstream& upstream, const std::array<bool, 3>& needs,
                                  const Interrupt& interrupt);

}  // namespace fc
