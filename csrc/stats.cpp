// Walks S in blocks of rows x columns: a vendor GEMM makes a block's raw products, the kernels of tile.h sweep it in
// parallel tiles. Forward 1 product, backward 2 (kept rows) or 3.
//
// Blocks are large because GEMM speed needs it (512 rows cost 3%), and square where S allows: wide ones (1024 x 8192)
// were slower by 0.2 of a product, because the sweep found less of the GEMM's result in cache. Scratch memory is one
// block, whatever M and N.
#include "stats.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "memory.h"
#include "tile.h"

namespace fc {
namespace {

constexpr int64_t kBlockRows = 2048;
constexpr int64_t kBlockElements = kBlockRows * kBlockRows;  // 16 MB of fp32

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Side of a block where only pairs above the diagonal count: the finer, the fewer others are computed with them, and
// the slower each product. Against a side of 1024, NT-Xent of 1024 rows takes a quarter less time, of 4096 a sixteenth.
int64_t upper_side(int64_t n) {
  return std::clamp<int64_t>(n / 4, 256, 512);
}

// Cuts [begin, end) into equal parts of at most `size`, so that no small remainder is left for the GEMM.
std::vector<int64_t> cuts(int64_t begin, int64_t end, int64_t size) {
  const int64_t n = end - begin, parts = ceil_div(n, size);
  std::vector<int64_t> at;
  for (int64_t p = 0; p <= parts; ++p) at.push_back(begin + (parts ? n * p / parts : 0));
  return at;
}

struct Block {
  int64_t row0, row1, col0, col1;
  bool kept;
  bool first_of_rows, first_of_cols;  // no block before has its rows, its columns
  int64_t rows() const { return row1 - row0; }
  int64_t cols() const { return col1 - col0; }
};

// Row-major order over S: kept rows first, so that no block is half kept. Of the upper triangle, blocks below the
// diagonal are left out.
std::vector<Block> blocks(int64_t m, int64_t n, int64_t kept_rows, bool upper) {
  const int64_t height = upper ? upper_side(n) : kBlockRows;
  const auto col_cuts = cuts(0, n, upper ? upper_side(n) : kBlockElements / std::min(m, kBlockRows));
  std::vector<bool> met(col_cuts.size());
  std::vector<Block> all;
  for (const bool kept : {true, false}) {
    const auto row_cuts = cuts(kept ? 0 : kept_rows, kept ? kept_rows : m, height);
    for (size_t r = 0; r + 1 < row_cuts.size(); ++r) {
      bool first = true;
      for (size_t c = 0; c + 1 < col_cuts.size(); ++c) {
        const int64_t row0 = row_cuts[r], row1 = row_cuts[r + 1], col0 = col_cuts[c], col1 = col_cuts[c + 1];
        if (row0 == row1 || (upper && col1 <= row0)) continue;
        all.push_back({row0, row1, col0, col1, kept, std::exchange(first, false), !met[c]});
        met[c] = true;
      }
    }
  }
  return all;
}

// Rows [begin, end) of t; t itself where that is all of it, which spares small problems a view.
at::Tensor rows_of(const at::Tensor& t, int64_t begin, int64_t end) {
  return end - begin == t.size(0) ? t : t.slice(0, begin, end);
}

// The scratch block, allocated when first needed.
class Scratch {
 public:
  Scratch(const std::vector<Block>& all, const at::TensorOptions& options) : options_(options) {
    for (const Block& b : all) size_ = std::max(size_, b.rows() * b.cols());
  }
  at::Tensor get(const Block& b) {
    if (!memory_.defined()) memory_ = at::empty({size_}, options_);
    return rows_of(memory_, 0, b.rows() * b.cols()).view({b.rows(), b.cols()});
  }

