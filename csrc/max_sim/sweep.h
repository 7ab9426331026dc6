// The maxima of late interaction. The vendor's GEMM multiplies a block of y's tokens with a block of x's; kernels take
// the maxima of both directions from the products, while they are in the cache. y's tokens are the rows, so that maxima
// over them, which are all that most callers want, run down columns without comparing lanes.
#pragma once
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "common/integers.h"
#include "common/interrupt.h"
#include "kernels/max_sim_kernels.h"
#include "max_sim/argmax.h"
#include "max_sim/tokens.h"

namespace fc {

constexpr int64_t kBlockTokens = 1024;  // of either side: 4 MB of float32 products
constexpr int64_t kTaskTokens = 256;    // columns, or rows, whose maxima one task takes

// Where the maxima of one direction go.
template <class T>
struct MaximaOutput {
  T* sums;  // (M, N), or null
  int64_t n;
  Argmax argmax;

  void clear(int64_t first, int64_t last) const {
    if (sums) std::fill(sums + first * n, sums + last * n, T(0));
  }
  // Adds the maxima of `count` tokens, from `offset` of their item on, for the pair (m, item).
  void add(int64_t m, int64_t item, int64_t offset, const T* best, const int32_t* index, int64_t count) const {
    if (sums) sums[m * n + item] += static_cast<T>(std::accumulate(best, best + count, 0.));
    if (argmax.holds(m)) argmax.put(m, item, offset, index, count);
  }
};

// Takes the maxima of items [first, last) of x with all items of y. An output is null where its direction is not
// needed.
template <class T>
class Sweep {
 public:
  Sweep(const TokenSide& x, const TokenSide& y, int64_t first, int64_t last, const MaximaOutput<T>* out_x,
        const MaximaOutput<T>* out_y)
      : x_(x),
        y_(y),
        cleared_(first),
        last_(last),
        out_x_(out_x),
        out_y_(out_y),
        x_blocks_(token_blocks(x, first, last, kBlockTokens)),
        y_blocks_(token_blocks(y, 0, y.items, kBlockTokens)),
        products_(at::empty({longest(x_blocks_) * longest(y_blocks_)}, x.tokens.options())) {}

  void run(const Interrupt& interrupt) {
    for (const TokenBlock& x : x_blocks_) {
      clear_until(x.item1);
      for (const TokenBlock& y : y_blocks_) {
        const Pair pair = multiply(x, y);
        take_maxima(pair);
        add_maxima(pair);
        interrupt();
      }
    }
    clear_until(last_);
  }

 private:
  // The maxima of one direction, not yet added up.
  struct Maxima {
    std::vector<T> best;
    std::vector<int32_t> index;

    void reserve(int64_t size) {
      if (static_cast<int64_t>(best.size()) < size) best.resize(size), index.resize(size);
    }
  };

  // A block of x and one of y, and the products (rows, cols) of their tokens.
  struct Pair {
    const TokenBlock &x, &y;
    const T* products;
    int64_t y_base;  // where the maxima of y's block begin
    int64_t rows() const { return y.tokens(); }
    int64_t cols() const { return x.tokens(); }
  };

  // Sets the sums of items before `row` to 0. It is called as the sweep reaches them, since the first touch of all (M,
  // N) sums takes long.
  void clear_until(int64_t row) {
    for (const MaximaOutput<T>* out : {out_x_, out_y_})
      if (out) out->clear(cleared_, row);
    cleared_ = row;
  }

  // Multiplies two blocks. Also makes room for the maxima of x's tokens, (y's items, cols), and of y's, (x's items,
  // rows) or, if x's block is a part of an item, (all tokens of y,), since those maxima continue in the item's next
  // part.
  Pair multiply(const TokenBlock& x, const TokenBlock& y) {
    const int64_t rows = y.tokens(), cols = x.tokens();
    at::Tensor s = products_.slice(0, 0, rows * cols).view({rows, cols});
    at::mm_out(s, y_.tokens.slice(0, y.begin, y.end), x_.tokens.slice(0, x.begin, x.end).t());
    const bool x_is_part = cols < x_.start[x.item1] - x_.start[x.item0];
    if (out_x_) x_maxima_.reserve(y.items() * cols);
    if (out_y_) y_maxima_.reserve(x_is_part ? y_.tokens.size(0) : x.items() * rows);
    return {x, y, s.const_data_ptr<T>(), x_is_part ? y.begin : 0};
  }

