// Late interaction: the forward is one sweep for the maxima; the backward adds up rows of tokens by the argmaxima,
// which the forward kept or another sweep finds again.
#include "max_sim/max_sim.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/input.h"
#include "common/integers.h"
#include "kernels/max_sim_kernels.h"
#include "max_sim/argmax.h"
#include "max_sim/by_item.h"
#include "max_sim/sweep.h"
#include "max_sim/tokens.h"

namespace fc {
namespace {

constexpr int64_t kArgmaxBytes = 8 << 20;         // of argmaxima that the backward finds again at a time
constexpr int64_t kGradientElements = 64 * 1024;  // gradients that one task adds to, which stay in its cache

// An empty result of the direction y, where it is not requested.
at::Tensor no_argmax(int64_t size) {
  return at::empty({0, 0, 0}, index_dtype(size));
}

template <class T>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward_by_item(const TokenProblem& p, int64_t kept_rows,
                                                                           const Interrupt& interrupt) {
  constexpr auto dtype = c10::CppTypeToScalarType<T>::value;
  const Pairs pairs(p);
  const at::Tensor sums = at::empty({pairs.x.items, pairs.columns}, dtype);
  const at::Tensor argmax = at::empty({kept_rows, pairs.columns, pairs.x.length}, index_dtype(pairs.y.length));
  maxima_by_item<T>(pairs, p.smooth, 0, pairs.x.items, {sums.mutable_data_ptr<T>(), pairs.columns, {argmax}},
                    interrupt);
  return {sums, at::empty({0, 0}, dtype), argmax, no_argmax(pairs.x.length)};
}

template <class T>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward(const TokenProblem& p, int64_t kept_rows,
                                                                   const Interrupt& interrupt) {
  constexpr auto dtype = c10::CppTypeToScalarType<T>::value;
  const TokenSide x("x", p.x, p.x_lengths, p.x_order, dtype), y("y", p.y, p.y_lengths, p.y_order, dtype);
  const int64_t m = x.items, n = y.items;
  const at::Tensor x_sums = at::empty({m, n}, dtype), y_sums = at::empty({p.both ? m : 0, p.both ? n : 0}, dtype);
  const MaximaOutput<T> out_x{x_sums.mutable_data_ptr<T>(), n, {empty_argmax(kept_rows, n, x, y)}};
  const MaximaOutput<T> out_y{
      y_sums.mutable_data_ptr<T>(), n, {p.both ? empty_argmax(kept_rows, n, y, x) : no_argmax(x.length)}};
  Sweep<T>(x, y, 0, m, &out_x, p.both ? &out_y : nullptr).run(interrupt);
  return {x_sums, y_sums, out_x.argmax.tensor, out_y.argmax.tensor};
}

// Raises unless `kept` has the argmaxima of the first rows; (M, C) are the sizes of the scores.
void check_kept(const at::Tensor& kept, int64_t m, int64_t columns, int64_t tokens, int64_t others) {
  TORCH_CHECK_VALUE(kept.dim() == 3 && kept.size(0) <= m, "argmaxima: got shape ", kept.sizes(),
                    ", expected 3 dimensions and at most ", m, " rows");
  if (kept.size(0) == 0) return;
  check_sizes("argmaxima", kept, {kept.size(0), columns, tokens});
  check_dtype("argmaxima", kept, index_dtype(others));
}

// One direction of the backward: its gradient (M, N), and the argmaxima of some rows.
template <class T>
struct ArgmaxDirection {
  at::Tensor grad;
  Argmax argmax;

  // `kept` has the argmaxima of the first rows: for each token of `own`, which token of `other` it was.
  ArgmaxDirection(const char* name, const OptionalTensor& g, const at::Tensor& kept, int64_t m, int64_t n,
                  const TokenSide& own, const TokenSide& other) {
    if (!g) return;
    check_sizes(name, *g, {m, n});
    grad = readable(name, *g, c10::CppTypeToScalarType<T>::value);
    check_kept(kept, m, n, own.length, other.length);
    if (kept.size(0)) argmax = {readable("argmaxima", kept, kept.scalar_type())};
  }
  bool asked() const { return grad.defined(); }
  T g(int64_t m, int64_t n) const { return grad.const_data_ptr<T>()[m * grad.size(1) + n]; }
};

// Adds the part of the pair (m, n) to `out`, the gradient of an item with `own` tokens; `in` has the `other` tokens of
// the other item. `by_own` holds for each own token an index into `in`, `by_other` for each other token one into `out`.
template <class T>
void add_pair(int64_t m, int64_t n, T* out, int64_t own, const T* in, int64_t other, int64_t d,
              const ArgmaxDirection<T>& by_own, const ArgmaxDirection<T>& by_other, int32_t* index) {
  if (!own || !other) return;
  if (by_own.asked()) {
    by_own.argmax.get(m, n, index, own, other);
    max_sim_kernels<T>().gather(out, in, index, own, d, by_own.g(m, n));
  }
  if (by_other.asked()) {
    by_other.argmax.get(m, n, index, other, own);
    max_sim_kernels<T>().scatter(out, in, index, other, d, by_other.g(m, n));
  }
}

// Calls f(begin, end) for groups of items, in parallel. A group has at most kGradientElements elements (or one
// item), and fewer if some threads would have no work.
template <class F>
void for_each_group(int64_t items, int64_t elements, const F& f) {
  const int64_t for_cache = std::max<int64_t>(1, kGradientElements / elements);
  const int64_t size = std::clamp<int64_t>(ceil_div(items, 2 * at::get_num_threads()), 1, for_cache);
  at::parallel_for(0, ceil_div(items, size), 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) f(group * size, std::min(items, (group + 1) * size));
  });
}