 private:
  at::Tensor memory_;
  int64_t size_ = 0;
  at::TensorOptions options_;
};

// The block's part of the kept products (kept_rows, N).
at::Tensor kept_block(const at::Tensor& kept, const Block& b) {
  const at::Tensor rows = rows_of(kept, b.row0, b.row1);
  return b.cols() == rows.size(1) ? rows : rows.slice(1, b.col0, b.col1);
}

// resolve_neg: a lazily negated tensor, such as z.conj().imag, holds the opposite of its values.
at::Tensor contiguous_as(const at::Tensor& t, at::ScalarType dtype) {
  return t.to(dtype).resolve_neg().contiguous();
}

template <class T>
const T* data(const OptionalTensor& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

// A Problem in the dtype of its statistics, with ids as dense codes that fit a 32-bit lane.
template <class T>
struct Prepared {
  at::Tensor x, y;
  OptionalTensor targets, col_bias, row_codes, col_codes;
  LogitRule<T> rule{};

  explicit Prepared(const Problem& p) {
    constexpr auto dtype = c10::CppTypeToScalarType<T>::value;
    x = contiguous_as(p.x, dtype);
    y = contiguous_as(p.y, dtype);
    if (p.targets) targets = p.targets->contiguous();
    if (p.col_bias) col_bias = contiguous_as(*p.col_bias, dtype);
    if (p.row_ids) encode_ids(*p.row_ids, *p.col_ids);
    rule = {p.scale.item<T>(),
            data<T>(col_bias),
            data<int64_t>(targets),
            data<int32_t>(row_codes),
            data<int32_t>(col_codes),
            p.equal_ids,
            p.exclude_self,
            p.upper,
            p.softplus};
  }

  int64_t rows() const { return x.size(0); }
  int64_t cols() const { return y.size(0); }
  at::TensorOptions options() const { return x.options(); }

 private:
  // A column's code is the rank of its id among the columns' ids; a row's is that of the equal column id, or -1.
  void encode_ids(const at::Tensor& row_ids, const at::Tensor& col_ids) {
    const at::Tensor sorted = std::get<0>(at::sort(col_ids));
    col_codes = at::searchsorted(sorted, col_ids.contiguous(), /*out_int32=*/true);
    const at::Tensor rank = at::searchsorted(sorted, row_ids.contiguous()).clamp_max(col_ids.size(0) - 1);
    const at::Tensor found = sorted.index_select(0, rank) == row_ids;
    row_codes = at::where(found, rank, at::scalar_tensor(-1, rank.options())).to(at::kInt);
  }
};

// Rows of a tile: kTileRows, fewer in a small block, where all threads should find work.
int64_t tile_rows(const Block& b) {
  return std::min(kTileRows, std::max<int64_t>(64, b.rows() / 4));
}

// Calls `sweep(place, section, strip)` for every tile of a block, in parallel.
template <class F>
void for_each_tile(const Block& b, const F& sweep) {
  const int64_t height = tile_rows(b);
  const int64_t strips = ceil_div(b.cols(), kTileCols), sections = ceil_div(b.rows(), height);
  at::parallel_for(0, strips * sections, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t section = task / strips, strip = task % strips;
      const int64_t row = b.row0 + section * height, col = b.col0 + strip * kTileCols;
      sweep(Place{row, col, std::min(height, b.row1 - row), std::min(kTileCols, b.col1 - col)}, section, strip);
    }
  });
}

// Running log-sum-exps of one direction over the whole of S (or, where not `log`, sums), and the partials of one
// block's tiles: `parts` runs of `length`. Tiles write partials in parallel; `merge` adds them in a fixed order, so the
// result does not depend on the number of threads.
template <class T>
class Totals {
 public:
  Totals(bool asked, int64_t size, bool log)
      : asked_(asked),
        log_(log),
        max_(asked && log ? size : 0, -std::numeric_limits<T>::infinity()),
        sum_(asked && log ? size : 0, 0),
        plain_sum_(asked && !log ? size : 0, 0) {}

  void start(int64_t parts, int64_t length) {
    if (!asked_) return;
    parts_ = parts, length_ = length;
    part_max_.resize(log_ ? parts * length : 0);
    part_sum_.resize(parts * length);
  }
  T* part_max(int64_t part, int64_t offset) {
    return asked_ && log_ ? part_max_.data() + part * length_ + offset : nullptr;
  }
  T* part_sum(int64_t part, int64_t offset) { return asked_ ? part_sum_.data() + part * length_ + offset : nullptr; }

  void merge(int64_t first) {
    if (!asked_) return;
    for (int64_t p = 0; p < parts_; ++p) {
      const T* part = part_sum(p, 0);
      if (log_)
        kernels<T>().merge(max_.data() + first, sum_.data() + first, part_max(p, 0), part, length_);
      else
        std::transform(part, part + length_, plain_sum_.begin() + first, plain_sum_.begin() + first, std::plus<>());
    }
  }
  // In double: next to a maximum of 1000, float would round log(sum) to 6e-5.
  at::Tensor value() const {
    const auto size = static_cast<int64_t>(log_ ? sum_.size() : plain_sum_.size());
    at::Tensor out = at::empty({size}, at::kDouble);
    double* values = out.mutable_data_ptr<double>();
    if (!log_)
      std::copy(plain_sum_.begin(), plain_sum_.end(), values);
    else
      std::transform(max_.begin(), max_.end(), sum_.begin(), values,
                     [](double max, double sum) { return max + std::log(sum); });
    return out;
  }

