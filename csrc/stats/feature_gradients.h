// The gradients of x, y, scale and bias from G, the gradient of the logits, a section of which is held at a time.
#pragma once
#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/memory.h"
#include "stats/panels.h"
#include "common/parallel.h"
#include "stats/prepared.h"
#include "stats/stats.h"
#include "kernels/tile_kernels.h"
#include "stats/tiling.h"

namespace fc {

// G of one section, as the left-hand matrix of both products.
template <class E>
class Gradients {
 public:
  using T = typename Accumulator<E>::Type;

  explicit Gradients(const at::TensorOptions& options) : options_(options) {}
  // `room`, if it is not null: to hold G, with that many elements from row to row. G of pairs is bfloat16, and not held
  // there.
  void start(const Section& s, T* room, int64_t room_stride) {
    if constexpr (!kPairs)
      if (room) {
        along_ = room;
        stride_ = room_stride;
        return;
      }
    // Odd numbers of cache lines: rows a power of two apart would fall into the same few sets of the cache.
    stride_ = round_up(s.cols.size(), 32) + 16;
    down_stride_ = round_up(ceil_div(s.rows.size(), kStep), 32) + 16;
    const int64_t along = s.rows.size() * stride_ / kStep;
    const int64_t size = along + (kPairs ? round_up(s.cols.size(), 16) * down_stride_ : 0);
    if (!memory_.defined() || memory_.numel() < size) memory_ = at::empty({size}, options_);
    along_ = static_cast<E*>(memory_.mutable_data_ptr());
    down_ = along_ + along;
  }
  // Where a tile's gradient is to be written, and with what stride; `store` then takes it over.
  T* tile(int64_t r, int64_t c, const TileScratch<T>& scratch) const {
    if constexpr (kPairs)
      return scratch.get();
    else
      return along_ + r * stride_ + c;
  }
  int64_t tile_stride() const { return kPairs ? kTileCols : stride_; }
  void store(const T* tile, int64_t r, int64_t c, int64_t rows, int64_t cols) const {
    if constexpr (kPairs)
      products<E>().round_pairs(tile, kTileCols, rows, cols, along_ + r * stride_ / 2 + c / 2, stride_ / 2,
                                down_ + c * down_stride_ + r / 2, down_stride_);
  }
  // Rows of G, or of G.T, as an operand: k runs over `cols` or `rows`, counted from the section's first.
  Product<E> times_y(int64_t r, int64_t rows, const Range& cols) const {
    const int64_t stride = kPairs ? stride_ / 2 : stride_;
    return operand(rows, cols, along_ + r * stride + cols.begin / kStep, stride, 1);
  }
  Product<E> times_x(int64_t c, int64_t cols, const Range& rows) const {
    if constexpr (kPairs) return operand(cols, rows, down_ + c * down_stride_ + rows.begin / kStep, down_stride_, 1);
    return operand(cols, rows, along_ + rows.begin * stride_ + c, 1, stride_);
  }

