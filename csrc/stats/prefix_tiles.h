// Tiles of the products of nested prefixes, which grow by the elements that each prefix adds.
#pragma once
#include <cstring>
#include <vector>

#include "kernels/tile_kernels.h"
#include "stats/panels.h"
#include "stats/prefixes.h"
#include "stats/prepared.h"
#include "stats/tiling.h"

namespace fc {

// A problem's features and the prefixes of them, and their cosines tile by tile.
template <class E, class T = SumType<E>>
class PrefixTiles {
 public:
  PrefixTiles(const StatsProblem& problem, const Prefixes& prefixes)
      : p(problem),
        tiling(p.x.rows, p.y.rows, kPackedCols<E>, problem.kept_rows, false),
        dims_(prefixes.dims),
        kept_(prefixes.kept),
        row_(readable("row_factors", prefixes.row, p.scalar_type())),
        col_(readable("col_factors", prefixes.col, p.scalar_type())) {
    at::Tensor unused;
    x_ = p.x.read_rows(0, p.x.rows, unused);
  }
  int64_t count() const { return static_cast<int64_t>(dims_.size()); }
  // The elements that prefix k adds to the one before.
  Range part(int64_t k) const { return {k ? dims_[k - 1] : 0, dims_[k]}; }
  const T* row(int64_t k) const { return row_ ? data<T>(row_) + k * p.x.rows : nullptr; }
  const T* col(int64_t k) const { return col_ ? data<T>(col_) + k * p.y.rows : nullptr; }
  // The product of both factors of a pair.
  T factor(int64_t k, int64_t i, int64_t j) const { return row_ ? row(k)[i] * col(k)[j] : T(1); }

  void start_group(const Range& cols) {
    first_ = cols.begin;
    y_.set_transposed(p.y, cols.begin, cols.end);
  }
  // Makes the cosines of prefix k from the tile's products of the prefixes before, in `products` with rows kTileCols
  // apart, and writes them to `out`.
  void make(int64_t k, const TileBounds& at, T* products, T* out, int64_t stride) const {
    add(k, at, products);
    if (row_)
      tile_kernels<T>().scale({at.rows, at.cols, row(k) + at.row, col(k) + at.col, products, kTileCols, out, stride});
    else
      for (int64_t r = 0; r < at.rows; ++r)
        std::memcpy(out + r * stride, products + r * kTileCols, at.cols * sizeof(T));
  }
  // Adds the elements of prefix k to a tile's products.
  void add(int64_t k, const TileBounds& at, T* products) const {
    multiply_part(x_, y_, at, first_, part(k).begin, part(k).end, products, kTileCols);
  }
  // Whether the products are the cosines.
  bool is_plain() const { return !row_; }
  // Whether prefix k's cosines are kept in a section, and where those of a tile are.
  bool keeps(const Section& s, int64_t k) const { return s.kept && k >= count() - kept_; }
  int64_t kept(int64_t k, const TileBounds& at) const {
    return kept_offset(at, p.y.rows) * kept_ + (k - count() + kept_) * at.rows * at.cols;
  }

  const Prepared<E> p;
  const Tiling tiling;

 private:
  std::vector<int64_t> dims_;
  int64_t kept_;
  OptionalTensor row_, col_;
  FeatureRows<E> x_;
  Panels<E> y_;
  int64_t first_ = 0;
};

}  // namespace fc