 private:
  bool asked_, log_;
  int64_t parts_ = 0, length_ = 0;
  std::vector<T> max_, sum_, part_max_, part_sum_;
  std::vector<double> plain_sum_;
};

// A double log-normaliser as a sum of two T, 0 where nothing was left to normalise (-inf).
template <class T>
struct Normaliser {
  std::vector<T> high, low;

  explicit Normaliser(const at::Tensor& value) {
    const at::Tensor values = value.contiguous();
    const double* v = values.const_data_ptr<double>();
    for (int64_t i = 0; i < values.numel(); ++i) {
      const double finite = v[i] == -std::numeric_limits<double>::infinity() ? 0 : v[i];
      high.push_back(static_cast<T>(finite));
      low.push_back(static_cast<T>(finite - high.back()));
    }
  }
};

template <class T>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward(const Problem& problem, const Interrupt& interrupt) {
  const Prepared<T> p(problem);
  const int64_t m = p.rows(), n = p.cols();
  at::Tensor pos = at::empty({m}, p.options());
  at::Tensor kept = reused_matrix(problem.kept_rows, n, p.options());
  Totals<T> row(problem.rows, m, !problem.softplus), col(problem.cols, n, true);
  const auto all = blocks(m, n, problem.kept_rows, problem.upper);
  Scratch scratch(all, p.options());

  for (const Block& b : all) {
    at::Tensor s = b.kept ? kept_block(kept, b) : scratch.get(b);
    at::mm_out(s, rows_of(p.x, b.row0, b.row1), rows_of(p.y, b.col0, b.col1).t());
    row.start(ceil_div(b.cols(), kTileCols), b.rows());
    col.start(ceil_div(b.rows(), tile_rows(b)), b.cols());
    const T* products = s.const_data_ptr<T>();
    const int64_t stride = s.stride(0);
    for_each_tile(b, [&](const Place& at, int64_t section, int64_t strip) {
      const int64_t r = at.row - b.row0, c = at.col - b.col0;
      kernels<T>().forward(p.rule,
                           {at, products + r * stride + c, stride, pos.mutable_data_ptr<T>(), row.part_max(strip, r),
                            row.part_sum(strip, r), col.part_max(section, c), col.part_sum(section, c)});
    });
    row.merge(b.row0);
    col.merge(b.col0);
    interrupt();
  }
  return {pos.to(at::kDouble), row.value(), col.value(), kept};
}

// The positives' gradients come after the products: among thousands of small negatives, one large term would cost the
// sum its low bits. They, the factor `scale` and the dot products for the scale's own gradient take one pass over
// `grad`.
//
// grad: (rows, D) sums over the negatives -> gradient of `features`. Row i gains g[i] times row other_row(i) of
// `others`, unless that is negative. Returns sum(features * grad) before the factor.
template <class T, class F>
double finish(const at::Tensor& grad, const at::Tensor& features, const at::Tensor& others, const T* g, T scale,
              const F& other_row) {
  constexpr int64_t kGrain = 64;
  const int64_t rows = grad.size(0), d = grad.size(1);
  T* out = grad.mutable_data_ptr<T>();
  const T *own = features.const_data_ptr<T>(), *other = others.const_data_ptr<T>();
  std::vector<double> dots(ceil_div(rows, kGrain));  // summed in a fixed order
  at::parallel_for(0, static_cast<int64_t>(dots.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part)
      for (int64_t i = part * kGrain; i < std::min(rows, (part + 1) * kGrain); ++i) {
        const int64_t o = g ? other_row(i) : -1;
        dots[part] += kernels<T>().finish_row(out + i * d, own + i * d, o < 0 ? nullptr : other + o * d,
                                              o < 0 ? T(0) : g[i], scale, d);
      }
  });
  return std::accumulate(dots.begin(), dots.end(), 0.);
}

