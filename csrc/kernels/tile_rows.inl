// Rows of a tile in memory. Rows of products end without padding; copies that a sweep makes for itself are padded.

// Load or store the vector at row[j] of a row of n elements. Lanes beyond the row are loaded as -inf, and are not
// stored.
template <class T>
static inline Vec<T> load_row(const T* row, int64_t j, int64_t n) {
  if (j + kLanes<T> <= n) return load(row + j);
  Vec<T> v = fill<T>(kNegInf<T>);
  __builtin_memcpy(&v, row + j, (n - j) * sizeof(T));
  return v;
}
template <class T>
static inline void store_row(T* row, int64_t j, int64_t n, Vec<T> v) {
  if (j + kLanes<T> <= n) return store(row + j, v);
  __builtin_memcpy(row + j, &v, (n - j) * sizeof(T));
}

// Copies n values and pads them to a tile's width, so that loops over columns need no tail.
template <class To, class From>
static inline void copy_padded(To* out, const From* values, int64_t n, To pad) {
  for (int64_t j = 0; j < n; ++j) out[j] = To(values[j]);
  for (int64_t j = n; j < kTileCols; ++j) out[j] = pad;
}

// Prefetches row r of a tile into the first-level cache: the products, which are read, and the gradient, which is
// written. Rows are further apart than a page, and the hardware prefetches within a page only.
template <class T>
static inline void fetch_row(const BackwardTile<T>& tile, int64_t r) {
  if (r >= tile.at.rows) return;
  constexpr int64_t line = 64 / sizeof(T);
  const T *products = tile.products + r * tile.stride, *grad = tile.grad + r * tile.grad_stride;
  for (int64_t j = 0; j < tile.at.cols; j += line) {
    __builtin_prefetch(products + j);
    __builtin_prefetch(grad + j, 1);
  }
}
constexpr int64_t kFetchAhead = 2;  // rows

// The guide's row r of a tile, or null.
template <class Tile>
static inline auto guide_row(const Tile& tile, int64_t r) {
  return tile.guide ? tile.guide + r * kTileCols : nullptr;
}

// Where the logit of row i's positive goes.
template <class T>
static inline T* pos_of(const ForwardTile<T>& tile, int64_t i) {
  return tile.pos ? tile.pos + i : nullptr;
}
