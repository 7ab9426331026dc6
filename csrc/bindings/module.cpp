// The Python face of the C++ backend (fused_contrastive/backends/cpp.py calls it).
#include <torch/csrc/autograd/grad_mode.h>
#include <torch/csrc/utils/pybind.h>

#include <ATen/ATen.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "autograd/cross_entropy.h"
#include "max_sim/max_sim.h"
#include "autograd/normalize.h"
#include "stats/stats.h"
#include "kernels/tile_kernels.h"
#include "ranking/ranking.h"

namespace py = pybind11;

namespace {

// Lets Ctrl-C through: at most every 50 ms, takes the GIL for a moment and raises what a signal handler raised.
fc::Interrupt python_interrupt() {
  using Clock = std::chrono::steady_clock;
  return [last = Clock::now()]() mutable {
    if (Clock::now() - last < std::chrono::milliseconds(50)) return;
    last = Clock::now();
    py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  };
}

// A StatsSpec (core/spec.py) and its features.
fc::Problem problem(at::Tensor x, at::Tensor y, at::Tensor scale, fc::OptionalTensor targets,
                    fc::OptionalTensor col_bias, fc::OptionalTensor row_ids, fc::OptionalTensor col_ids,
                    bool exclude_self, bool rows, bool cols, bool upper, const std::string& equal_ids,
                    const std::string& reduction, int64_t kept_rows) {
  static const std::map<std::string, fc::EqualIds> kEqualIds = {
      {"exclude", fc::EqualIds::kExclude}, {"only", fc::EqualIds::kOnly}, {"negate", fc::EqualIds::kNegate}};
  return {x,
          y,
          scale,
          targets,
          col_bias,
          row_ids,
          col_ids,
          exclude_self,
          rows,
          cols,
          upper,
          kEqualIds.at(equal_ids),
          reduction == "softplus",
          kept_rows};
}

auto forward(const fc::Problem& problem) {
  const auto interrupt = python_interrupt();
  py::gil_scoped_release release;
  const at::NoGradGuard no_grad;
  return fc::stats_forward(problem, interrupt);
}

auto backward(const fc::Problem& problem, at::Tensor row, at::Tensor col, at::Tensor kept, fc::OptionalTensor g_pos,
              fc::OptionalTensor g_row, fc::OptionalTensor g_col, std::array<bool, 4> needs, bool joint) {
  const auto interrupt = python_interrupt();
  py::gil_scoped_release release;
  const at::NoGradGuard no_grad;
  return fc::stats_backward(problem, row, col, kept, g_pos, g_row, g_col, needs, joint, interrupt);
}

auto at_once(const fc::Problem& problem, double weight, double margin, bool decoupled, bool normalize,
             std::array<bool, 4> needs) {
  const auto interrupt = python_interrupt();
  py::gil_scoped_release release;
  const at::NoGradGuard no_grad;
  auto [loss, grads] = fc::stats_at_once(problem, weight, margin, decoupled, normalize, needs, interrupt);
  return std::make_tuple(loss, grads);
}

at::Tensor cross_entropy(const at::Tensor& pos, const std::vector<at::Tensor>& normalisers, bool decoupled,
                         const std::string& reduction, at::ScalarType dtype) {
  py::gil_scoped_release release;
  return fc::cross_entropy(pos, normalisers, decoupled, reduction, dtype);
}

at::Tensor normalize(const std::vector<at::Tensor>& views) {
  py::gil_scoped_release release;
  return fc::normalize(views);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> max_sim_forward(at::Tensor x, at::Tensor y,
                                                                           fc::OptionalTensor x_lengths,
                                                                           fc::OptionalTensor y_lengths, bool both,
                                                                           int64_t kept_rows) {
  const auto interrupt = python_interrupt();
  py::gil_scoped_release release;
  const at::NoGradGuard no_grad;
  return fc::max_sim_forward({x, y, x_lengths, y_lengths, both}, kept_rows, interrupt);
}

std::array<at::Tensor, 2> max_sim_backward(at::Tensor x, at::Tensor y, fc::OptionalTensor x_lengths,
                                           fc::OptionalTensor y_lengths, at::Tensor argmax_x, at::Tensor argmax_y,
                                           fc::OptionalTensor g_x, fc::OptionalTensor g_y, std::array<bool, 2> needs) {
  const auto interrupt = python_interrupt();
  py::gil_scoped_release release;
  const at::NoGradGuard no_grad;
  return fc::max_sim_backward({x, y, x_lengths, y_lengths, g_y.has_value()}, argmax_x, argmax_y, g_x, g_y, needs,
                              interrupt);
}

void merge_top_k(const at::Tensor& scores, int64_t first_column, const at::Tensor& values, const at::Tensor& indices) {
  py::gil_scoped_release release;
  fc::merge_top_k(scores, first_column, values, indices);
}

void count_ahead(const at::Tensor& scores, int64_t first_column, const at::Tensor& target_scores,
                 const at::Tensor& targets, const at::Tensor& counts) {
  py::gil_scoped_release release;
  fc::count_ahead(scores, first_column, target_scores, targets, counts);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "C++ CPU backend of fused_contrastive";
  py::class_<fc::Problem>(m, "Problem").def(py::init(&problem));
  m.def("stats_forward", &forward);
  m.def("stats_backward", &backward);
  m.def("stats_at_once", &at_once);
  m.def("cross_entropy", &cross_entropy);
  m.def("normalize", &normalize);
  m.def("max_sim_forward", &max_sim_forward);
  m.def("max_sim_backward", &max_sim_backward);
  m.def("merge_top_k", &merge_top_k);
  m.def("count_ahead", &count_ahead);
  m.def("vector_level", &fc::vector_level, "instruction set of the vector kernels on this CPU");
#ifdef _OPENMP
  m.attr("parallel") = true;
#else
  m.attr("parallel") = false;
#endif
}
