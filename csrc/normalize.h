// L2 normalisation of rows as one node of the autograd graph.
#pragma once
#include <ATen/core/Tensor.h>

namespace fc {

// x / max(|x|, 1e-12) along the last dimension, as F.normalize has it. float32 or float64, on the CPU.
at::Tensor normalize(const at::Tensor& x);

}  // namespace fc
