// Memory for the kept products, and for gradients that change their dtype.
#pragma once
#include <ATen/core/Tensor.h>

#include <utility>

namespace fc {

// Returns an uninitialised (rows, cols) matrix, in memory that an earlier one gave back if there is some.
at::Tensor reused_matrix(int64_t rows, int64_t cols, const at::TensorOptions& options);

// Converts a matrix (rows, cols) to another dtype. If it is above 4 MB and nobody else reads it, its memory goes back
// to the system meanwhile, so that the two are never resident together.
at::Tensor converted(at::Tensor matrix, at::ScalarType dtype);

// Converts two such matrices. Where both then fit into the memory of one, they are put there, and it is freed with the
// later of them. No memory goes back to the system, which would be page faults of the next step.
std::pair<at::Tensor, at::Tensor> converted(at::Tensor a, at::Tensor b, at::ScalarType a_dtype, at::ScalarType b_dtype);

}  // namespace fc
