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
#include "max_sim/items.h"
#include "max_sim/max_sim.h"
#include "max_sim/sweep.h"

namespace fc {

constexpr int64_t kWork = int64_t{1} << 31;  // multiplications between two interrupts

// The items of both sides, and which are paired.
struct Pairs {
  ItemSide x, y;
  int64_t own, columns;  // as in TokenProblem

  explicit Pairs(const TokenProblem& p)
      : x("x", p.x, p.x_lengths, p.x_order), y("y", p.y, p.y_lengths, p.y_order), own(p.own), columns(p.columns()) {}

  // The item of y with x's item m in column c of the scores.
  int64_t y_item(int64_t m, int64_t c) const { return own ? m * own + c : c; }
  bool is_empty(int64_t m, int64_t n) const { return !x.count(m) || !y.count(n); }
  // The multiplications of one pair, if its items have no padding.
  int64_t work() const { return x.length * y.length * x.d; }
};

// The products of one thread's pairs.
template <class T>
class PairProducts {
 public:
  explicit PairProducts(const Pairs& pairs) : pairs_(pairs), x_(pairs.x), y_(pairs.y) {}

  const T* x(int64_t m) { return x_.read(m); }
  const T* y(int64_t n) { return y_.read(n); }

  // Calls f(first, cols, products) for each panel of the tokens of x's item m. Its products with the tokens of y's item
  // n are (rows, cols), with rows of width() elements.
  template <class F>
  void for_each_panel(int64_t m, int64_t n, const F& f) {
    if (pairs_.is_empty(m, n)) return;
    const int64_t d = pairs_.x.d, tokens = pairs_.x.count(m), rows = pairs_.y.count(n), width = ItemPanels<T>::width();
    if (m != packed_) panels_.set_transposed(x(m), tokens, d);
    packed_ = m;
    T* products = products_.of(rows * width);
    for (int64_t first = 0; first < tokens; first += width) {
      const int64_t cols = std::min(width, tokens - first);
      ItemPanels<T>::multiply(rows, cols, d, y(n), d, 1, panels_.panel(first), products, width, false);
      f(first, cols, products);
    }
  }

 private:
  const Pairs& pairs_;
  ItemReader<T> x_, y_;
  int64_t packed_ = -1;  // the item in panels_
  ItemPanels<T> panels_;
  Scratch<T> products_;
};

// Calls f(begin, end) for parts of [first, last), of which each one takes `work` multiplications, and `interrupt`
// between them.
template <class F>
void in_blocks(int64_t first, int64_t last, int64_t work, const Interrupt& interrupt, const F& f) {
  const int64_t size = std::max<int64_t>(4 * at::get_num_threads(), kWork / std::max<int64_t>(1, work));
  for (int64_t begin = first; begin < last; begin += size) {
    f(begin, std::min(last, begin + size));
    interrupt();
  }
}

// Takes the maxima over the tokens of y, or with tau the smooth ones, for items [first, last) of x.
template <class T>
void maxima_by_item(const Pairs& pairs, double tau, int64_t first, int64_t last, const MaximaOutput<T>& out,
                    const Interrupt& interrupt) {
  const int64_t width = ItemPanels<T>::width(), columns = pairs.columns;
  out.clear(first, last);
  const auto take = [&](int64_t m, int64_t begin, int64_t end) {
    PairProducts<T> pair(pairs);
    std::vector<T> best(width), sum(width);
    std::vector<int32_t> index(width);
    for (int64_t c = begin; c < end; ++c) {
      const int64_t n = pairs.y_item(m, c), rows = pairs.y.count(n);
      pair.for_each_panel(m, n, [&](int64_t from, int64_t cols, T* s) {
        if (tau != 0) {
          max_sim_kernels<T>().column_sums(s, width, rows, cols, T(1 / tau), best.data(), sum.data());
          for (int64_t j = 0; j < cols; ++j)  // where all products are -inf, the sum is 0
            best[j] += sum[j] == 0 ? T(0) : static_cast<T>(tau * std::log(static_cast<double>(sum[j])));
        } else {
          max_sim_kernels<T>().column_maxima(s, width, rows, cols, 0, best.data(), index.data());
        }
        out.add(m, c, from, best.data(), index.data(), cols);
      });
    }
  };
  in_blocks(first, last, columns * pairs.work(), interrupt, [&](int64_t begin, int64_t end) {
    // A task is an item of x with all of its pairs, or with a part of them if there are more threads than items.
    const int64_t parts = std::clamp<int64_t>(4 * at::get_num_threads() / (end - begin), 1, columns);
    for_each_task((end - begin) * parts, [&](int64_t task) {
      const int64_t part = task % parts;
      take(begin + task / parts, columns * part / parts, columns * (part + 1) / parts);
    });
  });
}

// Writes the gradients of items [first, last) of x and of their own items of y, given which tokens were the maxima and
// g (M, C). dx and dy may be null.
template <class T>
void gradients_of_own(const Pairs& pairs, int64_t first, int64_t last, const Argmax& argmax, const T* g,
                      const ItemGradients<T>* dx, const ItemGradients<T>* dy) {
  const ItemSide &x = pairs.x, &y = pairs.y;
  if (dx)
    for_each_task(last - first, [&](int64_t task) {
      const int64_t m = first + task;
      ItemReader<T> reader(y);
      std::vector<int32_t> index(x.length);
      dx->write(m, [&](T* out) {
        for (int64_t k = 0; k < pairs.own; ++k) {
          const int64_t n = pairs.y_item(m, k);
          if (pairs.is_empty(m, n)) continue;
          argmax.get(m, k, index.data(), x.count(m), y.count(n));
          max_sim_kernels<T>().gather(out, reader.read(n), index.data(), x.count(m), x.d, g[m * pairs.own + k]);
        }
      });
    });
  if (dy)
    for_each_task((last - first) * pairs.own, [&](int64_t task) {
      const int64_t n = first * pairs.own + task, m = n / pairs.own;
      ItemReader<T> reader(x);
      std::vector<int32_t> index(x.length);
      dy->write(n, [&](T* out) {
        if (pairs.is_empty(m, n)) return;
        argmax.get(m, n % pairs.own, index.data(), x.count(m), y.count(n));
        max_sim_kernels<T>().scatter(out, reader.read(m), index.data(), x.count(m), x.d, g[n]);
      });
    });
}

// Adds up the gradients of one thread's pairs, for smooth maxima: the weights of a pair's products are their softmax
// over y's tokens.
template <class T>
class SmoothGradients {
 public:
  SmoothGradients(const Pairs& pairs, double tau)
      : pairs_(pairs), inverse_(static_cast<T>(1 / tau)), pair_(pairs), top_(width()), sum_(width()) {}