  void take_maxima(const Pair& pair) {
    const int64_t col_tasks = ceil_div(pair.cols(), kTaskTokens), row_tasks = ceil_div(pair.rows(), kTaskTokens);
    const int64_t x_tasks = out_x_ ? pair.y.items() * col_tasks : 0, y_tasks = out_y_ ? pair.x.items() * row_tasks : 0;
    at::parallel_for(0, x_tasks + y_tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t row_task = task - x_tasks;
        if (task < x_tasks)
          take_column_maxima(pair, task / col_tasks, task % col_tasks * kTaskTokens);
        else
          take_row_maxima(pair, row_task / row_tasks, row_task % row_tasks * kTaskTokens);
      }
    });
  }
  // Takes the maxima over the tokens of y's n-th item, for the tokens of x from column `col` on.
  void take_column_maxima(const Pair& pair, int64_t n, int64_t col) {
    const int64_t cols = pair.cols(), at = n * cols + col;
    const ItemPart part(y_, pair.y, pair.y.item0 + n);
    if (part.tokens())
      max_sim_kernels<T>().column_maxima(pair.products + (part.begin - pair.y.begin) * cols + col, cols, part.tokens(),
                                         std::min(kTaskTokens, cols - col), part.offset, x_maxima_.best.data() + at,
                                         x_maxima_.index.data() + at);
  }
  // Takes the maxima over the tokens of x's m-th item, for the tokens of y from row `row` on.
  void take_row_maxima(const Pair& pair, int64_t m, int64_t row) {
    const int64_t rows = pair.rows(), cols = pair.cols(), at = pair.y_base + m * rows + row;
    const ItemPart part(x_, pair.x, pair.x.item0 + m);
    if (part.tokens())
      max_sim_kernels<T>().row_maxima(pair.products + row * cols + part.begin - pair.x.begin, cols,
                                      std::min(kTaskTokens, rows - row), part.tokens(), part.offset,
                                      y_maxima_.best.data() + at, y_maxima_.index.data() + at);
  }

  // Adds the maxima to the outputs, once the item that they are taken over has ended.
  void add_maxima(const Pair& pair) {
    const int64_t rows = pair.rows(), cols = pair.cols(), x_items = pair.x.items(), y_items = pair.y.items();
    at::parallel_for(0, x_items * y_items, 16, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t m = task / y_items, n = task % y_items, x_item = pair.x.item0 + m, y_item = pair.y.item0 + n;
        const ItemPart xt(x_, pair.x, x_item), yt(y_, pair.y, y_item);
        if (!xt.tokens() || !yt.tokens()) continue;
        const int64_t col = n * cols + xt.begin - pair.x.begin;
        const int64_t row = pair.y_base + m * rows + yt.begin - pair.y.begin;
        if (out_x_ && yt.last)
          out_x_->add(x_item, y_item, xt.offset, x_maxima_.best.data() + col, x_maxima_.index.data() + col,
                      xt.tokens());
        if (out_y_ && xt.last)
          out_y_->add(x_item, y_item, yt.offset, y_maxima_.best.data() + row, y_maxima_.index.data() + row,
                      yt.tokens());
      }
    });
  }

  const TokenSide &x_, &y_;
  int64_t cleared_, last_;  // sums of items of x before `cleared_` have been set to 0
  const MaximaOutput<T>*out_x_, *out_y_;
  std::vector<TokenBlock> x_blocks_, y_blocks_;
  at::Tensor products_;
  Maxima x_maxima_, y_maxima_;
};

}  // namespace fc
