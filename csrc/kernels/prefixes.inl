// What the tiles of several prefixes need beside the sweeps of one: each prefix's own norms, and one gradient for the
// columns of features that several prefixes share.

template <class T>
static void scale(const ScaledTile<T>& tile) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    const T *in = tile.products + r * tile.stride, row = tile.row[r];
    T* out = tile.out + r * tile.out_stride;
    for (int64_t j = 0; j < tile.cols; j += kLanes<T>)
      store_row(out, j, tile.cols, load_row(in, j, tile.cols) * row * load_row(tile.col, j, tile.cols));
  }
}

template <class T, bool kFactors, bool kLonger, bool kDots>
static void weigh_tile(const WeighedTile<T>& tile) {
  alignas(64) T col[kTileCols], whole[kTileCols] = {}, some[kTileCols];
  if (kFactors) copy_padded(col, tile.col, tile.cols, T(0));
  for (int64_t first = 0; first < tile.rows; first += kSweepRows) {
    for (int64_t j = 0; kDots && j < kTileCols; ++j) some[j] = 0;  // short sums: equal terms would all round one way
    for (int64_t r = first; r < smaller(first + kSweepRows, tile.rows); ++r) {
      const T* cosines = tile.cosines + r * tile.stride;
      T* grad = tile.grad + r * tile.grad_stride;
      const T row = kFactors ? tile.row[r] : T(1);
      Vec<T> sum{};
      for (int64_t j = 0; j < tile.cols; j += kLanes<T>) {
        const bool is_whole = j + kLanes<T> <= tile.cols;
        Vec<T> g = load_row(grad, j, tile.cols);
        if (kDots) {
          Vec<T> dot = g * load_row(cosines, j, tile.cols);
          for (int64_t l = tile.cols - j; !is_whole && l < kLanes<T>; ++l) dot[l] = 0;
          sum += dot;
          store(some + j, load(some + j) + dot);
        }
        if (kFactors) g *= row * load(col + j);
        if (kLonger) g += load_row(tile.longer + r * tile.grad_stride, j, tile.cols);
        if (kFactors || kLonger) store_row(grad, j, tile.cols, g);
      }
      if (kDots && tile.row_dots) tile.row_dots[r] = total<T>(sum);
    }
    for (int64_t j = 0; kDots && j < tile.cols; j += kLanes<T>) store(whole + j, load(whole + j) + load(some + j));
  }
  if (kDots && tile.col_dots) __builtin_memcpy(tile.col_dots, whole, tile.cols * sizeof(T));
}

template <class T, bool kFactors, bool kLonger>
static void weigh_longer(const WeighedTile<T>& tile) {
  if (tile.row_dots || tile.col_dots) return weigh_tile<T, kFactors, kLonger, true>(tile);
  weigh_tile<T, kFactors, kLonger, false>(tile);
}

template <class T>
static void weigh(const WeighedTile<T>& tile) {
  if (!tile.row && !tile.longer && !tile.row_dots && !tile.col_dots) return;
  if (tile.row && tile.longer) return weigh_longer<T, true, true>(tile);
  if (tile.row) return weigh_longer<T, true, false>(tile);
  if (tile.longer) return weigh_longer<T, false, true>(tile);
  weigh_longer<T, false, false>(tile);
}