  // Adds the part of a pair of items, whose score has the gradient g, to dx and dy (the items' real tokens, D). Either
  // may be null.
  void add(int64_t m, int64_t n, T g, T* dx, T* dy) {
    const int64_t d = pairs_.x.d, rows = pairs_.y.count(n);
    if (dx && !pairs_.is_empty(m, n)) y_rows_.set(pair_.y(n), rows, d);
    pair_.for_each_panel(m, n, [&](int64_t first, int64_t cols, T* s) {
      max_sim_kernels<T>().column_sums(s, width(), rows, cols, inverse_, top_.data(), sum_.data());
      for (int64_t j = 0; j < cols; ++j) sum_[j] = sum_[j] == 0 ? T(0) : g / sum_[j];
      max_sim_kernels<T>().column_weights(s, width(), rows, cols, inverse_, top_.data(), sum_.data());
      if (dx) ItemPanels<T>::multiply(cols, d, rows, s, 1, width(), y_rows_.panel(0), dx + first * d, d, true);
      if (!dy) return;
      x_rows_.set(pair_.x(m) + first * d, cols, d);
      ItemPanels<T>::multiply(rows, d, cols, s, width(), 1, x_rows_.panel(0), dy, d, true);
    });
  }

 private:
  static int64_t width() { return ItemPanels<T>::width(); }

  const Pairs& pairs_;
  T inverse_;
  PairProducts<T> pair_;
  std::vector<T> top_, sum_;
  ItemPanels<T> x_rows_, y_rows_;
};

// Writes the gradients of smooth maxima, given g (M, C). Each sum is added up by one task in a fixed order: the tasks
// of dx and those of dy make the products apart. dx and dy may be null.
template <class T>
void smooth_gradients(const Pairs& pairs, double tau, const T* g, const ItemGradients<T>* dx,
                      const ItemGradients<T>* dy, const Interrupt& interrupt) {
  const int64_t columns = pairs.columns;
  if (dx)
    in_blocks(0, pairs.x.items, 2 * columns * pairs.work(), interrupt, [&](int64_t begin, int64_t end) {
      for_each_task(end - begin, [&](int64_t task) {
        const int64_t m = begin + task;
        SmoothGradients<T> gradients(pairs, tau);
        dx->write(m, [&](T* out) {
          for (int64_t c = 0; c < columns; ++c) gradients.add(m, pairs.y_item(m, c), g[m * columns + c], out, nullptr);
        });
      });
    });
  if (dy)
    in_blocks(0, pairs.y.items, 2 * (pairs.own ? 1 : pairs.x.items) * pairs.work(), interrupt,
              [&](int64_t begin, int64_t end) {
                for_each_task(end - begin, [&](int64_t task) {
                  const int64_t n = begin + task;
                  SmoothGradients<T> gradients(pairs, tau);
                  dy->write(n, [&](T* out) {
                    if (pairs.own) return gradients.add(n / pairs.own, n, g[n], nullptr, out);
                    for (int64_t m = 0; m < pairs.x.items; ++m) gradients.add(m, n, g[m * columns + n], nullptr, out);
                  });
                });
              });
}

}  // namespace fc
