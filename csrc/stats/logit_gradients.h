// G, the gradient of the logits, one section at a time: as an operand of matrix products, and its column sums.
#pragma once
#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <vector>

#include "common/integers.h"
#include "kernels/product_kernels.h"
#include "stats/tiling.h"

namespace fc {

// G of one section, as the left-hand matrix of the products G y and G.T x. For pairs it is held in bfloat16, once in
// rows and once transposed, so that both products read adjacent pairs.
template <class E>
class LogitGradients {
 public:
  using T = SumType<E>;

  explicit LogitGradients(const at::TensorOptions& options) : options_(options) {}
  // Begins a section. `memory`, if not null, is used for G, with rows `stride` apart; G of pairs has its own memory.
  void start(const Section& s, T* memory, int64_t stride) {
    if constexpr (!kIsPair<E>)
      if (memory) {
        g_ = memory;
        stride_ = stride;
        return;
      }
    // Strides are odd multiples of 16: rows a power of 2 apart would fall into the same few sets of the cache.
    stride_ = round_up(s.cols.size(), 32) + 16;
    transposed_stride_ = round_up(ceil_div(s.rows.size(), kStoredPer<E>), 32) + 16;
    const int64_t size = s.rows.size() * stride_ / kStoredPer<E>;
    const int64_t transposed_size = kIsPair<E> ? round_up(s.cols.size(), 16) * transposed_stride_ : 0;
    if (!memory_.defined() || memory_.numel() < size + transposed_size)
      memory_ = at::empty({size + transposed_size}, options_);
    g_ = static_cast<E*>(memory_.mutable_data_ptr());
    g_transposed_ = g_ + size;
  }
  // Returns where a tile of G is to be written, with rows `tile_stride()` apart. `store` must be called afterwards: it
  // rounds G of pairs.
  T* tile(int64_t r, int64_t c, const TileScratch<T>& scratch) const {
    if constexpr (kIsPair<E>)
      return scratch.get();
    else
      return g_ + r * stride_ + c;
  }
  int64_t tile_stride() const { return kIsPair<E> ? kTileCols : stride_; }
  void store(const T* tile, int64_t r, int64_t c, int64_t rows, int64_t cols) const {
    if constexpr (kIsPair<E>)
      product_kernels<E>().round_pairs(tile, kTileCols, rows, cols, g_ + r * stride_ / 2 + c / 2, stride_ / 2,
                                       g_transposed_ + c * transposed_stride_ + r / 2, transposed_stride_);
  }
  // Returns rows [r, r + rows) of G as the left-hand matrix, where k runs over columns `cols`. Rows and columns count
  // from the section's first.
  MatrixProduct<E> times_y(int64_t r, int64_t rows, const Range& cols) const {
    const int64_t stride = kIsPair<E> ? stride_ / 2 : stride_;
    return operand(rows, cols, g_ + r * stride + cols.begin / kStoredPer<E>, stride, 1);
  }
  // Returns rows [c, c + cols) of G.T, where k runs over rows `rows` of G.
  MatrixProduct<E> times_x(int64_t c, int64_t cols, const Range& rows) const {
    if constexpr (kIsPair<E>)
      return operand(cols, rows, g_transposed_ + c * transposed_stride_ + rows.begin / kStoredPer<E>,
                     transposed_stride_, 1);
    return operand(cols, rows, g_ + rows.begin * stride_ + c, 1, stride_);
  }

 private:
  static MatrixProduct<E> operand(int64_t m, const Range& k, const E* a, int64_t a_row, int64_t a_k) {
    return {m, 0, ceil_div(k.size(), kStoredPer<E>), a, a_row, a_k, nullptr, 0, nullptr, 0, true};
  }
  at::Tensor memory_;
  at::TensorOptions options_;
  int64_t stride_ = 0, transposed_stride_ = 0;
  E *g_ = nullptr, *g_transposed_ = nullptr;
};

// Sums the columns of G, which gives the gradient of the bias. Sums of 16 rows are added up in double, in the order of
// the tiles: the gradient of a bias that all columns share is one sum over all of G, too long for float.
template <class T>
class ColumnSums {
 public:
  ColumnSums(bool asked, int64_t n) : total_(asked ? at::zeros({n}, at::kDouble) : at::Tensor()) {}
  void start(int64_t tile_rows, int64_t length) {
    length_ = length;
    parts_.assign(total_.defined() ? tile_rows * length : 0, 0);
  }
  void add(int64_t tile_row, int64_t c, const T* tile, int64_t stride, int64_t rows, int64_t cols) {
    if (parts_.empty()) return;
    double* part = parts_.data() + tile_row * length_ + c;
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

}  // namespace fc
