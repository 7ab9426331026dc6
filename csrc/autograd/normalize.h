// L2 normalisation of rows as one node of the autograd graph.
#pragma once
#include <ATen/core/Tensor.h>

namespace fc {

// Returns x / max(|x|, 1e-12) along the last dimension, as F.normalize does, for all views one after the other in one
// tensor. They are float32 or float64, on the CPU. The backward writes to the gradient that it is given.
at::Tensor normalize(at::TensorList views);

}  // namespace fc
