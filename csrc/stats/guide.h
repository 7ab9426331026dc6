// A guide: another model's features of the same rows and columns. Their products are compared with the limits, or are a
// teacher's logits.
#pragma once
#include <ATen/ATen.h>

#include <optional>

#include "common/input.h"
#include "kernels/tile_kernels.h"
#include "stats/features.h"
#include "stats/panels.h"
#include "stats/tiling.h"

namespace fc {

// Multiplies the guide's features, in T, one tile at a time. Without a guide it does nothing.
template <class T>
class Guide {
 public:
  Guide(const OptionalTensor& rows, const OptionalTensor& cols, const Tiling& tiling,
        const at::TensorOptions& options) {
    if (!rows || !cols) return;
    x_.emplace("row_guide", *rows, false);
    y_.emplace("col_guide", *cols, false);
    scratch_.emplace(tiling, options);
  }
  // To be called before the tiles of a group of columns.
  void start_group(const Range& cols) {
    if (!x_) return;
    first_ = cols.begin;
    panels_.set_transposed(*y_, cols.begin, cols.end);
  }
  // Returns a tile's products, with rows kTileCols apart, in memory of the calling thread; or null.
  const T* tile(const TileBounds& at) const {
    if (!x_) return nullptr;
    at::Tensor unused;
    multiply_tile(x_->read_rows(0, x_->rows, unused), panels_, at, first_, scratch_->get(), kTileCols);
    return scratch_->get();
  }

 private:
  std::optional<Features<T>> x_, y_;
  std::optional<TileScratch<T>> scratch_;
  Panels<T> panels_;
  int64_t first_ = 0;
};

}  // namespace fc
