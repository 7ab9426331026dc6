// Forms the gradients of x, y, scale and bias from G, one section at a time.
#pragma once
#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

#include "common/memory.h"
#include "common/parallel.h"
#include "stats/logit_gradients.h"
#include "stats/panels.h"
#include "stats/prepared.h"
#include "stats/stats.h"
#include "stats/tiling.h"

namespace fc {

// The most rows of dx (or dy) that one task adds to. The task reads every panel of y (or x) and, for each panel, its
// rows of G again, so these must stay in a core's second-level cache.
constexpr int64_t kChunkRows = 64;
static_assert(kLeastTileRows % kChunkRows == 0);  // all rows of a chunk skip the same tiles

// One task's rows of dx or dy, counted from the section's first.
struct Chunk {
  bool of_x;
  Range rows;
};

inline std::vector<Chunk> chunks(bool of_x, int64_t rows) {
  std::vector<Chunk> all;
  for (const Range& r : pieces(0, rows, kChunkRows)) all.push_back({of_x, r});
  return all;
}

// Merges both lists so that each is spread evenly over the result: every thread then gets the same part of dx and of dy
// in each section.
inline std::vector<Chunk> merged(const std::vector<Chunk>& of_x, const std::vector<Chunk>& of_y) {
  std::vector<Chunk> all;
  for (size_t i = 0, j = 0; i < of_x.size() || j < of_y.size();) {
    const bool x_next = j == of_y.size() || (i < of_x.size() && i * of_y.size() <= j * of_x.size());
    all.push_back(x_next ? of_x[i++] : of_y[j++]);
  }
  return all;
}

// Adds G y to dx and G.T x to dy for one section, both at the same time unless dx and dy are the same memory. Row 0 of
// `dy` is the gradient of column `first_of_y`. Rows are d long; of them only the elements `part` are computed, the
// first of which must be a multiple of 32.
template <class E, class T = SumType<E>>
void add_products(const Tiling& tiling, const Section& s, const LogitGradients<E>& g, const Panels<E>& y,
                  const Panels<E>& x, T* dx, T* dy, int64_t first_of_y, int64_t d, const Range& part) {
  const auto add = [&](const Chunk& chunk) {
    const auto [of_x, rows] = chunk;
    const Range whole =
        of_x ? tiling.cols_of(s, s.rows.begin + rows.begin) : tiling.rows_of(s, s.cols.begin + rows.begin);
    const int64_t first = of_x ? s.cols.begin : s.rows.begin;
    const Range k{whole.begin - first, whole.end - first};
    if (k.size() == 0) return;
    MatrixProduct<E> p = of_x ? g.times_y(rows.begin, rows.size(), k) : g.times_x(rows.begin, rows.size(), k);
    p.n = part.size(), p.c_row = d;
    p.c =
        part.begin + (of_x ? dx + (s.rows.begin + rows.begin) * d : dy + (s.cols.begin - first_of_y + rows.begin) * d);
    (of_x ? y : x).multiply(p, k.begin / kStoredPer<E>, part.begin);
  };
  const std::vector<Chunk> of_x = chunks(true, dx ? s.rows.size() : 0);
  const std::vector<Chunk> of_y = chunks(false, dy ? s.cols.size() : 0);
  const auto add_all = [&](const std::vector<Chunk>& all) {
    for_each_task(all.size(), [&](int64_t task) { add(all[task]); });
  };
  if (dx == dy) {
    add_all(of_x);
    add_all(of_y);
  } else {
    add_all(merged(of_x, of_y));
  }
}

// Turns `grad`, sums over the negatives, into the gradient of `features` from row `first` on: adds g[i] times row
// other_row(i) of `others`, or nothing if other_row(i) is -1, and multiplies by `scale`. For unit features the result
// is the gradient of the raw features. Returns sum(features * grad) before that multiplication: the scale's gradient.
template <class E, class F, class T = SumType<E>>
double finish_rows(const at::Tensor& grad, int64_t first, const Features<E>& features, const Features<E>& others,
                   const T* g, T scale, const F& other_row) {
  constexpr int64_t kGrain = 64;
  const int64_t rows = grad.size(0), d = grad.size(1);
  T* out = grad.mutable_data_ptr<T>();
  std::vector<double> dots(ceil_div(rows, kGrain));  // summed in a fixed order
  for_each_task(static_cast<int64_t>(dots.size()), [&](int64_t part) {
    std::vector<T> own, other;
    for (int64_t i = first + part * kGrain; i < first + std::min(rows, (part + 1) * kGrain); ++i) {
      const int64_t o = g ? other_row(i) : -1;
      const T* feature = features.wide_row(i, own);
      dots[part] += tile_kernels<T>().add_scale_dot(
          out + (i - first) * d, feature, o < 0 ? nullptr : others.wide_row(o, other), o < 0 ? T(0) : g[i], scale, d);
      if (features.unit()) project_row(out + (i - first) * d, feature, features.norm(i), d);
    }
  });
  return std::accumulate(dots.begin(), dots.end(), 0.);
}

// Sums the gradients section by section and then finishes them. The positives are added last: among thousands of small
// negatives, one large term would cost the sum its low bits.
template <class E>
class FeatureGradients {
 public:
  using T = SumType<E>;

