// Memory for the kept products, and of gradients that change their dtype.
#pragma once
#include <ATen/core/Tensor.h>

namespace fc {

// An uninitialised (rows, cols) matrix, from memory that an earlier one gave back where there is such.
at::Tensor reused_matrix(int64_t rows, int64_t cols, const at::TensorOptions& options);

// A matrix of zeros that `converted` is to take: a large one of huge pages, if the system has them to give. Of small
// ones, page faults would take a fiftieth of a step.
at::Tensor zeros_to_convert(int64_t rows, int64_t cols, const at::TensorOptions& options);

// (rows, cols) in another dtype. Of a large matrix, above 4 MB, that nobody else reads, memory goes back to the system
// as it is converted, so that the two are never resident together.
at::Tensor converted(at::Tensor matrix, at::ScalarType dtype);

}  // namespace fc