 private:
  static constexpr bool kPairs = std::is_same_v<E, Bf16Pair>;
  static constexpr int64_t kStep = Stored<E>::rows;
  static Product<E> operand(int64_t m, const Range& k, const E* a, int64_t a_row, int64_t a_k) {
    return {m, 0, ceil_div(k.size(), kStep), a, a_row, a_k, nullptr, 0, nullptr, 0, true};
  }
  at::Tensor memory_;
  at::TensorOptions options_;
  int64_t stride_ = 0, down_stride_ = 0;
  E *along_ = nullptr, *down_ = nullptr;  // of G, and for pairs of G.T as well
};

// Column sums of G, tile by tile: the gradient of the bias. Added up in the tiles' order, some rows at a time in
// double: of a bias that all columns share it is one sum over all of G.
template <class T>
class ColumnSums {
 public:
  ColumnSums(bool asked, int64_t n) : total_(asked ? at::zeros({n}, at::kDouble) : at::Tensor()) {}
  void start(int64_t stories, int64_t length) {
    length_ = length;
    parts_.assign(total_.defined() ? stories * length : 0, 0);
  }
  void add(int64_t story, int64_t c, const T* tile, int64_t stride, int64_t rows, int64_t cols) {
    if (parts_.empty()) return;
    double* part = parts_.data() + story * length_ + c;
    std::array<T, kTileCols> some;
    for (const Range& at : pieces(0, rows, 16)) {
      std::fill_n(some.data(), cols, T(0));
      for (int64_t r = at.begin; r < at.end; ++r)
        for (int64_t j = 0; j < cols; ++j) some[j] += tile[r * stride + j];
      for (int64_t j = 0; j < cols; ++j) part[j] += some[j];
    }
  }
  void merge(int64_t first) {
    double* total = total_.defined() ? total_.template mutable_data_ptr<double>() + first : nullptr;
    for (size_t i = 0; i < parts_.size(); ++i) total[i % length_] += parts_[i];
  }
  at::Tensor total() const { return total_; }

 private:
  at::Tensor total_;
  int64_t length_ = 0;
  std::vector<double> parts_;
};

// One task's share of dx and dy: rows [begin, end) of it, counted from the section's first.
struct Chunk {
  bool of_x;
  Range rows;
};

inline std::vector<Chunk> chunks(bool of_x, int64_t rows) {
  std::vector<Chunk> all;
  for (const Range& r : pieces(0, rows, kChunkRows)) all.push_back({of_x, r});
  return all;
}

// Both in one list, each evenly over it: any part of the list has the same part of dx and of dy in every section.
inline std::vector<Chunk> merged(const std::vector<Chunk>& of_x, const std::vector<Chunk>& of_y) {
  std::vector<Chunk> all;
  for (size_t i = 0, j = 0; i < of_x.size() || j < of_y.size();) {
    const bool x_next = j == of_y.size() || (i < of_x.size() && i * of_y.size() <= j * of_x.size());
    all.push_back(x_next ? of_x[i++] : of_y[j++]);
  }
  return all;
}

// dx += G y and dy += G.T x for one section, dx and dy at the same time unless they are the same. dy begins with the
// gradient of column `first_of_y`.
template <class E, class T = typename Accumulator<E>::Type>
void add_products(const Walk& walk, const Section& s, const Gradients<E>& g, const Panels<E>& y, const Panels<E>& x,
                  T* dx, T* dy, int64_t first_of_y, int64_t d) {
  const auto add = [&](const Chunk& chunk) {
    const auto [of_x, rows] = chunk;
    const Range whole = of_x ? walk.cols_of(s, s.rows.begin + rows.begin) : walk.rows_of(s, s.cols.begin + rows.begin);
    const int64_t first = of_x ? s.cols.begin : s.rows.begin;
    const Range k{whole.begin - first, whole.end - first};
    if (k.size() == 0) return;
    Product<E> p = of_x ? g.times_y(rows.begin, rows.size(), k) : g.times_x(rows.begin, rows.size(), k);
    p.n = p.c_row = d;
    p.c = of_x ? dx + (s.rows.begin + rows.begin) * d : dy + (s.cols.begin - first_of_y + rows.begin) * d;
    (of_x ? y : x).multiply(p, k.begin / Stored<E>::rows, 0);
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

// Row i of the features in T: bfloat16 is widened into `room`, a unit feature made there.
template <class E, class T = typename Accumulator<E>::Type>
const T* wide_row(const Features<E>& f, int64_t i, std::vector<T>& room) {
  if constexpr (std::is_same_v<E, Bf16Pair>) {
    room.resize(f.d);
    for (int64_t j = 0; j < f.d; ++j) room[j] = c10::detail::f32_from_bits(f.elements[i * f.d + j]);
    return room.data();
  } else {
    return f.read(i, 1, 0, f.d, room).first;
  }
}

// The positives' gradients come after the products: among thousands of small negatives, one large term would cost the
// sum its low bits. They, the factor `scale` and the dot products for the scale's own gradient take one pass over
// `grad`.
//
// grad: sums over the negatives -> gradient of `features`, of those from `first` on. Row i of the features gains g[i]
// times row other_row(i) of `others`, unless that is negative. Returns sum(features * grad) before the factor.
// Of unit features `grad` is in the end that of the features before they were.
template <class E, class F, class T = typename Accumulator<E>::Type>
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
      const T* feature = wide_row(features, i, own);
      dots[part] += kernels<T>().finish_row(
          out + (i - first) * d, feature, o < 0 ? nullptr : wide_row(others, o, other), o < 0 ? T(0) : g[i], scale, d);
      if (features.unit()) project_row(out + (i - first) * d, feature, features.norm(i), d);
    }
  });
  return std::accumulate(dots.begin(), dots.end(), 0.);
}