  FeatureGradients(const Prepared<E>& p, const Tiling& tiling, const Needs& needs)
      : p_(p),
        tiling_(tiling),
        needs_(needs.of),
        joint_(needs.joint),
        g_(p.options()),
        scratch_(tiling, p.options(), kIsPair<E>),
        bias_(needs.of[3], p.y.rows) {
    // dscale = sum_i x_i . (G y)_i, or the same sum over columns when dx is not needed.
    scale_by_rows_ = needs_[0] || (needs_[2] && !needs_[1]);
    if (scale_by_rows_)
      dx_ = needs.zeros_for_x.defined() ? needs.zeros_for_x : at::zeros({p.x.rows, p.x.d}, p.options());
    zeros_for_y_ = needs.zeros_for_y;
    if (joint_) start_joint();
  }

  // To be called first, by callers that visit each group of columns only once. If `y_dtype` is not T, dy is then
  // finished and rounded group by group, and only one group of it is held in T. `pos` is the gradient that `finish`
  // takes.
  void round_groups(const OptionalTensor& pos, at::ScalarType y_dtype) {
    if (!needs_[1] || y_dtype == Prepared<E>::scalar_type()) return;
    pos_ = data<T>(pos);
    rounded_dy_ = at::empty({p_.y.rows, p_.y.d}, p_.options().dtype(y_dtype));
  }
  // Begins a group: the sections added next have these columns.
  void start_group(const Range& cols) {
    if (dx_.defined()) y_.set(p_.y, cols.begin, cols.end);
    if (rounded_dy_.defined()) start_dy(cols);
    if (needs_[1] && !dy_.defined()) start_dy({0, p_.y.rows});
  }
  // Ends a group: all its sections have been added.
  void end_group() {
    if (!rounded_dy_.defined()) return;
    finish_dy(pos_);
    rounded_dy_.slice(0, dy_cols_.begin, dy_cols_.end).copy_(dy_);
  }
  // Returns the panels that `start_group` packs y into. It overwrites what the caller packs into them.
  Panels<E>& panels() { return y_; }
  // Adds a section. `logit_gradient(bounds, tile, stride)` writes a tile of G to `tile`. `memory`, if given, is memory
  // for G, with rows `memory_stride` apart. It may hold the products: each tile of them is read before it is
  // overwritten.
  template <class F>
  void add(const Section& s, const F& logit_gradient, T* memory = nullptr, int64_t memory_stride = 0) {
    if (dy_.defined()) x_.set(p_.x, s.rows.begin, s.rows.end);
    g_.start(s, memory, memory_stride);
    bias_.start(tiling_.tile_rows(s), s.cols.size());
    tiling_.for_each_tile(
        s,
        [&](const TileBounds& at, int64_t tile_row, int64_t) {
          const int64_t r = at.row - s.rows.begin, c = at.col - s.cols.begin, stride = g_.tile_stride();
          T* tile = g_.tile(r, c, scratch_);
          logit_gradient(at, tile, stride);
          bias_.add(tile_row, c, tile, stride, at.rows, at.cols);
          g_.store(tile, r, c, at.rows, at.cols);
        },
        [](const TileBounds&, int64_t, int64_t) {});
    add_products<E>(tiling_, s, g_, y_, x_, dx_.defined() ? dx_.mutable_data_ptr<T>() : nullptr,
                    dy_.defined() ? dy_.mutable_data_ptr<T>() : nullptr, dy_cols_.begin, p_.x.d, {0, p_.x.d});
    bias_.merge(s.cols.begin);
  }

  // Calls add(sums) with the sums that become dx, if these are formed.
  template <class F>
  void add_to_x(const F& add) {
    if (dx_.defined()) add(dx_.mutable_data_ptr<T>());
  }

