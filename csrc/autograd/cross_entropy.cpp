// The loss is one node because as separate operations, six forward and eight backward, it takes longer than the matrix
// products of a batch of 100 pairs.
#include "autograd/cross_entropy.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "common/input.h"
#include "common/loss_term.h"

namespace fc {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::Tensor double_vector(const char* name, const at::Tensor& t, int64_t size) {
  check_sizes(name, t, {size});
  return readable(name, t, at::kDouble);
}

struct CrossEntropy : torch::autograd::Function<CrossEntropy> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& pos, at::TensorList normalisers, bool decoupled,
                            const std::string& reduction, at::ScalarType dtype) {
    variable_list saved{pos};
    saved.insert(saved.end(), normalisers.begin(), normalisers.end());
    ctx->save_for_backward(saved);
    const int64_t m = pos.numel(), directions = static_cast<int64_t>(normalisers.size());
    const int64_t averaged = reduction == "mean" ? directions * m : directions;
    ctx->saved_data["averaged"] = averaged;
    ctx->saved_data["decoupled"] = decoupled;

    const at::Tensor positive = double_vector("pos", pos, m), loss = at::zeros({m}, positive.options());
    const double* p = positive.const_data_ptr<double>();
    double* out = loss.mutable_data_ptr<double>();
    for (const at::Tensor& t : normalisers) {
      const at::Tensor normaliser = double_vector("normaliser", t, m);
      const double* n = normaliser.const_data_ptr<double>();
      for (int64_t i = 0; i < m; ++i) out[i] += loss_term(n[i] - p[i], decoupled);
    }
    return (reduction == "none" ? loss : loss.sum()).div_(averaged).to(dtype);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    const variable_list saved = ctx->get_saved_variables();
    const bool decoupled = ctx->saved_data["decoupled"].toBool();
    const auto averaged = static_cast<double>(ctx->saved_data["averaged"].toInt());
    if (at::GradMode::is_enabled()) return recorded(saved, decoupled, upstream[0] / averaged);
    const int64_t m = saved[0].numel(), step = upstream[0].dim() ? 1 : 0;  // a scalar has one gradient for all rows
    const at::Tensor positive = double_vector("pos", saved[0], m), g_pos = at::zeros_like(positive);
    const at::Tensor g = readable("gradient", upstream[0], at::kDouble);
    TORCH_CHECK_VALUE(g.numel() == (step ? m : 1), "gradient: got shape ", g.sizes(),
                      ", expected the shape of the loss");
    const double *p = positive.const_data_ptr<double>(), *g_loss = g.const_data_ptr<double>();
    double* out_pos = g_pos.mutable_data_ptr<double>();

    variable_list grads{g_pos};
    for (size_t k = 1; k < saved.size(); ++k) {
      const at::Tensor normaliser = double_vector("normaliser", saved[k], m), g_normaliser = at::empty_like(normaliser);
      const double* n = normaliser.const_data_ptr<double>();
      double* out = g_normaliser.mutable_data_ptr<double>();
      for (int64_t i = 0; i < m; ++i) {
        out[i] = g_loss[i * step] / averaged * loss_term_gradient(n[i] - p[i], decoupled);
        out_pos[i] -= out[i];
      }
      grads.push_back(g_normaliser);
    }
    grads.resize(grads.size() + kOptions);
    return grads;
  }

 private:
  static constexpr size_t kOptions = 3;  // inputs without a gradient: decoupled, reduction, dtype

  // Computes the same gradients by operations that autograd records, for create_graph=True.
  static variable_list recorded(const variable_list& saved, bool decoupled, const at::Tensor& g) {
    variable_list grads{at::zeros_like(saved[0])};
    for (size_t k = 1; k < saved.size(); ++k) {
      const at::Tensor share = decoupled ? at::ones_like(saved[k]) : at::sigmoid(saved[k] - saved[0]);
      grads.push_back(share * g);
      grads[0] = grads[0] - grads.back();
    }
    grads.resize(grads.size() + kOptions);
    return grads;
  }
};

}  // namespace

at::Tensor cross_entropy(const at::Tensor& pos, const std::vector<at::Tensor>& normalisers, bool decoupled,
                         const std::string& reduction, at::ScalarType dtype) {
  return CrossEntropy::apply(pos, at::TensorList(normalisers), decoupled, reduction, dtype);
}

}  // namespace fc
