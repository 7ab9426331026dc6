// Memory for the kept products and for panels, and for gradients that change their dtype.
#pragma once
#include <ATen/core/Tensor.h>

#include <utility>

namespace fc {

// Returns an uninitialised (rows, cols) matrix, in memory that an earlier one gave back if there is some.
at::Tensor reused_matrix(int64_t rows, int64_t cols, const at::TensorOptions& options);

// Returns uninitialised memory. Up to 1 MB it is a block that an earlier call gave back, if there is some.
at::Tensor small_block(int64_t bytes);

// Converts a matrix (rows, cols) to another dtype. If it is larger than 4 MB and has no other owner, its memory goes
// back to the system part by part, so that the matrix and its copy are never both resident as a whole.
at::Tensor converted(at::Tensor matrix, at::ScalarType dtype);

// Converts two such matrices. If both results fit into the memory of one, they are written there, and it is freed with
// the last of them. That memory does not go back to the system, which would cost page faults in the next step.
std::pair<at::Tensor, at::Tensor> converted(at::Tensor a, at::Tensor b, at::ScalarType a_dtype, at::ScalarType b_dtype);

}  // namespace fc