  // Returns dx and dy in `x_dtype` and `y_dtype`, dscale and dcol_bias in T; each is undefined where not needed. `pos`
  // (M,) is the gradient of the positives' logits. The memory of G and the panels is freed first.
  Gradients finish(const OptionalTensor& pos, at::ScalarType x_dtype, at::ScalarType y_dtype) {
    constexpr auto dtype = Prepared<E>::scalar_type();
    x_ = y_ = Panels<E>();
    g_ = LogitGradients<E>(p_.options());
    const T* g = data<T>(pos);
    const T scale = p_.rule.scale;
    double dscale = 0;
    if (joint_) {  // each pair counts in both directions, and so twice in dscale
      if (g) add_to_targets(g);
      dscale = finish_rows(dx_, 0, p_.x, p_.y, g, scale, [&](int64_t i) { return p_.rule.target(i); }) / 2;
      dy_.reset();
      return {converted(std::exchange(dx_, {}), x_dtype), at::Tensor(), needs_[2] ? scalar(dscale) : at::Tensor(),
              at::Tensor()};
    }
    Gradients grads;
    if (dx_.defined()) dscale = finish_rows(dx_, 0, p_.x, p_.y, g, scale, [&](int64_t i) { return p_.rule.target(i); });
    if (rounded_dy_.defined()) {
      dy_ = std::exchange(rounded_dy_, {});
    } else if (needs_[1]) {
      if (!dy_.defined()) start_dy({0, p_.y.rows});
      finish_dy(g);
    }
    if (!scale_by_rows_) dscale = dy_dot_;
    at::Tensor dbias = bias_.total();
    if (dbias.defined() && g) {
      double* sums = dbias.mutable_data_ptr<double>();
      for (int64_t i = 0; i < p_.x.rows; ++i) sums[p_.rule.target(i)] += static_cast<double>(g[i]);
    }
    if (needs_[0] && needs_[1])
      std::tie(grads[0], grads[1]) = converted(std::exchange(dx_, {}), std::exchange(dy_, {}), x_dtype, y_dtype);
    else if (needs_[0])
      grads[0] = converted(std::exchange(dx_, {}), x_dtype);
    else if (needs_[1])
      grads[1] = converted(std::exchange(dy_, {}), y_dtype);
    if (needs_[2]) grads[2] = scalar(dscale);
    if (dbias.defined()) grads[3] = (p_.one_bias ? dbias.sum() : dbias).to(dtype);
    return grads;
  }

 private:
  // Makes dx hold the gradient of y as well.
  void start_joint() {
    dy_ = dx_;
    dy_cols_ = {0, p_.y.rows};
  }
  // Makes dy_ zeros, for the gradients of these columns of S.
  void start_dy(const Range& cols) {
    if (dy_.defined() && dy_.size(0) == cols.size())
      dy_.zero_();
    else
      dy_ = zeros_for_y_.defined() ? zeros_for_y_ : at::zeros({cols.size(), p_.y.d}, p_.options());
    dy_cols_ = cols;
  }
  void finish_dy(const T* g) {
    if (g && p_.targets) add_to_targets(g);
    const int64_t diagonal = p_.targets ? 0 : p_.x.rows;  // row j of y is row j's positive
    dy_dot_ += finish_rows(dy_, dy_cols_.begin, p_.y, p_.x, g, p_.rule.scale,
                           [&](int64_t j) { return j < diagonal ? j : -1; });
  }
  // Adds the positives' part to dy: g[i] times row i of x to row target(i). It is one loop because several rows may
  // have the same target.
  void add_to_targets(const T* g) {
    const int64_t d = p_.x.d;
    std::vector<T> scratch;
    for (int64_t i = 0; i < p_.x.rows; ++i) {
      const int64_t target = p_.rule.target(i);
      if (target < dy_cols_.begin || target >= dy_cols_.end) continue;
      const T* x = p_.x.wide_row(i, scratch);
      tile_kernels<T>().add_scale_dot(dy_.mutable_data_ptr<T>() + (target - dy_cols_.begin) * d, x, x, g[i], T(1), d);
    }
  }
  // Converts through a double tensor: a number too large for float becomes inf, where at::scalar_tensor would raise.
  at::Tensor scalar(double value) const { return at::scalar_tensor(value, at::kDouble).to(p_.options()); }

  const Prepared<E>& p_;
  const Tiling& tiling_;
  std::array<bool, 4> needs_;
  bool joint_, scale_by_rows_;
  at::Tensor dx_, dy_, rounded_dy_, zeros_for_y_;
  Range dy_cols_{0, 0};  // the columns of S that dy_ has gradients for
  double dy_dot_ = 0;
  const T* pos_ = nullptr;
  Panels<E> x_, y_;
  LogitGradients<E> g_;
  TileScratch<T> scratch_;
  ColumnSums<T> bias_;
};

}  // namespace fc