// What a backward adds up, section by section, and finishes.
template <class E>
class FeatureGradients {
 public:
  using T = typename Accumulator<E>::Type;

  FeatureGradients(const Prepared<E>& p, const Walk& walk, const Needs& needs)
      : p_(p),
        walk_(walk),
        needs_(needs.of),
        joint_(needs.joint),
        g_(p.options()),
        scratch_(walk, p.options()),
        bias_(needs.of[3], p.y.rows) {
    // dscale = sum_i x_i . (G y)_i, or the same sum over columns when dx is not needed.
    scale_by_rows_ = needs_[0] || (needs_[2] && !needs_[1]);
    if (scale_by_rows_) dx_ = at::zeros({p.x.rows, p.x.d}, p.options());
    if (joint_) start_joint();
  }

  // For a walk that comes to each group once: dy in another dtype than T is then finished group by group, and only one
  // group of it is held in T. `pos`: as in `finish`.
  void round_groups(const OptionalTensor& pos, at::ScalarType y_dtype) {
    if (!needs_[1] || y_dtype == Prepared<E>::scalar_type()) return;
    pos_ = data<T>(pos);
    rounded_dy_ = at::empty({p_.y.rows, p_.y.d}, p_.options().dtype(y_dtype));
  }
  // The columns whose sections come next.
  void start_group(const Range& cols) {
    if (dx_.defined()) y_.set(p_.y, cols.begin, cols.end);
    if (rounded_dy_.defined()) start_dy(cols);
    if (needs_[1] && !dy_.defined()) start_dy({0, p_.y.rows});
  }
  // None of their sections comes again.
  void end_group() {
    if (!rounded_dy_.defined()) return;
    finish_dy(pos_);
    rounded_dy_.slice(0, dy_cols_.begin, dy_cols_.end).copy_(dy_);
  }
  // What `start_group` packs into, for another use meanwhile.
  Panels<E>& panels() { return y_; }
  // `logits_gradient(place, tile, stride)` writes G's tile there, or is also given its products there. `room`: memory
  // for G of this section, with that many elements from row to row, which is written to if it serves.
  template <class F>
  void add(const Section& s, const F& logits_gradient, T* room = nullptr, int64_t room_stride = 0) {
    if (dy_.defined()) x_.set(p_.x, s.rows.begin, s.rows.end);
    g_.start(s, room, room_stride);
    bias_.start(walk_.stories(s), s.cols.size());
    walk_.for_each_tile(
        s,
        [&](const Place& at, int64_t story, int64_t) {
          const int64_t r = at.row - s.rows.begin, c = at.col - s.cols.begin, stride = g_.tile_stride();
          T* tile = g_.tile(r, c, scratch_);
          logits_gradient(at, tile, stride);
          bias_.add(story, c, tile, stride, at.rows, at.cols);
          g_.store(tile, r, c, at.rows, at.cols);
        },
        [](const Place&, int64_t, int64_t) {});
    add_products<E>(walk_, s, g_, y_, x_, dx_.defined() ? dx_.mutable_data_ptr<T>() : nullptr,
                    dy_.defined() ? dy_.mutable_data_ptr<T>() : nullptr, dy_cols_.begin, p_.x.d);
    bias_.merge(s.cols.begin);
  }

