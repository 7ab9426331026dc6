// Memory for the kept products.
#pragma once
#include <ATen/core/Tensor.h>

namespace fc {

// An uninitialised (rows, cols) matrix, from memory that an earlier one gave back where there is such.
at::Tensor reused_matrix(int64_t rows, int64_t cols, const at::TensorOptions& options);

}  // namespace fc
