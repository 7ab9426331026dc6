// Ranking: the best k of each row and the number of columns ahead of a target, block by block of a score matrix. The
// order is as in core/order.py: higher scores first, equal scores by the smaller column, NaN last.
#pragma once
#include <ATen/core/Tensor.h>

namespace fc {

// Merges a block of scores (M, n), whose first column is `first_column`, into the best k of each row: `values` (M, k)
// in the scores' dtype and `indices` (M, k) int64, best first. Blocks must come in the order of their columns; the
// first min(first_column, k) places of `values` and `indices` hold the best of the blocks before.
void merge_top_k(const at::Tensor& scores, int64_t first_column, const at::Tensor& values, const at::Tensor& indices);

// Adds to `counts` (M,) int64 how many columns of the block rank ahead of each row's target: column `targets` (M,)
// int64 of the whole matrix, with score `target_scores` (M,). Blocks may come in any order.
void count_ahead(const at::Tensor& scores, int64_t first_column, const at::Tensor& target_scores,
                 const at::Tensor& targets, const at::Tensor& counts);

}  // namespace fc
