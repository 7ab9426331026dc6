// Late interaction pair by pair, each by one thread: for items of x that have items of y of their own, and for smooth
// maxima. In the products of a pair y's tokens are the rows, and x's the columns, a panel of them at a time.
#pragma once
#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/integers.h"
#include "common/interrupt.h"
#include "common/parallel.h"
#include "kernels/max_sim_kernels.h"
#include "max_sim/item_products.h"
#include "max_sim/max_sim.h"
#include "max_sim/sweep.h"
#include "max_sim/tokens.h"

namespace fc {

constexpr int64_t kWork = int64_t{1} << 31;  // multiplications between two interrupts

// The products of one thread's pairs.
template <class T>
class PairProducts {
 public:
  PairProducts(const TokenSide& x, const TokenSide& y) : x_(x), y_(y) {}

  // Calls f(first, cols, products) for each panel of the tokens of x's item m. Its products with the tokens of y's item
  // n are (rows, cols), with rows of width() elements.
  template <class F>
  void for_each_panel(int64_t m, int64_t n, const F& f) {
    const int64_t d = x_.dim(), tokens = x_.count(m), rows = y_.count(n), width = ItemPanels<T>::width();
    if (!tokens || !rows) return;
    if (m != packed_) panels_.set_transposed(x_.item<T>(m), tokens, d);
    packed_ = m;
    T* products = products_.of(rows * width);
    for (int64_t first = 0; first < tokens; first += width) {
      const int64_t cols = std::min(width, tokens - first);
      ItemPanels<T>::multiply(rows, cols, d, y_.item<T>(n), d, 1, panels_.panel(first), products, width, false);
      f(first, cols, products);
    }
  }

 private:
  const TokenSide &x_, &y_;
  int64_t packed_ = -1;  // the item in panels_
  ItemPanels<T> panels_;
  Scratch<T> products_;
};

// Calls f(begin, end) for parts of [first, last) in parallel, for each of a multiplications' number `work`, and
// `interrupt` between blocks of them.
template <class F>
void in_blocks(int64_t first, int64_t last, int64_t work, const Interrupt& interrupt, const F& f) {
  const int64_t size = std::max<int64_t>(4 * at::get_num_threads(), kWork / std::max<int64_t>(1, work));
  for (int64_t begin = first; begin < last; begin += size) {
    f(begin, std::min(last, begin + size));
    interrupt();
  }
}

// The multiplications of one pair, if its items have no padding.
inline int64_t work_of_pair(const TokenSide& x, const TokenSide& y) {
  return x.length * y.length * x.dim();
}

// Takes the maxima, smooth or not, over the tokens of y, for items [first, last) of x.
template <class T>
void maxima_by_item(const TokenProblem& p, const TokenSide& x, const TokenSide& y, int64_t first, int64_t last,
                    const MaximaOutput<T>& out, const Interrupt& interrupt) {
  const int64_t width = ItemPanels<T>::width(), columns = p.columns();
  out.clear(first, last);
  const auto take = [&](int64_t m, int64_t begin, int64_t end) {
    PairProducts<T> pair(x, y);
    std::vector<T> best(width), sum(width);
    std::vector<int32_t> index(width);
    for (int64_t c = begin; c < end; ++c) {
      const int64_t n = p.own ? m * p.own + c : c, rows = y.count(n);
      pair.for_each_panel(m, n, [&](int64_t from, int64_t cols, T* s) {
        if (p.smooth) {
          max_sim_kernels<T>().column_sums(s, width, rows, cols, T(1 / p.smooth), best.data(), sum.data());
          for (int64_t j = 0; j < cols; ++j)  // where all products are -inf, the sum is 0
            best[j] += sum[j] == 0 ? T(0) : static_cast<T>(p.smooth * std::log(static_cast<double>(sum[j])));
        } else {
          max_sim_kernels<T>().column_maxima(s, width, rows, cols, 0, best.data(), index.data());
        }
        out.add(m, c, from, best.data(), index.data(), cols);
      });
    }
  };
  in_blocks(first, last, columns * work_of_pair(x, y), interrupt, [&](int64_t begin, int64_t end) {
    // A task is an item of x with all items of y, or with a part of them if there are more threads than tasks.
    const int64_t parts = std::clamp<int64_t>(4 * at::get_num_threads() / (end - begin), 1, columns);
    for_each_task((end - begin) * parts, [&](int64_t task) {
      const int64_t part = task % parts;
      take(begin + task / parts, columns * part / parts, columns * (part + 1) / parts);
    });
  });
}

// Adds up the gradients of one thread's pairs, for smooth maxima: the weights of a pair's products are their softmax
// over y's tokens.
template <class T>
class SmoothGradients {
 public:
  SmoothGradients(const TokenSide& x, const TokenSide& y, double tau)
      : x_(x), y_(y), inverse_(1 / tau), pair_(x, y), top_(width()), sum_(width()) {}

