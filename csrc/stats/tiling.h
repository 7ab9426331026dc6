// How S is walked: by groups of columns, whose right-hand matrix is packed once; in each by sections of rows, after
// which partial results are merged; in each by tiles, one thread's work at a time, which stay in its cache.
//
// Where a tile begins depends on the shape of S alone, and partials are merged in the tiles' order: results have the
// same bits whatever the number of threads.
#pragma once
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "stats/panels.h"
#include "common/parallel.h"
#include "common/integers.h"
#include "kernels/tile_kernels.h"

namespace fc {

// Columns whose features are packed at once. Of pairs half as many: what is made of them is then a small part of the
// memory that eager bfloat16 takes, and they fill one part of a sum (kDepth).
template <class E>
constexpr int64_t kGroupCols = std::is_same_v<E, Bf16Pair> ? 512 : 1024;
constexpr int64_t kSectionRows = 512;  // for up to kSectionThreads threads, and as much again for more
constexpr int64_t kSectionThreads = 8;
constexpr int64_t kLeastTileRows = 64;  // of twice as many, and so on, up to kTileRows
static_assert(kSectionRows % kTileRows == 0 && kGroupCols<float> % kTileCols == 0 &&
              kGroupCols<Bf16Pair> % kTileCols == 0);
// Most rows of dx, and of dy, that one task adds to. It reads all of y's panels, or x's, and for each of them its rows
// of G again: those stay in a core's second cache while the panels pass through.
constexpr int64_t kChunkRows = 64;
static_assert(kLeastTileRows % kChunkRows == 0);  // all rows of a chunk skip the same tiles

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

class Walk {
 public:
  Walk(int64_t m, int64_t n, int64_t group_cols, int64_t kept_rows, bool upper)
      : m_(m), n_(n), group_cols_(group_cols), kept_rows_(kept_rows), upper_(upper), threads_(at::get_num_threads()) {
    // Smaller tiles where S is small, so that all threads find work, and where those on the diagonal are half for
    // nothing. Whole chunks, and parts of a section.
    for (tile_rows_ = kLeastTileRows; tile_rows_ < std::min(kTileRows, m / (upper ? 8 : 4));) tile_rows_ *= 2;
    tile_cols_ = upper ? tile_rows_ : kTileCols;
  }

  // On how many threads at most `for_each_tile` calls: what a signal handler sets meanwhile is for the next walk.
  int64_t threads() const { return threads_; }
  std::vector<Range> groups() const { return pieces(0, n_, group_cols_); }
  // Kept rows first, so that no section is half kept. Of the upper triangle, those below the diagonal are left out.
  std::vector<Section> sections(const Range& cols) const {
    const int64_t height = kSectionRows * ceil_div(threads_, kSectionThreads);
    std::vector<Section> all;
    for (const bool kept : {true, false})
      for (const Range& rows : pieces(kept ? 0 : kept_rows_, kept ? kept_rows_ : m_, height))
        if (!excluded(rows, cols)) all.push_back({rows, cols, kept});
    return all;
  }
  int64_t strips(const Section& s) const { return ceil_div(s.cols.size(), tile_cols_); }
  int64_t stories(const Section& s) const { return ceil_div(s.rows.size(), tile_rows_); }

  // Calls `sweep(place, story, strip)` for every tile of a section, in parallel; `skip` for one with no pair that
  // counts.
  template <class F, class G>
  void for_each_tile(const Section& s, const F& sweep, const G& skip) const {
    const int64_t strips = this->strips(s);
    const auto visit = [&](int64_t task) {
      const int64_t story = task / strips, strip = task % strips;
      const Range rows = part(s.rows, story, tile_rows_), cols = part(s.cols, strip, tile_cols_);
      const Place at{rows.begin, cols.begin, rows.size(), cols.size()};
      if (excluded(rows, cols))
        skip(at, story, strip);
      else
        sweep(at, story, strip);
    };
    for_each_task(strips * stories(s), visit, threads_);
  }

  // The columns of a section with tiles that are not skipped, for rows that begin at `row`; the rows, for columns that
  // end at `col`.
  Range cols_of(const Section& s, int64_t row) const {
    if (!upper_) return s.cols;
    const int64_t story = s.rows.begin + (row - s.rows.begin) / tile_rows_ * tile_rows_;
    if (s.cols.end <= story) return {s.cols.end, s.cols.end};
    return {s.cols.begin + std::max<int64_t>(0, (story - s.cols.begin) / tile_cols_) * tile_cols_, s.cols.end};
  }
  Range rows_of(const Section& s, int64_t col) const {
    if (!upper_) return s.rows;
    const int64_t end =
        std::min(s.cols.end, s.cols.begin + (col - s.cols.begin) / tile_cols_ * tile_cols_ + tile_cols_);
    return {s.rows.begin,
            std::clamp(s.rows.begin + round_up(end - s.rows.begin, tile_rows_), s.rows.begin, s.rows.end)};
  }

 private:
  bool excluded(const Range& rows, const Range& cols) const { return upper_ && cols.end <= rows.begin; }
  static Range part(const Range& whole, int64_t index, int64_t size) {
    return {whole.begin + index * size, std::min(whole.begin + (index + 1) * size, whole.end)};
  }

  int64_t m_, n_, group_cols_, kept_rows_;
  bool upper_;
  int64_t tile_rows_, tile_cols_, threads_;
};

// Where a tile's products are in the (rows, N) that are kept, as rows of `at.cols`: each tile by itself, as rows of S
// may be a power of two apart, and would fall into the same few sets of the cache. The same for a forward and a
// backward on different numbers of threads, whose sections differ, but not the tiles.
inline int64_t kept_offset(const Place& at, int64_t n) {
  return at.row * n + at.col * at.rows;
}

// A tile's products x @ y.T, of which `y` has the columns from `first` on.
template <class E, class T = typename Accumulator<E>::Type>
void multiply_tile(const Rows<E>& x, const Panels<E>& y, const Place& at, int64_t first, T* tile, int64_t stride) {
  const int64_t d = x.d / Stored<E>::rows;
  y.multiply({at.rows, at.cols, d, x.row(at.row), d, 1, nullptr, 0, tile, stride, false}, 0, first);
}

// Scratch for one tile in each thread of a walk.
template <class T>
class TileScratch {
 public:
  TileScratch(const Walk& walk, const at::TensorOptions& options)
      : memory_(at::empty({walk.threads() * kTileRows * kTileCols}, options)) {}
  T* get() const { return memory_.template mutable_data_ptr<T>() + at::get_thread_num() * kTileRows * kTileCols; }

 private:
  at::Tensor memory_;
};

}  // namespace fc
