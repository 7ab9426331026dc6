// The sweeps over one tile of S: products -> masked logits -> statistics or gradients. Included after vector.inl.

#include "kernels/math.inl"
#include "kernels/tile_rows.inl"
#include "kernels/masked_logits.inl"
#include "kernels/shared_exp.inl"

// Takes kSweepRows rows at a time: first their logits and maxima, then the exponentials against those maxima. A
// column's sum is rescaled where its maximum has grown.
template <class T, bool kRow, bool kCol>
static void forward_log_sum_exp(const LogitRule<T>& rule, const ForwardTile<T>& tile) {
  const TileBounds& at = tile.at;
  const TileColumns<T> columns(rule, at);
  if (forward_shared_exp<T, kRow, kCol>(rule, columns, tile)) return;
  alignas(64) T logits[kSweepRows][kTileCols];
  alignas(64) T col_max[kTileCols], col_sum[kTileCols], next_max[kTileCols], reference[kTileCols];
  for (int64_t j = 0; j < kTileCols; ++j) col_max[j] = next_max[j] = kNegInf<T>, col_sum[j] = 0;

  for (int64_t first = 0; first < at.rows; first += kSweepRows) {
    const int64_t count = smaller(kSweepRows, at.rows - first);
    T row_max[kSweepRows];
    for (int64_t k = 0; k < count; ++k) {
      const int64_t i = at.row + first + k;
      masked_logits(rule, columns, at, i, tile.products + (first + k) * tile.stride, logits[k], tile.pos + i);
      Vec<T> most = fill<T>(kNegInf<T>);
      for (int64_t j = 0; j < at.cols; j += kLanes<T>) {
        const Vec<T> s = load(logits[k] + j);
        if (kRow) most = maximum<T>(most, s);
        if (kCol) store(next_max + j, maximum<T>(load(next_max + j), s));
      }
      row_max[k] = largest<T>(most);
    }
    if (kCol) {
      for (int64_t j = 0; j < at.cols; j += kLanes<T>) {
        const Vec<T> next = load(next_max + j), ref = finite_reference<T>(next);
        store(col_sum + j, load(col_sum + j) * exp_nonpositive<T>(load(col_max + j) - ref));
        store(col_max + j, next);
        store(reference + j, ref);
      }
    }
    for (int64_t k = 0; k < count; ++k) {
      const T row_ref = finite_reference(row_max[k]);
      Vec<T> sum{};
      for (int64_t j = 0; j < at.cols; j += kLanes<T>) {
        const Vec<T> s = load(logits[k] + j);
        if (kRow) sum += exp_nonpositive<T>(s - row_ref);
        if (kCol) store(col_sum + j, load(col_sum + j) + exp_nonpositive<T>(s - load(reference + j)));
      }
      if (kRow) {
        tile.row_max[first + k] = row_max[k];
        tile.row_sum[first + k] = total<T>(sum);
      }
    }
  }
  if (kCol) {
    __builtin_memcpy(tile.col_max, col_max, at.cols * sizeof(T));
    __builtin_memcpy(tile.col_sum, col_sum, at.cols * sizeof(T));
  }
}

template <class T, bool kRow, bool kCol>
static void backward_log_sum_exp(const LogitRule<T>& rule, const BackwardTile<T>& tile) {
  const TileBounds& at = tile.at;
  const TileColumns<T> columns(rule, at);
  if constexpr (kRow && kCol)
    if (backward_shared_exp(rule, columns, tile)) return;
  alignas(64) T logits[kTileCols], col[kTileCols], col_low[kTileCols], g_col[kTileCols];
  if (kCol) {
    copy_padded(col, tile.col + at.col, at.cols, T(0));
    copy_padded(col_low, tile.col_low + at.col, at.cols, T(0));
    copy_padded(g_col, tile.g_col + at.col, at.cols, T(0));
  }
  for (int64_t r = 0; r < at.rows; ++r) {
    const int64_t i = at.row + r;
    fetch_row(tile, r + kFetchAhead);
    masked_logits<T>(rule, columns, at, i, tile.products + r * tile.stride, logits, nullptr);
    T* grad = tile.grad + r * tile.grad_stride;
    const T row = kRow ? tile.row[i] : T(0), row_low = kRow ? tile.row_low[i] : T(0);
    const T g_row = kRow ? tile.g_row[i] : T(0);
    for (int64_t j = 0; j < at.cols; j += kLanes<T>) {
      const Vec<T> s = load(logits + j);
      Vec<T> g{};
      if (kRow) g += exp_nonpositive<T>((s - row) - row_low) * g_row;
      if (kCol) g += exp_nonpositive<T>((s - load(col + j)) - load(col_low + j)) * load(g_col + j);
      store_row(grad, j, at.cols, g);
    }
  }
}

