// The vector kernels of late interaction; levels.cpp includes this after tile_sweeps.inl, whose row access it uses.

// Loads n indices, at most one vector of them, as integers of the lanes' width.
template <class T>
static inline IntVec<T> load_index(const int32_t* index, int64_t n) {
  IntVec<T> v{};
  for (int64_t l = 0; l < n; ++l) v[l] = index[l];
  return v;
}
template <class T>
static inline void store_index(int32_t* index, int64_t n, IntVec<T> v) {
  for (int64_t l = 0; l < n; ++l) index[l] = static_cast<int32_t>(v[l]);
}

// Computes column_maxima for kVecs whole vectors of columns or, with kTail, for a last vector with only `cols` columns.
template <class T, int kVecs, bool kTail>
static inline void column_maxima_of(const T* products, int64_t stride, int64_t rows, int64_t cols, int64_t first,
                                    T* best, int32_t* index) {
  using Int = typename Lanes<T>::Int;
  constexpr int64_t kL = kLanes<T>;
  const int64_t width = kTail ? cols : kVecs * kL;
  Vec<T> top[kVecs];
  IntVec<T> at[kVecs], nan[kVecs];
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) {
    top[v] = load_row(first ? best : products, v * kL, width);
    at[v] = first ? load_index<T>(index + v * kL, kTail ? cols : kL) : IntVec<T>{};
    nan[v] = top[v] != top[v];
  }
  for (int64_t i = first ? 0 : 1; i < rows; ++i) {
    const Int here = static_cast<Int>(first + i);
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      const Vec<T> s = load_row(products + i * stride, v * kL, width);
      const IntVec<T> higher = s > top[v];
      top[v] = higher ? s : top[v];
      at[v] = higher ? IntVec<T>{} + here : at[v];
      nan[v] |= s != s;
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) {
    store_row(best, v * kL, width, nan[v] ? fill<T>(kNaN<T>) : top[v]);
    store_index<T>(index + v * kL, kTail ? cols : kL, at[v]);
  }
}

template <class T>
static void column_maxima(const T* products, int64_t stride, int64_t rows, int64_t cols, int64_t first, T* best,
                          int32_t* index) {
  constexpr int kVecs = 4;
  int64_t j = 0;
  for (; j + kVecs * kLanes<T> <= cols; j += kVecs * kLanes<T>)
    column_maxima_of<T, kVecs, false>(products + j, stride, rows, 0, first, best + j, index + j);
  for (; j + kLanes<T> <= cols; j += kLanes<T>)
    column_maxima_of<T, 1, false>(products + j, stride, rows, 0, first, best + j, index + j);
  if (j < cols) column_maxima_of<T, 1, true>(products + j, stride, rows, cols - j, first, best + j, index + j);
}

// Returns column l of a square matrix with as many rows as a vector has lanes.
template <class V, class T>
static inline V column(const T* square, int64_t l) {
  constexpr int64_t kL = sizeof(V) / sizeof(T);
  V v;
#pragma GCC unroll 16
  for (int64_t r = 0; r < kL; ++r) v[r] = square[r * kL + l];
  return v;
}