template <class T>
std::array<at::Tensor, 4> backward(const Problem& problem, const at::Tensor& row, const at::Tensor& col,
                                   const at::Tensor& kept, const OptionalTensor& g_pos, const OptionalTensor& g_row,
                                   const OptionalTensor& g_col, std::array<bool, 4> needs, const Interrupt& interrupt) {
  const auto [need_x, need_y, need_scale, need_bias] = needs;
  const Prepared<T> p(problem);
  const int64_t m = p.rows(), n = p.cols();
  constexpr auto dtype = c10::CppTypeToScalarType<T>::value;
  OptionalTensor row_grad, col_grad;
  if (g_row) row_grad = contiguous_as(*g_row, dtype);
  if (g_col) col_grad = contiguous_as(*g_col, dtype);
  const Normaliser<T> row_norm(g_row && !problem.softplus ? row : at::empty({0}, at::kDouble));
  const Normaliser<T> col_norm(g_col ? col : at::empty({0}, at::kDouble));

  // dscale = sum_i x_i . (G y)_i, or the same sum over columns when dx is not needed.
  const bool scale_by_rows = need_x || (need_scale && !need_y);
  const bool negatives = g_row || g_col;  // else no block writes the gradients
  const auto gradient_of = [&](const at::Tensor& t) { return negatives ? at::empty_like(t) : at::zeros_like(t); };
  const at::Tensor dx = scale_by_rows ? gradient_of(p.x) : at::Tensor();
  const at::Tensor dy = need_y ? gradient_of(p.y) : at::Tensor();
  const at::Tensor dbias = need_bias ? at::zeros({n}, p.options()) : at::Tensor();

  const auto all = negatives ? blocks(m, n, problem.kept_rows, problem.upper) : std::vector<Block>();
  Scratch scratch(all, p.options());
  for (const Block& b : all) {
    const at::Tensor x = rows_of(p.x, b.row0, b.row1), y = rows_of(p.y, b.col0, b.col1);
    at::Tensor g = scratch.get(b);
    const at::Tensor s = b.kept ? kept_block(kept, b) : g;
    if (!b.kept) at::mm_out(g, x, y.t());
    const T* products = s.const_data_ptr<T>();
    T* grad = g.mutable_data_ptr<T>();
    const int64_t stride = s.stride(0);
    for_each_tile(b, [&](const Place& at, int64_t, int64_t) {
      const int64_t r = at.row - b.row0, c = at.col - b.col0;
      kernels<T>().backward(p.rule, {at, products + r * stride + c, stride, grad + r * b.cols() + c, b.cols(),
                                     g_row ? row_norm.high.data() : nullptr, row_norm.low.data(), data<T>(row_grad),
                                     g_col ? col_norm.high.data() : nullptr, col_norm.low.data(), data<T>(col_grad)});
    });
    if (dx.defined()) rows_of(dx, b.row0, b.row1).addmm_(g, y, /*beta=*/b.first_of_rows ? 0 : 1);
    if (dy.defined()) rows_of(dy, b.col0, b.col1).addmm_(g.t(), x, /*beta=*/b.first_of_cols ? 0 : 1);
    if (need_bias) dbias.slice(0, b.col0, b.col1).add_(g.sum(0));
    interrupt();
  }

  OptionalTensor pos_grad;
  if (g_pos) pos_grad = contiguous_as(*g_pos, dtype);
  const T* g = data<T>(pos_grad);
  double dscale = 0;
  if (dx.defined()) dscale = finish(dx, p.x, p.y, g, p.rule.scale, [&](int64_t i) { return p.rule.target(i); });
  if (dy.defined()) {
    if (g && p.targets) dy.index_add_(0, *p.targets, pos_grad->unsqueeze(1) * p.x);
    const int64_t diagonal = p.targets ? 0 : m;  // row j of y is row j's positive
    const double dot = finish(dy, p.y, p.x, g, p.rule.scale, [&](int64_t j) { return j < diagonal ? j : -1; });
    if (!scale_by_rows) dscale = dot;
  }
  if (need_bias && g) {
    if (p.targets)
      dbias.index_add_(0, *p.targets, *pos_grad);
    else
      dbias.slice(0, 0, m).add_(*pos_grad);
  }

  std::array<at::Tensor, 4> grads;
  if (need_x) grads[0] = dx.to(problem.x.scalar_type());
  if (need_y) grads[1] = dy.to(problem.y.scalar_type());
  // By way of a double tensor, which becomes inf in float where a C++ number would raise.
  if (need_scale) grads[2] = at::scalar_tensor(dscale, at::kDouble).to(p.options());
  if (need_bias) grads[3] = dbias;
  return grads;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> stats_forward(const Problem& problem,
                                                                         const Interrupt& interrupt) {
  return problem.x.scalar_type() == at::kDouble ? forward<double>(problem, interrupt)
                                                : forward<float>(problem, interrupt);
}

std::array<at::Tensor, 4> stats_backward(const Problem& problem, const at::Tensor& row, const at::Tensor& col,
                                         const at::Tensor& kept, const OptionalTensor& g_pos,
                                         const OptionalTensor& g_row, const OptionalTensor& g_col,
                                         std::array<bool, 4> needs, const Interrupt& interrupt) {
  return problem.x.scalar_type() == at::kDouble
             ? backward<double>(problem, row, col, kept, g_pos, g_row, g_col, needs, interrupt)
             : backward<float>(problem, row, col, kept, g_pos, g_row, g_col, needs, interrupt);
}

}  // namespace fc