// Adds the part of items [first, last) of x to dx and dy. dx is computed in parallel over x's items and dy over y's, so
// that each sum is added by one thread in a fixed order.
template <class T>
void accumulate(const TokenSide& x, const TokenSide& y, int64_t first, int64_t last, const ArgmaxDirection<T>& of_x,
                const ArgmaxDirection<T>& of_y, T* dx, T* dy) {
  const int64_t d = x.dim();
  const T *xs = x.tokens.const_data_ptr<T>(), *ys = y.tokens.const_data_ptr<T>();
  if (dx)
    for_each_group(last - first, x.length * d, [&](int64_t begin, int64_t end) {
      std::vector<int32_t> index(std::max(x.length, y.length));
      for (int64_t n = 0; n < y.items; ++n)
        for (int64_t m = first + begin; m < first + end; ++m)
          add_pair(m, n, dx + x.start[m] * d, x.count(m), ys + y.start[n] * d, y.count(n), d, of_x, of_y, index.data());
    });
  if (dy)
    for_each_group(y.items, y.length * d, [&](int64_t begin, int64_t end) {
      std::vector<int32_t> index(std::max(x.length, y.length));
      for (int64_t m = first; m < last; ++m)
        for (int64_t n = begin; n < end; ++n)
          add_pair(m, n, dy + y.start[n] * d, y.count(n), xs + x.start[m] * d, x.count(m), d, of_y, of_x, index.data());
    });
}

template <class T>
std::array<at::Tensor, 2> backward_by_item(const TokenProblem& p, const at::Tensor& argmax, const at::Tensor& g_x,
                                           std::array<bool, 2> needs, const Interrupt& interrupt) {
  const Pairs pairs(p);
  const int64_t m = pairs.x.items, columns = pairs.columns, tokens = pairs.x.length;
  check_sizes("g_x", g_x, {m, columns});
  check_kept(argmax, m, columns, tokens, pairs.y.length);
  const at::Tensor grad = readable("g_x", g_x, c10::CppTypeToScalarType<T>::value);
  const T* g = grad.const_data_ptr<T>();
  std::optional<ItemGradients<T>> x_gradients, y_gradients;
  const ItemGradients<T>* dx = needs[0] ? &x_gradients.emplace(pairs.x) : nullptr;
  const ItemGradients<T>* dy = needs[1] ? &y_gradients.emplace(pairs.y) : nullptr;
  if (p.smooth != 0) {
    smooth_gradients(pairs, p.smooth, g, dx, dy, interrupt);
  } else {
    const int64_t kept = argmax.size(0);
    const Argmax of_kept{readable("argmaxima", argmax, argmax.scalar_type())};
    gradients_of_own(pairs, 0, kept, of_kept, g, dx, dy);
    const int64_t step = std::max<int64_t>(1, kArgmaxBytes / std::max<int64_t>(1, columns * tokens * 4));
    for (int64_t first = kept, last; first < m; first = last) {
      last = std::min(m, first + step);
      const Argmax found{at::empty({last - first, columns, tokens}, index_dtype(pairs.y.length)), first};
      maxima_by_item<T>(pairs, 0, first, last, {nullptr, columns, found}, interrupt);
      gradients_of_own(pairs, first, last, found, g, dx, dy);
    }
  }
  return {dx ? dx->tensor() : at::Tensor(), dy ? dy->tensor() : at::Tensor()};
}

