#include "autograd/loss.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <utility>

namespace fc {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr size_t kDifferentiable = 4;  // x, y, scale, col_bias

at::Tensor or_undefined(const OptionalTensor& t) {
  return t.value_or(at::Tensor());
}
OptionalTensor or_none(const at::Tensor& t) {
  return t.defined() ? OptionalTensor(t) : std::nullopt;
}

// What the node holds beside the saved tensors: the problem without its tensors, and the gradients until a backward
// takes them.
struct State : torch::CustomClassHolder {
  StatsProblem problem;
  RowLoss loss;
  Needs needs;
  Interrupt interrupt;
  Gradients grads;
  RowLossOutput output;
};

// Returns the first `count` tensors, which are gradients, as functions of the others, which are their inputs.
// Differentiating the result raises an error that says so.
struct OnceDifferentiable : torch::autograd::Function<OnceDifferentiable> {
  static variable_list forward(AutogradContext*, at::TensorList grads_and_inputs, size_t count) {
    variable_list grads;
    for (size_t i = 0; i < count; ++i) grads.push_back(grads_and_inputs[i].view_as(grads_and_inputs[i]));
    return grads;
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false,
                "fused_contrastive: double backward is not supported (a gradient of the gradients was requested, for "
                "example by create_graph=True or a gradient penalty); use the eager formula for that term");
  }
};

variable_list once_differentiable(variable_list grads, const variable_list& inputs) {
  variable_list defined;
  for (const variable_list* tensors : {&std::as_const(grads), &inputs})
    for (size_t i = 0; i < grads.size(); ++i)
      if ((*tensors)[i].defined()) defined.push_back((*tensors)[i]);
  const auto count =
      static_cast<size_t>(std::count_if(grads.begin(), grads.end(), [](const at::Tensor& g) { return g.defined(); }));
  const variable_list marked = OnceDifferentiable::apply(at::TensorList(defined), count);
  size_t next = 0;
  for (at::Tensor& g : grads)
    if (g.defined()) g = marked[next++];
  return grads;
}

struct GradientsInTheForward : torch::autograd::Function<GradientsInTheForward> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& y, const at::Tensor& scale,
                            const OptionalTensor& col_bias, c10::intrusive_ptr<State> state) {
    StatsProblem& p = state->problem;
    variable_list saved{x, y, scale, or_undefined(col_bias), or_undefined(state->loss.labels)};
    p.for_each_tensor([&](const char*, const OptionalTensor& t) { saved.push_back(or_undefined(t)); });
    ctx->save_for_backward(saved);
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    auto [value, grads, pos, ranks] = loss_and_gradients(p, state->loss, state->needs, state->interrupt);
    state->grads = std::move(grads);
    state->output = {at::Tensor(), std::move(pos), std::move(ranks)};
    p.x = p.y = p.scale = at::Tensor();
    p.for_each_tensor([](const char*, OptionalTensor& t) { t = std::nullopt; });
    state->loss.labels = std::nullopt;
    ctx->saved_data["state"] = c10::IValue::make_capsule(std::move(state));
    return at::scalar_tensor(value, at::kDouble).to(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    const variable_list saved = ctx->get_saved_variables();  // throws where the graph has been freed
    const auto state = c10::static_intrusive_pointer_cast<State>(ctx->saved_data["state"].toCapsule());
    // The gradients are scaled in place and handed out. A second backward through a retained graph forms them again.
    Gradients grads = std::exchange(state->grads, {});
    if (!grads[0].defined() && !grads[1].defined() && !grads[2].defined() && !grads[3].defined()) {
      StatsProblem p = state->problem;
      p.x = saved[0], p.y = state->needs.joint ? saved[0] : saved[1], p.scale = saved[2];
      RowLoss loss = state->loss;
      loss.labels = or_none(saved[kDifferentiable]);
      size_t next = kDifferentiable + 1;
      p.for_each_tensor([&](const char*, OptionalTensor& t) { t = or_none(saved[next++]); });
      const at::NoGradGuard no_grad;
      const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
      grads = loss_and_gradients(p, loss, state->needs, state->interrupt).grads;
    }
    const double factor = upstream[0].item<double>();
    variable_list out;
    for (size_t i = 0; i < kDifferentiable; ++i) {
      at::Tensor& g = grads[i];
      if (g.defined()) {
        if (factor != 1) g.mul_(factor);
        g = g.to(saved[i].scalar_type());
      }
      out.push_back(std::move(g));
    }
    if (at::GradMode::is_enabled()) out = once_differentiable(std::move(out), saved);
    out.emplace_back();  // the state
    return out;
  }
};

}  // namespace

RowLossOutput row_loss(const StatsProblem& problem, const RowLoss& loss, bool same, const Interrupt& interrupt) {
  const auto needed = [](const at::Tensor& t) { return t.defined() && t.requires_grad(); };
  Needs needs{{needed(problem.x), needed(problem.y), needed(problem.scale), needed(or_undefined(problem.col_bias))},
              false};
  if (same && needs.of[0] && !needs.of[3]) {
    needs.joint = true;
    needs.of[1] = false;
  }
  auto state = c10::make_intrusive<State>();
  state->problem = problem, state->loss = loss, state->needs = needs, state->interrupt = interrupt;
  at::Tensor value = GradientsInTheForward::apply(problem.x, problem.y, problem.scale, problem.col_bias, state);
  RowLossOutput output = std::move(state->output);
  output.loss = std::move(value);
  return output;
}

}  // namespace fc
