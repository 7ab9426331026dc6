// Late interaction: the forward is one sweep for the maxima; the backward adds up rows of tokens by the argmaxima,
// which the forward kept or another sweep finds again.
#include "max_sim/max_sim.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
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

template <class T>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward(const TokenProblem& p, int64_t kept_rows,
                                                                   const Interrupt& interrupt) {
  constexpr auto dtype = c10::CppTypeToScalarType<T>::value;
  const TokenSide x("x", p.x, p.x_lengths, dtype, !p.by_item()), y("y", p.y, p.y_lengths, dtype, !p.by_item());
  const int64_t m = x.items, n = p.columns();
  const at::Tensor x_sums = at::empty({m, n}, dtype), y_sums = at::empty({p.both ? m : 0, p.both ? n : 0}, dtype);
  const MaximaOutput<T> out_x{x_sums.mutable_data_ptr<T>(), n, {empty_argmax(kept_rows, n, x, y)}};
  const MaximaOutput<T> out_y{
      y_sums.mutable_data_ptr<T>(),
      n,
      {p.both ? empty_argmax(kept_rows, n, y, x) : at::empty({0, 0, 0}, index_dtype(x.length))}};
  if (p.by_item())
    maxima_by_item(p, x, y, 0, m, out_x, interrupt);
  else
    Sweep<T>(x, y, 0, m, &out_x, p.both ? &out_y : nullptr).run(interrupt);
  return {x_sums, y_sums, out_x.argmax.tensor, out_y.argmax.tensor};
}

// One direction of the backward: its gradient (M, N), and the argmaxima of some rows.
template <class T>
struct ArgmaxDirection {
  at::Tensor grad;
  Argmax argmax;

  ArgmaxDirection() = default;
  // `kept` has the argmaxima of the first rows: for each token of `own`, which token of `other` it was. n is C.
  ArgmaxDirection(const char* name, const OptionalTensor& g, const at::Tensor& kept, int64_t m, int64_t n,
                  const TokenSide& own, const TokenSide& other) {
    if (!g) return;
    check_sizes(name, *g, {m, n});
    grad = readable(name, *g, c10::CppTypeToScalarType<T>::value);
    TORCH_CHECK_VALUE(kept.dim() == 3 && kept.size(0) <= m, "argmaxima: got shape ", kept.sizes(),
                      ", expected 3 dimensions and at most ", m, " rows");
    if (kept.size(0) == 0) return;
    check_sizes("argmaxima", kept, {kept.size(0), n, own.length});
    check_dtype("argmaxima", kept, index_dtype(other.length));
    argmax = {readable("argmaxima", kept, kept.scalar_type())};
  }
  bool asked() const { return grad.defined(); }
  T g(int64_t m, int64_t n) const { return grad.const_data_ptr<T>()[m * grad.size(1) + n]; }
};

// Adds the part of the pair with the score (m, n) to `out`, the gradient of an item with `own` tokens; `in` has the
// `other` tokens of the other item. `by_own` holds for each own token an index into `in`, `by_other` for each other
// token one into `out`.
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

// The same where each item of x has `own` items of y.
template <class T>
void accumulate_own(const TokenSide& x, const TokenSide& y, int64_t own, int64_t first, int64_t last,
                    const ArgmaxDirection<T>& of_x, T* dx, T* dy) {
  const int64_t d = x.dim();
  const ArgmaxDirection<T> none;
  if (dx)
    for_each_group(last - first, x.length * d, [&](int64_t begin, int64_t end) {
      std::vector<int32_t> index(x.length);
      for (int64_t m = first + begin; m < first + end; ++m)
        for (int64_t k = 0, n = m * own; k < own; ++k, ++n)
          add_pair(m, k, dx + x.start[m] * d, x.count(m), y.item<T>(n), y.count(n), d, of_x, none, index.data());
    });
  if (dy)
    for_each_group((last - first) * own, y.length * d, [&](int64_t begin, int64_t end) {
      std::vector<int32_t> index(x.length);
      for (int64_t n = first * own + begin; n < first * own + end; ++n) {
        const int64_t m = n / own;
        add_pair(m, n % own, dy + y.start[n] * d, y.count(n), x.item<T>(m), x.count(m), d, none, of_x, index.data());
      }
    });
}

template <class T>
std::array<at::Tensor, 2> backward(const TokenProblem& p, const at::Tensor& argmax_x, const at::Tensor& argmax_y,
                                   const OptionalTensor& g_x, const OptionalTensor& g_y, std::array<bool, 2> needs,
                                   const Interrupt& interrupt) {
  constexpr auto dtype = c10::CppTypeToScalarType<T>::value;
  const TokenSide x("x", p.x, p.x_lengths, dtype, !p.by_item()), y("y", p.y, p.y_lengths, dtype, !p.by_item());
  const int64_t m = x.items, n = p.columns(), longest = std::max(x.length, y.length);
  const at::Tensor dx = needs[0] ? at::zeros_like(x.tokens) : at::Tensor();
  const at::Tensor dy = needs[1] ? at::zeros_like(y.tokens) : at::Tensor();
  T *const dx_data = needs[0] ? dx.mutable_data_ptr<T>() : nullptr, *const dy_data =
                                                                        needs[1] ? dy.mutable_data_ptr<T>() : nullptr;
  const auto unpacked = [&] {
    std::array<at::Tensor, 2> grads;
    if (needs[0]) grads[0] = x.unpack(dx, p.x);
    if (needs[1]) grads[1] = y.unpack(dy, p.y);
    return grads;
  };
  ArgmaxDirection<T> of_x("g_x", g_x, argmax_x, m, n, x, y), of_y("g_y", g_y, argmax_y, m, n, y, x);
  if (p.smooth) {
    if (of_x.asked()) smooth_backward(p, x, y, of_x.grad.template const_data_ptr<T>(), dx_data, dy_data, interrupt);
    return unpacked();
  }
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
      if (p.by_item())
        maxima_by_item(p, x, y, first, last, out_x, interrupt);
      else
        Sweep<T>(x, y, first, last, of_x.asked() ? &out_x : nullptr, of_y.asked() ? &out_y : nullptr).run(interrupt);
    }
    if (p.own)
      accumulate_own(x, y, p.own, first, last, of_x, dx_data, dy_data);
    else
      accumulate(x, y, first, last, of_x, of_y, dx_data, dy_data);
    interrupt();
  }
  return unpacked();
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
  return problem.x.scalar_type() == at::kDouble ? forward<double>(problem, kept_rows, interrupt)
                                                : forward<float>(problem, kept_rows, interrupt);
}

std::array<at::Tensor, 2> max_sim_backward(const TokenProblem& problem, const at::Tensor& argmax_x,
                                           const at::Tensor& argmax_y, const OptionalTensor& g_x,
                                           const OptionalTensor& g_y, std::array<bool, 2> needs,
                                           const Interrupt& interrupt) {
  check(problem);
  return problem.x.scalar_type() == at::kDouble
             ? backward<double>(problem, argmax_x, argmax_y, g_x, g_y, needs, interrupt)
             : backward<float>(problem, argmax_x, argmax_y, g_x, g_y, needs, interrupt);
}

}  // namespace fc