  // Lets `add` write to the sums that become dx.
  template <class F>
  void add_to_x(const F& add) {
    if (dx_.defined()) add(dx_.mutable_data_ptr<T>());
  }

  // dx and dy in their features' dtypes, dscale and dcol_bias in T; undefined where not needed. `pos`: (M,) gradient of
  // the positives' logits. What only the products needed is given back first.
  std::array<at::Tensor, 4> finish(const OptionalTensor& pos, at::ScalarType x_dtype, at::ScalarType y_dtype) {
    constexpr auto dtype = Prepared<E>::scalar_type();
    x_ = y_ = Panels<E>();
    g_ = Gradients<E>(p_.options());
    const T* g = data<T>(pos);
    const T scale = p_.rule.scale;
    double dscale = 0;
    if (joint_) {  // each pair counts from both sides, twice for the scale
      if (g) add_to_targets(g);
      dscale = finish_rows(dx_, 0, p_.x, p_.y, g, scale, [&](int64_t i) { return p_.rule.target(i); }) / 2;
      dy_.reset();
      return {converted(std::exchange(dx_, {}), x_dtype), at::Tensor(), needs_[2] ? scalar(dscale) : at::Tensor(),
              at::Tensor()};
    }
    std::array<at::Tensor, 4> grads;
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
      if (p_.targets)
        dbias.index_add_(0, *p_.targets, pos->to(at::kDouble));
      else
        dbias.slice(0, 0, p_.x.rows).add_(*pos);
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
  // dx is to hold what y gains, too.
  void start_joint() {
    dy_ = dx_;
    dy_cols_ = {0, p_.y.rows};
  }
  // dy_ is to hold the gradients of these columns.
  void start_dy(const Range& cols) {
    if (dy_.defined() && dy_.size(0) == cols.size())
      dy_.zero_();
    else
      dy_ = at::zeros({cols.size(), p_.y.d}, p_.options());
    dy_cols_ = cols;
  }
  void finish_dy(const T* g) {
    if (g && p_.targets) add_to_targets(g);
    const int64_t diagonal = p_.targets ? 0 : p_.x.rows;  // row j of y is row j's positive
    dy_dot_ += finish_rows(dy_, dy_cols_.begin, p_.y, p_.x, g, p_.rule.scale,
                           [&](int64_t j) { return j < diagonal ? j : -1; });
  }
  // dy += the positives' part, of rows of x with targets of their own: several may have the same.
  void add_to_targets(const T* g) {
    const int64_t d = p_.x.d;
    std::vector<T> room;
    for (int64_t i = 0; i < p_.x.rows; ++i) {
      const int64_t target = p_.rule.target(i);
      if (target < dy_cols_.begin || target >= dy_cols_.end) continue;
      const T* x = wide_row(p_.x, i, room);
      kernels<T>().finish_row(dy_.mutable_data_ptr<T>() + (target - dy_cols_.begin) * d, x, x, g[i], T(1), d);
    }
  }
  // By way of a double tensor, which becomes inf in float where a C++ number would raise.
  at::Tensor scalar(double value) const { return at::scalar_tensor(value, at::kDouble).to(p_.options()); }

  const Prepared<E>& p_;
  const Walk& walk_;
  std::array<bool, 4> needs_;
  bool joint_, scale_by_rows_;
  at::Tensor dx_, dy_, rounded_dy_;
  Range dy_cols_{0, 0};  // that dy_ has the gradients of
  double dy_dot_ = 0;
  const T* pos_ = nullptr;
  Panels<E> x_, y_;
  Gradients<E> g_;
  TileScratch<T> scratch_;
  ColumnSums<T> bias_;
};

}  // namespace fc
