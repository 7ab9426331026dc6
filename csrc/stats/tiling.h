// S is cut into groups of columns, whose right-hand matrix is packed once. A group is cut into sections of rows, after
// which partial results are merged, and a section into tiles, each one thread's work, which stay in its cache. Tiles
// depend on the shape of S alone and are merged in order, so the number of threads does not change the result's bits.
#pragma once
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "common/integers.h"
#include "common/parallel.h"
#include "kernels/product_kernels.h"
#include "kernels/tile_kernels.h"

namespace fc {

// How many columns have their features packed at once. For pairs it is half as many: the memory for a group is then a
// small part of what eager bfloat16 takes, and its 256 pairs are exactly one part of a sum (kDepth).
template <class E>
constexpr int64_t kPackedCols = kIsPair<E> ? 512 : 1024;
constexpr int64_t kSectionRows = 512;  // of a section, for every kSectionThreads threads or part of them
constexpr int64_t kSectionThreads = 8;
constexpr int64_t kLeastTileRows = 64;  // a tile has this many rows, or a power of 2 times as many, up to kTileRows
static_assert(kSectionRows % kTileRows == 0 && kPackedCols<float> % kTileCols == 0 &&
              kPackedCols<Bf16Pair> % kTileCols == 0);

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// [begin, end) in pieces of `size`; the last may be shorter.
inline std::vector<Range> pieces(int64_t begin, int64_t end, int64_t size) {
  std::vector<Range> all;
  for (int64_t at = begin; at < end; at += size) all.push_back({at, std::min(at + size, end)});
  return all;
}

struct Section {
  Range rows, cols;
  bool kept;  // its products are kept from forward to backward
};

class Tiling {
 public:
  Tiling(int64_t m, int64_t n, int64_t packed_cols, int64_t kept_rows, bool upper)
      : m_(m),
        n_(n),
        packed_cols_(packed_cols),
        kept_rows_(kept_rows),
        upper_(upper),
        threads_(at::in_parallel_region() ? 1 : at::get_num_threads()) {
    // Tiles are smaller where S is small, so that all threads find work, and in a triangle, where half of a tile on the
    // diagonal is computed in vain.
    for (tile_rows_ = kLeastTileRows; tile_rows_ < std::min(kTileRows, m / (upper ? 8 : 4));) tile_rows_ *= 2;
    tile_cols_ = upper ? tile_rows_ : kTileCols;
  }

  // The most threads that `for_each_tile` uses. It is fixed here, since a signal handler may change torch's number.
  int64_t threads() const { return threads_; }
  std::vector<Range> column_groups() const { return pieces(0, n_, packed_cols_); }
  // Rows whose products are kept come first, so that no section is half kept. Sections below the diagonal of an upper
  // triangle are left out.
  std::vector<Section> sections(const Range& cols) const {
    const int64_t height = kSectionRows * ceil_div(threads_, kSectionThreads);
    std::vector<Section> all;
    for (const bool kept : {true, false})
      for (const Range& rows : pieces(kept ? 0 : kept_rows_, kept ? kept_rows_ : m_, height))
        if (!is_excluded(rows, cols)) all.push_back({rows, cols, kept});
    return all;
  }
  // How many tiles lie in a column, and in a row, of a section.
  int64_t tile_rows(const Section& s) const { return ceil_div(s.rows.size(), tile_rows_); }
  int64_t tile_cols(const Section& s) const { return ceil_div(s.cols.size(), tile_cols_); }

  // For every tile of a section, in parallel: calls `sweep(bounds, tile_row, tile_col)`, or `skip` for one without any
  // pair above the diagonal of an upper triangle.
  template <class F, class G>
  void for_each_tile(const Section& s, const F& sweep, const G& skip) const {
    const int64_t tile_cols = this->tile_cols(s);
    const auto visit = [&](int64_t task) {
      const int64_t tile_row = task / tile_cols, tile_col = task % tile_cols;
      const Range rows = part(s.rows, tile_row, tile_rows_), cols = part(s.cols, tile_col, tile_cols_);
      const TileBounds at{rows.begin, cols.begin, rows.size(), cols.size()};
      if (is_excluded(rows, cols))
        skip(at, tile_row, tile_col);
      else
        sweep(at, tile_row, tile_col);
    };
    for_each_task(tile_cols * tile_rows(s), visit, threads_);
  }

  // The columns of a section whose tiles are not skipped, for rows that begin at `row`.
  Range cols_of(const Section& s, int64_t row) const {
    if (!upper_) return s.cols;
    const int64_t first = s.rows.begin + (row - s.rows.begin) / tile_rows_ * tile_rows_;  // the first row of its tiles
    if (s.cols.end <= first) return {s.cols.end, s.cols.end};
    return {s.cols.begin + std::max<int64_t>(0, (first - s.cols.begin) / tile_cols_) * tile_cols_, s.cols.end};
  }
  // The rows of a section whose tiles are not skipped, for the column `col`.
  Range rows_of(const Section& s, int64_t col) const {
    if (!upper_) return s.rows;
    const int64_t end =
        std::min(s.cols.end, s.cols.begin + (col - s.cols.begin) / tile_cols_ * tile_cols_ + tile_cols_);
    return {s.rows.begin,
            std::clamp(s.rows.begin + round_up(end - s.rows.begin, tile_rows_), s.rows.begin, s.rows.end)};
  }

 private:
  bool is_excluded(const Range& rows, const Range& cols) const { return upper_ && cols.end <= rows.begin; }
  static Range part(const Range& whole, int64_t index, int64_t size) {
    return {whole.begin + index * size, std::min(whole.begin + (index + 1) * size, whole.end)};
  }

  int64_t m_, n_, packed_cols_, kept_rows_;
  bool upper_;
  int64_t tile_rows_, tile_cols_, threads_;
};

// Where a tile begins in the (rows, N) products that are kept. Each tile lies by itself, as rows of `at.cols`: rows of
// S may be a power of 2 apart and would fall into the same few sets of the cache.
inline int64_t kept_offset(const TileBounds& at, int64_t n) {
  return at.row * n + at.col * at.rows;
}

// Memory for one tile in each thread, if any tile needs it.
template <class T>
class TileScratch {
 public:
  TileScratch(const Tiling& tiling, const at::TensorOptions& options, bool needed = true)
      : alone_(tiling.threads() == 1) {
    if (needed) memory_ = at::empty({tiling.threads() * kTileRows * kTileCols}, options);
  }
  T* get() const {
    const int64_t thread = alone_ ? 0 : at::get_thread_num();
    return memory_.template mutable_data_ptr<T>() + thread * kTileRows * kTileCols;
  }

 private:
  at::Tensor memory_;
  bool alone_;  // one thread uses it, which may be any of a parallel region
};

}  // namespace fc