template <class T>
std::array<at::Tensor, 2> backward(const TokenProblem& p, const at::Tensor& argmax_x, const at::Tensor& argmax_y,
                                   const OptionalTensor& g_x, const OptionalTensor& g_y, std::array<bool, 2> needs,
                                   const Interrupt& interrupt) {
  constexpr auto dtype = c10::CppTypeToScalarType<T>::value;
  const TokenSide x("x", p.x, p.x_lengths, p.x_order, dtype), y("y", p.y, p.y_lengths, p.y_order, dtype);
  const int64_t m = x.items, n = y.items, longest = std::max(x.length, y.length);
  const at::Tensor dx = needs[0] ? at::zeros_like(x.tokens) : at::Tensor();
  const at::Tensor dy = needs[1] ? at::zeros_like(y.tokens) : at::Tensor();
  ArgmaxDirection<T> of_x("g_x", g_x, argmax_x, m, n, x, y), of_y("g_y", g_y, argmax_y, m, n, y, x);
  const int64_t kept_x = of_x.asked() ? argmax_x.size(0) : m, kept_y = of_y.asked() ? argmax_y.size(0) : m;
  const int64_t kept = std::min(kept_x, kept_y);

  const int64_t by_work = std::max<int64_t>(16, kWork / std::max<int64_t>(1, n * longest * x.dim()));
  const int64_t by_memory =
      std::max(ceil_div(kBlockTokens, x.length), kArgmaxBytes / std::max<int64_t>(1, n * longest * 4));
  for (int64_t first = 0, last; first < m; first = last) {
    last = first < kept ? std::min(kept, first + by_work) : std::min(m, first + std::min(by_work, by_memory));
    if (first >= kept) {
      if (of_x.asked()) of_x.argmax = {empty_argmax(last - first, n, x, y), first};
      if (of_y.asked()) of_y.argmax = {empty_argmax(last - first, n, y, x), first};
      const MaximaOutput<T> out_x{nullptr, n, of_x.argmax}, out_y{nullptr, n, of_y.argmax};
      Sweep<T>(x, y, first, last, of_x.asked() ? &out_x : nullptr, of_y.asked() ? &out_y : nullptr).run(interrupt);
    }
    accumulate<T>(x, y, first, last, of_x, of_y, needs[0] ? dx.mutable_data_ptr<T>() : nullptr,
                  needs[1] ? dy.mutable_data_ptr<T>() : nullptr);
    interrupt();
  }
  std::array<at::Tensor, 2> grads;
  if (needs[0]) grads[0] = x.unpack(dx, p.x);
  if (needs[1]) grads[1] = y.unpack(dy, p.y);
  return grads;
}

void check(const TokenProblem& p) {
  for (const auto& [name, t] : {std::pair("x", &p.x), std::pair("y", &p.y)}) {
    TORCH_CHECK_VALUE(t->dim() == 3 && t->size(2) == p.x.size(2) && t->size(1) && t->size(2), name, ": got shape ",
                      t->sizes(), ", expected (items, tokens, D) with at least one token, the same D >= 1 for both");
    TORCH_CHECK_TYPE(at::isFloatingType(t->scalar_type()), name, ": got dtype ", t->scalar_type(),
                     ", expected a floating dtype");
  }
  check_dtype("y", p.y, p.x.scalar_type());
  TORCH_CHECK_VALUE(p.own >= 0 && (p.own == 0 || p.y.size(0) == p.x.size(0) * p.own), "own: got ", p.own, " for ",
                    p.x.size(0), " and ", p.y.size(0), " items, expected 0, or as many items of y as x has, times own");
  TORCH_CHECK_VALUE(p.smooth >= 0, "smooth: got ", p.smooth, ", expected at least 0");
  TORCH_CHECK_VALUE(!p.both || !p.by_item(), "both: got true with own or smooth, expected false");
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> max_sim_forward(const TokenProblem& problem,
                                                                           int64_t kept_rows,
                                                                           const Interrupt& interrupt) {
  check(problem);
  TORCH_CHECK_VALUE(kept_rows >= 0 && kept_rows <= problem.x.size(0), "kept_rows: got ", kept_rows, ", expected 0 to ",
                    problem.x.size(0));
  const bool wide = problem.x.scalar_type() == at::kDouble;
  if (problem.by_item())
    return wide ? forward_by_item<double>(problem, kept_rows, interrupt)
                : forward_by_item<float>(problem, kept_rows, interrupt);
  return wide ? forward<double>(problem, kept_rows, interrupt) : forward<float>(problem, kept_rows, interrupt);
}

std::array<at::Tensor, 2> max_sim_backward(const TokenProblem& problem, const at::Tensor& argmax_x,
                                           const at::Tensor& argmax_y, const OptionalTensor& g_x,
                                           const OptionalTensor& g_y, std::array<bool, 2> needs,
                                           const Interrupt& interrupt) {
  check(problem);
  const bool wide = problem.x.scalar_type() == at::kDouble;
  if (problem.by_item()) {
    TORCH_CHECK_VALUE(g_x && !g_y, "g_x, g_y: expected a gradient of the direction x alone");
    return wide ? backward_by_item<double>(problem, argmax_x, *g_x, needs, interrupt)
                : backward_by_item<float>(problem, argmax_x, *g_x, needs, interrupt);
  }
  return wide ? backward<double>(problem, argmax_x, argmax_y, g_x, g_y, needs, interrupt)
              : backward<float>(problem, argmax_x, argmax_y, g_x, g_y, needs, interrupt);
}

}  // namespace fc