  // Adds the part of a pair of items, whose score has the gradient g, to dx (D, the item's tokens) and to dy (the
  // item's tokens, D). Either may be null.
  void add(int64_t m, int64_t n, T g, T* dx, T* dy) {
    const int64_t d = x_.dim(), tokens = x_.count(m), rows = y_.count(n);
    pair_.for_each_panel(m, n, [&](int64_t first, int64_t cols, T* s) {
      max_sim_kernels<T>().column_sums(s, width(), rows, cols, inverse_, top_.data(), sum_.data());
      for (int64_t j = 0; j < cols; ++j) sum_[j] = sum_[j] == 0 ? T(0) : g / sum_[j];
      max_sim_kernels<T>().column_weights(s, width(), rows, cols, inverse_, top_.data(), sum_.data());
      // The weights are a panel themselves.
      if (dx) ItemPanels<T>::multiply(d, cols, rows, y_.item<T>(n), 1, d, s, dx + first, tokens, true);
      if (!dy) return;
      rows_.set(x_.item<T>(m) + first * d, cols, d);
      ItemPanels<T>::multiply(rows, d, cols, s, width(), 1, rows_.panel(0), dy, d, true);
    });
  }

 private:
  static int64_t width() { return ItemPanels<T>::width(); }

  const TokenSide &x_, &y_;
  T inverse_;
  PairProducts<T> pair_;
  std::vector<T> top_, sum_;
  ItemPanels<T> rows_;
};

// Adds the gradients of smooth maxima to dx and dy, in the layout of the tokens; g is (M, C). Each sum is added up by
// one task in a fixed order. If all pairs are scored, the tasks of dx and those of dy make the products apart.
template <class T>
void smooth_backward(const TokenProblem& p, const TokenSide& x, const TokenSide& y, const T* g, T* dx, T* dy,
                     const Interrupt& interrupt) {
  const int64_t d = x.dim(), columns = p.columns(), work = work_of_pair(x, y);
  const bool x_tasks = dx || p.own;
  if (x_tasks)
    in_blocks(0, x.items, 3 * columns * work, interrupt, [&](int64_t begin, int64_t end) {
      for_each_task(end - begin, [&](int64_t task) {
        const int64_t m = begin + task, tokens = x.count(m);
        SmoothGradients<T> gradients(x, y, p.smooth);
        std::vector<T> transposed(dx ? d * tokens : 0);
        for (int64_t c = 0; c < columns; ++c) {
          const int64_t n = p.own ? m * p.own + c : c;
          gradients.add(m, n, g[m * columns + c], dx ? transposed.data() : nullptr,
                        dy && p.own ? dy + y.start[n] * d : nullptr);
        }
        for (int64_t t = 0; dx && t < tokens; ++t)
          for (int64_t k = 0; k < d; ++k) dx[(x.start[m] + t) * d + k] = transposed[k * tokens + t];
      });
    });
  if (dy && !p.own)
    in_blocks(0, y.items, 2 * x.items * work, interrupt, [&](int64_t begin, int64_t end) {
      for_each_task(end - begin, [&](int64_t task) {
        const int64_t n = begin + task;
        SmoothGradients<T> gradients(x, y, p.smooth);
        for (int64_t m = 0; m < x.items; ++m) gradients.add(m, n, g[m * columns + n], nullptr, dy + y.start[n] * d);
      });
    });
}

}  // namespace fc
