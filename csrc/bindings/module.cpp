// The extension's functions, as fused_contrastive/backends/cpp.py calls them.
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
#include "autograd/loss.h"
#include "max_sim/max_sim.h"
#include "autograd/normalize.h"
#include "stats/prefixes.h"
#include "stats/stats.h"
#include "kernels/tile_kernels.h"
#include "ranking/ranking.h"

namespace py = pybind11;

namespace {

// Lets Ctrl-C through: at most every 50 ms it takes the GIL for a moment and raises what a signal handler raised.
fc::Interrupt python_interrupt() {
  using Clock = std::chrono::steady_clock;
  return [last = Clock::now()]() mutable {
    if (Clock::now() - last < std::chrono::milliseconds(50)) return;
    last = Clock::now();
    py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  };
}

// Makes a StatsProblem from a StatsSpec (core/spec.py) and its features. Fields are read by name, whatever their order.
fc::StatsProblem problem_of(const at::Tensor& x, const at::Tensor& y, const py::handle& spec) {
  static const std::map<std::string, fc::EqualIds> kEqualIds = {{"exclude", fc::EqualIds::kExclude},
                                                                {"only", fc::EqualIds::kOnly},
                                                                {"negate", fc::EqualIds::kNegate},
                                                                {"apart", fc::EqualIds::kApart},
                                                                {"add", fc::EqualIds::kAdd}};
  fc::StatsProblem p;
  p.x = x, p.y = y, p.scale = spec.attr("scale").cast<at::Tensor>();
  p.for_each_tensor([&](const char* name, fc::OptionalTensor& t) { t = spec.attr(name).cast<fc::OptionalTensor>(); });
  p.paired = spec.attr("paired").cast<bool>();
  p.exclude_self = spec.attr("exclude_self").cast<bool>();
  p.want_row = spec.attr("want_row").cast<bool>(), p.want_col = spec.attr("want_col").cast<bool>();
  p.upper = spec.attr("upper").cast<bool>();
  p.equal_ids = kEqualIds.at(spec.attr("equal_ids").cast<std::string>());
  p.softplus = spec.attr("statistic").cast<std::string>() == "softplus";
  p.teacher = spec.attr("statistic").cast<std::string>() == "teacher";
  p.kept_rows = spec.attr("kept_rows").cast<int64_t>();
  return p;
}

// Makes an fc::RowLoss from the RowLoss of core/spec.py.
fc::RowLoss row_loss_of(const py::handle& loss) {
  return {loss.attr("weight").cast<double>(),
          loss.attr("margin").cast<double>(),
          loss.attr("decoupled").cast<bool>(),
          loss.attr("normalize").cast<bool>(),
          loss.attr("labels").cast<fc::OptionalTensor>(),
          loss.attr("over_counted").cast<bool>()};
}

// The Needs of core/spec.py: whether the gradients of x, y, scale and col_bias are needed, and `joint`.
using Needs = std::array<bool, 5>;
fc::Needs needs_of(const Needs& n) {
  return {{n[0], n[1], n[2], n[3]}, n[4]};
}

auto stats_forward(const at::Tensor& x, const at::Tensor& y, const py::object& spec) {
  const fc::StatsProblem problem = problem_of(x, y, spec);
  const auto interrupt = python_interrupt();
  py::gil_scoped_release release;
  const at::NoGradGuard no_grad;
  return fc::stats_forward(problem, interrupt);
}

auto stats_backward(const at::Tensor& x, const at::Tensor& y, const py::object& spec, const at::Tensor& row,
                    const at::Tensor& col, const at::Tensor& kept, const fc::OptionalTensor& g_pos,
                    const fc::OptionalTensor& g_row, const fc::OptionalTensor& g_col, const Needs& needs) {
  const fc::StatsProblem problem = problem_of(x, y, spec);
  const auto interrupt = python_interrupt();
  py::gil_scoped_release release;
  const at::NoGradGuard no_grad;
  return fc::stats_backward(problem, {row, col, kept}, {g_pos, g_row, g_col}, needs_of(needs), interrupt);
}

using Factors = fc::OptionalTensor;

auto prefixes_forward(const at::Tensor& x, const at::Tensor& y, const py::object& spec,
                      const std::vector<int64_t>& dims, const Factors& row, const Factors& col, int64_t kept_prefixes) {
  const fc::StatsProblem problem = problem_of(x, y, spec);
  const auto interrupt = python_interrupt();
  py::gil_scoped_release release;
  const at::NoGradGuard no_grad;
  return fc::prefixes_forward(problem, {dims, row, col, kept_prefixes}, interrupt);
}

auto prefixes_backward(const at::Tensor& x, const at::Tensor& y, const py::object& spec,
                       const std::vector<int64_t>& dims, const Factors& row_factors, const Factors& col_factors,
                       int64_t kept_prefixes, const at::Tensor& row, const at::Tensor& col, const at::Tensor& kept,
                       const fc::OptionalTensor& g_pos, const fc::OptionalTensor& g_row,
                       const fc::OptionalTensor& g_col, const std::array<bool, 3>& needs) {
  const fc::StatsProblem problem = problem_of(x, y, spec);
  const auto interrupt = python_interrupt();
  py::gil_scoped_release release;
  const at::NoGradGuard no_grad;
  return fc::prefixes_backward(problem, {dims, row_factors, col_factors, kept_prefixes}, {row, col, kept},
                               {g_pos, g_row, g_col}, needs, interrupt);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> row_loss(const at::Tensor& x, const at::Tensor& y,
                                                                    const py::object& spec, const py::object& loss) {
  const fc::StatsProblem problem = problem_of(x, y, spec);
  const fc::RowLoss row_loss = row_loss_of(loss);
  const auto interrupt = python_interrupt();
  const bool same = x.is_same(y);
  py::gil_scoped_release release;
  const fc::RowLossOutput output = fc::row_loss(problem, row_loss, same, interrupt);
  return {output.loss, output.pos, output.ranks.row, output.ranks.col};
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

// Makes a TokenProblem from the TokenSpec of core/tokens.py.
fc::TokenProblem token_problem_of(const at::Tensor& x, const at::Tensor& y, const py::handle& spec) {
  const auto tensor = [&](const char* name) { return spec.attr(name).cast<fc::OptionalTensor>(); };
  return {x,
          y,
          tensor("x_lengths"),
          tensor("y_lengths"),
          tensor("x_order"),
          tensor("y_order"),
          spec.attr("both").cast<bool>(),
          spec.attr("own").cast<int64_t>(),
          spec.attr("smooth").cast<double>()};
}

auto max_sim_forward(const at::Tensor& x, const at::Tensor& y, const py::object& spec) {
  const fc::TokenProblem problem = token_problem_of(x, y, spec);
  const auto kept_rows = spec.attr("kept_rows").cast<int64_t>();
  const auto interrupt = python_interrupt();
  py::gil_scoped_release release;
  const at::NoGradGuard no_grad;
  return fc::max_sim_forward(problem, kept_rows, interrupt);
}

auto max_sim_backward(const at::Tensor& x, const at::Tensor& y, const py::object& spec, const at::Tensor& argmax_x,
                      const at::Tensor& argmax_y, const fc::OptionalTensor& g_x, const fc::OptionalTensor& g_y,
                      std::array<bool, 2> needs) {
  const fc::TokenProblem problem = token_problem_of(x, y, spec);
  const auto interrupt = python_interrupt();
  py::gil_scoped_release release;
  const at::NoGradGuard no_grad;
  return fc::max_sim_backward(problem, argmax_x, argmax_y, g_x, g_y, needs, interrupt);
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
  m.def("stats_forward", &stats_forward);
  m.def("stats_backward", &stats_backward);
  m.def("prefixes_forward", &prefixes_forward);
  m.def("prefixes_backward", &prefixes_backward);
  m.def("row_loss", &row_loss);
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
