// The last step of most losses, on vectors of statistics, as one node of the autograd graph.
#pragma once
#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

namespace fc {

// The formula of backends/defaults.py: the mean over the normalisers of softplus(normaliser - pos), or of the
// difference itself where decoupled, reduced over the rows. pos and each normaliser are (M,) on the CPU.
at::Tensor cross_entropy(const at::Tensor& pos, const std::vector<at::Tensor>& normalisers, bool decoupled,
                         const std::string& reduction, at::ScalarType dtype);

}  // namespace fc