// Takes as many rows at a time as a vector has lanes. In each row, every lane finds the maximum of its columns; then
// the square matrix of these maxima is compared column by column, for all rows at once. Of equal maxima the first wins.
template <class T>
static void row_maxima(const T* products, int64_t stride, int64_t rows, int64_t cols, int64_t first, T* best,
                       int32_t* index) {
  using Int = typename Lanes<T>::Int;
  constexpr int64_t kL = kLanes<T>;
  alignas(64) T tops[kL * kL] = {};
  alignas(64) Int ats[kL * kL] = {};
  IntVec<T> lanes;
  for (int64_t l = 0; l < kL; ++l) lanes[l] = static_cast<Int>(l);
  for (int64_t i = 0; i < rows; i += kL) {
    const int64_t count = smaller(kL, rows - i);
    for (int64_t r = 0; r < count; ++r) {
      const T* row = products + (i + r) * stride;
      Vec<T> top = load_row(row, 0, cols);
      IntVec<T> at = lanes, nan = top != top;
      for (int64_t j = kL; j < cols; j += kL) {
        const Vec<T> s = load_row(row, j, cols);
        const IntVec<T> higher = s > top;
        top = higher ? s : top;
        at = higher ? lanes + static_cast<Int>(j) : at;
        nan |= s != s;
      }
      store(tops + r * kL, nan ? fill<T>(kNaN<T>) : top);
      __builtin_memcpy(ats + r * kL, &at, sizeof at);
    }
    Vec<T> top = column<Vec<T>>(tops, 0);
    IntVec<T> at = column<IntVec<T>>(ats, 0), nan = top != top;
    for (int64_t l = 1; l < smaller(kL, cols); ++l) {
      const Vec<T> s = column<Vec<T>>(tops, l);
      const IntVec<T> where = column<IntVec<T>>(ats, l);
      const IntVec<T> better = (s > top) | ((s == top) & (where < at));
      top = better ? s : top;
      at = better ? where : at;
      nan |= s != s;
    }
    at += static_cast<Int>(first);
    if (first) {  // the maximum so far wins if it is equal or NaN
      const Vec<T> before = load_row(best, i, i + count);
      const IntVec<T> higher = top > before;
      at = higher ? at : load_index<T>(index + i, count);
      top = higher ? top : before;
      nan |= before != before;
    }
    store_row(best, i, i + count, nan ? fill<T>(kNaN<T>) : top);
    store_index<T>(index + i, count, at);
  }
}

// Adds g * in to out, for rows d long.
template <class T>
static inline void add_row(T* out, const T* in, int64_t d, T g) {
  int64_t j = 0;
  for (; j + kLanes<T> <= d; j += kLanes<T>) store(out + j, load(out + j) + load(in + j) * g);
  for (; j < d; ++j) out[j] += in[j] * g;
}

template <class T>
static void gather(T* out, const T* in, const int32_t* index, int64_t count, int64_t d, T g) {
  for (int64_t i = 0; i < count; ++i) add_row(out + i * d, in + index[i] * d, d, g);
}

template <class T>
static void scatter(T* out, const T* in, const int32_t* index, int64_t count, int64_t d, T g) {
  for (int64_t i = 0; i < count; ++i) add_row(out + index[i] * d, in + i * d, d, g);
}

template <class T>
static void column_sums(const T* products, int64_t stride, int64_t rows, int64_t cols, T inverse, T* top, T* sum) {
  constexpr int64_t kPart = 64;  // rows of a partial sum: long sums of float32 would round too often
  for (int64_t j = 0; j < cols; j += kLanes<T>) {
    Vec<T> most = load_row(products, j, cols), total{};
    for (int64_t i = 1; i < rows; ++i) most = maximum<T>(most, load_row(products + i * stride, j, cols));
    const Vec<T> reference = finite_reference<T>(most);
    for (int64_t first = 0; first < rows; first += kPart) {
      Vec<T> part{};
      for (int64_t i = first; i < smaller(first + kPart, rows); ++i)
        part += exp_nonpositive<T>((load_row(products + i * stride, j, cols) - reference) * inverse);
      total += part;
    }
    store_row(top, j, cols, most);
    store_row(sum, j, cols, total);
  }
}

template <class T>
static void column_weights(T* products, int64_t stride, int64_t rows, int64_t cols, T inverse, const T* top,
                           const T* factor) {
  for (int64_t j = 0; j < cols; j += kLanes<T>) {
    const Vec<T> reference = finite_reference<T>(load_row(top, j, cols)), g = load_row(factor, j, cols);
    for (int64_t i = 0; i < rows; ++i) {
      T* row = products + i * stride;
      store_row(row, j, cols, g * exp_nonpositive<T>((load_row(row, j, cols) - reference) * inverse));
    }
  }
}

template <class T>
static MaxSimKernels<T> max_sim_kernel_table() {
  return {column_maxima<T>, row_maxima<T>, gather<T>, scatter<T>, column_sums<T>, column_weights<T>};
}