template <class T>
static void forward_softplus(const LogitRule<T>& rule, const ForwardTile<T>& tile) {
  const TileBounds& at = tile.at;
  const TileColumns<T> columns(rule, at);
  alignas(64) T logits[kTileCols];
  for (int64_t r = 0; r < at.rows; ++r) {
    const int64_t i = at.row + r;
    masked_logits(rule, columns, at, i, tile.products + r * tile.stride, logits, tile.pos + i);
    Vec<T> whole{};
    for (int64_t part = 0; part < at.cols; part += 8 * kLanes<T>) {  // short sums: no log will shrink their error
      Vec<T> sum{};
      for (int64_t j = part; j < smaller(part + 8 * kLanes<T>, at.cols); j += kLanes<T>)
        sum += softplus<T>(load(logits + j));
      whole += sum;
    }
    tile.row_sum[r] = total<T>(whole);
  }
}

template <class T>
static void backward_softplus(const LogitRule<T>& rule, const BackwardTile<T>& tile) {
  const TileBounds& at = tile.at;
  const TileColumns<T> columns(rule, at);
  const bool negated = rule.row_ids && rule.equal_ids == EqualIds::kNegate;
  alignas(64) T logits[kTileCols];
  for (int64_t r = 0; r < at.rows; ++r) {
    const int64_t i = at.row + r;
    fetch_row(tile, r + kFetchAhead);
    masked_logits<T>(rule, columns, at, i, tile.products + r * tile.stride, logits, nullptr);
    const typename Lanes<T>::Int id = negated ? rule.row_ids[i] : 0;
    for (int64_t j = 0; j < at.cols; j += kLanes<T>) {
      const Vec<T> g = sigmoid<T>(load(logits + j)) * tile.g_row[i];
      store_row(tile.grad + r * tile.grad_stride, j, at.cols, negated ? (columns.load_ids(j) == id ? -g : g) : g);
    }
  }
}

template <class T>
static void forward(const LogitRule<T>& rule, const ForwardTile<T>& tile) {
  if (rule.softplus) return forward_softplus(rule, tile);
  if (tile.row_max && tile.col_max) return forward_log_sum_exp<T, true, true>(rule, tile);
  if (tile.row_max) return forward_log_sum_exp<T, true, false>(rule, tile);
  return forward_log_sum_exp<T, false, true>(rule, tile);
}

template <class T>
static void backward(const LogitRule<T>& rule, const BackwardTile<T>& tile) {
  if (rule.softplus) return backward_softplus(rule, tile);
  if (tile.row && tile.col) return backward_log_sum_exp<T, true, true>(rule, tile);
  if (tile.row) return backward_log_sum_exp<T, true, false>(rule, tile);
  return backward_log_sum_exp<T, false, true>(rule, tile);
}

template <class T>
static void merge(T* max, T* sum, const T* max2, const T* sum2, int64_t n) {
  for (int64_t j = 0; j < n; j += kTileCols) {
    const int64_t count = smaller(kTileCols, n - j);
    alignas(64) T m[kTileCols], s[kTileCols], m2[kTileCols], s2[kTileCols];
    copy_padded(m, max + j, count, kNegInf<T>);
    copy_padded(s, sum + j, count, T(0));
    copy_padded(m2, max2 + j, count, kNegInf<T>);
    copy_padded(s2, sum2 + j, count, T(0));
    for (int64_t k = 0; k < count; k += kLanes<T>) {
      const Vec<T> most = maximum<T>(load(m + k), load(m2 + k)), ref = finite_reference<T>(most);
      store(s + k, load(s + k) * exp_nonpositive<T>(load(m + k) - ref) +
                       load(s2 + k) * exp_nonpositive<T>(load(m2 + k) - ref));
      store(m + k, most);
    }
    __builtin_memcpy(max + j, m, count * sizeof(T));
    __builtin_memcpy(sum + j, s, count * sizeof(T));
  }
}

template <class T>
static double add_scale_dot(T* grad, const T* features, const T* other, T g, T scale, int64_t d) {
  const int64_t whole = d - d % kLanes<T>;
  Vec<T> dot{};
  for (int64_t j = 0; j < whole; j += kLanes<T>) {
    Vec<T> total = load(grad + j);
    if (other) total += load(other + j) * g;
    dot += load(features + j) * total;
    store(grad + j, total * scale);
  }
  double sum = 0;
  for (int64_t j = whole; j < d; ++j) {
    const T total = other ? grad[j] + other[j] * g : grad[j];
    sum += features[j] * total;
    grad[j] = total * scale;
  }
  for (int l = 0; l < kLanes<T>; ++l) sum += dot[l];
  return sum;
}

template <class T>
static TileKernels<T> tile_kernel_table() {
  return {forward<T>, backward<T>, merge<T>, add_scale_dot<T>};
}
