// Memory for the kept products, and of gradients that change their dtype.
#pragma once
#include <ATen/core/Tensor.h>

#include <utility>

namespace fc {

// An uninitialised (rows, cols) matrix, from memory that an earlier one gave back where there is such.
at::Tensor reused_matrix(int64_t rows, int64_t cols, const at::TensorOptions& options);

// (rows, cols) in another dtype. Of a matrix above 4 MB that nobody else reads, memory goes back to the system as it is
// converted, so that the two are never resident together.
at::Tensor converted(at::Tensor matrix, at::ScalarType dtype);

// Two such matrices. In half as many bytes both fit where the larger one is, and are put there: no memory goes back to
// the system, which would be page faults of the next step. It is free again when both are.
std::pair<at::Tensor, at::Tensor> converted(at::Tensor a, at::Tensor b, at::ScalarType a_dtype, at::ScalarType b_dtype);

}  // namespace fc
