// The sweeps over one tile of S: products -> masked logits -> statistics or gradients. Included after vector.inl.

#include "kernels/math.inl"
#include "kernels/tile_rows.inl"
#include "kernels/masked_logits.inl"
#include "kernels/shared_exp.inl"

// Sets the sums of a tile's related rows or columns to those of no pair.
template <class T>
static void clear(const TileSums<T>& sums, int64_t n) {
  for (int64_t j = 0; sums.sum && j < n; ++j) sums.sum[j] = 0;
  for (int64_t j = 0; sums.max && j < n; ++j) sums.max[j] = kNegInf<T>;
}

// The log-sum-exps of a tile's columns as they grow: first the maxima of some rows, then sums against them.
template <class T>
struct ColumnLogSums {
  alignas(64) T max[kTileCols], sum[kTileCols], next_max[kTileCols], reference[kTileCols];

  ColumnLogSums() {
    for (int64_t j = 0; j < kTileCols; ++j) max[j] = next_max[j] = reference[j] = kNegInf<T>, sum[j] = 0;
  }
  void see(Vec<T> s, int64_t j) { store(next_max + j, maximum<T>(load(next_max + j), s)); }
  // Rescales the sums where a maximum has grown.
  void rescale(int64_t cols) {
    for (int64_t j = 0; j < cols; j += kLanes<T>) {
      const Vec<T> next = load(next_max + j), ref = finite_reference<T>(next);
      store(sum + j, load(sum + j) * exp_nonpositive<T>(load(max + j) - ref));
      store(max + j, next);
      store(reference + j, ref);
    }
  }
  void add(Vec<T> e, int64_t j) { store(sum + j, load(sum + j) + e); }
  void write(const TileSums<T>& to, int64_t cols) const {
    __builtin_memcpy(to.max, max, cols * sizeof(T));
    __builtin_memcpy(to.sum, sum, cols * sizeof(T));
  }
};

// Which of the logits are related pairs', when these are reduced by themselves; one of both arrays holds -inf.
template <class T>
static inline IntVec<T> is_related(Vec<T> second) {
  return second != fill<T>(kNegInf<T>);
}

template <class T>
static T largest_of_row(const T* logits, int64_t cols) {
  Vec<T> most = fill<T>(kNegInf<T>);
  for (int64_t j = 0; j < cols; j += kLanes<T>) most = maximum<T>(most, load(logits + j));
  return largest<T>(most);
}

// Adds a row that has related pairs to the sums, with one exponential per logit and direction.
template <class T, bool kRow, bool kCol>
static void add_apart(const RowLogits<T>& logits, const ForwardTile<T>& tile, int64_t r, T row_max, T related_max,
                      ColumnLogSums<T>& col, ColumnLogSums<T>& related_col) {
  const T row_ref = finite_reference(row_max), related_ref = finite_reference(related_max);
  Vec<T> sum{}, related_sum{};
  const Vec<T> zero{};
  for (int64_t j = 0; j < tile.at.cols; j += kLanes<T>) {
    const Vec<T> second = load(logits.second + j);
    const IntVec<T> related = is_related<T>(second);
    const Vec<T> s = related ? second : load(logits.first + j);
    if (kRow) {
      const Vec<T> e = exp_nonpositive<T>(s - (related ? fill<T>(related_ref) : fill<T>(row_ref)));
      sum += related ? zero : e;
      related_sum += related ? e : zero;
    }
    if (kCol) {
      const Vec<T> e = exp_nonpositive<T>(s - (related ? load(related_col.reference + j) : load(col.reference + j)));
      col.add(related ? zero : e, j);
      related_col.add(related ? e : zero, j);
    }
  }
  if (!kRow) return;
  tile.row.max[r] = row_max, tile.row.sum[r] = total<T>(sum);
  tile.related_row.max[r] = related_max, tile.related_row.sum[r] = total<T>(related_sum);
}

// Takes kSweepRows rows at a time: first their logits and maxima, then the exponentials against those maxima.
template <class T, bool kRow, bool kCol, bool kApart>
static void forward_log_sum_exp(const LogitRule<T>& rule, const ForwardTile<T>& tile) {
  const TileBounds& at = tile.at;
  const TileColumns<T> columns(rule, at);
  clear(tile.related_row, at.rows);
  clear(tile.related_col, at.cols);
  if (forward_shared_exp<T, kRow, kCol>(rule, columns, tile)) return;
  if (rule.adds()) clear(tile.related_col, at.cols);
  RowLogits<T> logits[kSweepRows];
  ColumnLogSums<T> col, related_col;
  const bool limited = rule.is_limited();
  const auto of_col = [&](int64_t k) { return limited ? logits[k].second : logits[k].first; };

  for (int64_t first = 0; first < at.rows; first += kSweepRows) {
    const int64_t count = smaller(kSweepRows, at.rows - first);
    T row_max[kSweepRows], related_max[kSweepRows];
    bool any_related = false;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t i = at.row + first + k;
      masked_logits(rule, columns, at, i, tile.products + (first + k) * tile.stride, guide_row(tile, first + k),
                    logits[k], pos_of(tile, i));
      if (rule.adds() && logits[k].has_second) add_related(logits[k], tile, first + k);
      if (kRow) row_max[k] = largest_of_row(logits[k].first, at.cols);
      if (kCol)
        for (int64_t j = 0; j < at.cols; j += kLanes<T>) col.see(load(of_col(k) + j), j);
      if (!kApart || !logits[k].has_second) continue;
      any_related = true;
      if (kRow) related_max[k] = largest_of_row(logits[k].second, at.cols);
      if (kCol)
        for (int64_t j = 0; j < at.cols; j += kLanes<T>) related_col.see(load(logits[k].second + j), j);
    }
    if (kCol) col.rescale(at.cols);
    if (kCol && kApart && any_related) related_col.rescale(at.cols);
    for (int64_t k = 0; k < count; ++k) {
      if (kApart && logits[k].has_second) {
        add_apart<T, kRow, kCol>(logits[k], tile, first + k, row_max[k], related_max[k], col, related_col);
        continue;
      }
      const T row_ref = finite_reference(row_max[k]);
      const T* of_cols = of_col(k);
      Vec<T> sum{};
      for (int64_t j = 0; j < at.cols; j += kLanes<T>) {
        if (kRow) sum += exp_nonpositive<T>(load(logits[k].first + j) - row_ref);
        if (kCol) col.add(exp_nonpositive<T>(load(of_cols + j) - load(col.reference + j)), j);
      }
      if (kRow) tile.row.max[first + k] = row_max[k], tile.row.sum[first + k] = total<T>(sum);
    }
  }
  if (kCol) col.write(tile.col, at.cols);
  if (kCol && kApart) related_col.write(tile.related_col, at.cols);
}

// Normalisers of a tile's columns, padded; nothing if there are none.
template <class T>
struct TileNormalised {
  alignas(64) T value[kTileCols], low[kTileCols], g[kTileCols];

  TileNormalised(const Normalised<T>& of, const TileBounds& at) {
    if (!of.value) return;
    copy_padded(value, of.value + at.col, at.cols, T(0));
    copy_padded(low, of.low + at.col, at.cols, T(0));
    copy_padded(g, of.g + at.col, at.cols, T(0));
  }
  Vec<T> weights(Vec<T> s, int64_t j) const {
    return exp_nonpositive<T>((s - load(value + j)) - load(low + j)) * load(g + j);
  }
};

template <class T>
static inline Vec<T> row_weights(const Normalised<T>& row, int64_t i, Vec<T> s) {
  return exp_nonpositive<T>((s - row.value[i]) - row.low[i]) * row.g[i];
}

// The weights of logits by one normaliser, or by that of the related pairs where `related`.
template <class T>
static inline Vec<T> weights_apart(IntVec<T> related, Vec<T> s, const Normalised<T>& one, const Normalised<T>& other,
                                   int64_t i) {
  const auto pick = [&](const T* a, const T* b) { return related ? fill<T>(b[i]) : fill<T>(a[i]); };
  return exp_nonpositive<T>((s - pick(one.value, other.value)) - pick(one.low, other.low)) * pick(one.g, other.g);
}
template <class T>
static inline Vec<T> weights_apart(IntVec<T> related, Vec<T> s, const TileNormalised<T>& one,
                                   const TileNormalised<T>& other, int64_t j) {
  const auto pick = [&](const T* a, const T* b) { return related ? load(b + j) : load(a + j); };
  return exp_nonpositive<T>((s - pick(one.value, other.value)) - pick(one.low, other.low)) * pick(one.g, other.g);
}

template <class T, bool kRow, bool kCol, bool kApart>
static void backward_log_sum_exp(const LogitRule<T>& rule, const BackwardTile<T>& tile) {
  const TileBounds& at = tile.at;
  const TileColumns<T> columns(rule, at);
  if constexpr (kRow && kCol)
    if (backward_shared_exp(rule, columns, tile)) return;
  RowLogits<T> logits;
  const TileNormalised<T> col(tile.col, at), related_col(tile.related_col, at);
  for (int64_t r = 0; r < at.rows; ++r) {
    const int64_t i = at.row + r;
    fetch_row(tile, r + kFetchAhead);
    masked_logits<T>(rule, columns, at, i, tile.products + r * tile.stride, guide_row(tile, r), logits, nullptr);
    const T* of_col = rule.is_limited() ? logits.second : logits.first;
    T* grad = tile.grad + r * tile.grad_stride;
    if (kApart && logits.has_second) {
      for (int64_t j = 0; j < at.cols; j += kLanes<T>) {
        const Vec<T> second = load(logits.second + j);
        const IntVec<T> related = is_related<T>(second);
        const Vec<T> s = related ? second : load(logits.first + j);
        Vec<T> g{};
        if (kRow) g += weights_apart<T>(related, s, tile.row, tile.related_row, i);
        if (kCol) g += weights_apart<T>(related, s, col, related_col, j);
        store_row(grad, j, at.cols, g);
      }
      continue;
    }
    const T row = kRow ? tile.row.value[i] : T(0), row_low = kRow ? tile.row.low[i] : T(0);
    const T g_row = kRow ? tile.row.g[i] : T(0);
    for (int64_t j = 0; j < at.cols; j += kLanes<T>) {
      Vec<T> g{};
      if (kRow) g += exp_nonpositive<T>((load(logits.first + j) - row) - row_low) * g_row;
      if (kCol) g += col.weights(load(of_col + j), j);
      if (rule.adds() && logits.has_second) g += added_gradient(logits, tile, i, j);
      store_row(grad, j, at.cols, g);
    }
  }
}

template <class T>
static T sum_of_softplus(const T* logits, int64_t cols) {
  Vec<T> whole{};
  for (int64_t part = 0; part < cols; part += 8 * kLanes<T>) {  // short sums: no log will shrink their error
    Vec<T> sum{};
    for (int64_t j = part; j < smaller(part + 8 * kLanes<T>, cols); j += kLanes<T>)
      sum += softplus<T>(load(logits + j));
    whole += sum;
  }
  return total<T>(whole);
}

template <class T>
static void forward_softplus(const LogitRule<T>& rule, const ForwardTile<T>& tile) {
  const TileBounds& at = tile.at;
  const TileColumns<T> columns(rule, at);
  RowLogits<T> logits;
  for (int64_t r = 0; r < at.rows; ++r) {
    const int64_t i = at.row + r;
    masked_logits(rule, columns, at, i, tile.products + r * tile.stride, guide_row(tile, r), logits, pos_of(tile, i));
    tile.row.sum[r] = sum_of_softplus(logits.first, at.cols);
    if (tile.related_row.sum)
      tile.related_row.sum[r] = logits.has_second ? sum_of_softplus(logits.second, at.cols) : T(0);
  }
}

template <class T>
static void backward_softplus(const LogitRule<T>& rule, const BackwardTile<T>& tile) {
  const TileBounds& at = tile.at;
  const TileColumns<T> columns(rule, at);
  const bool negated = rule.row_ids && rule.equal_ids == EqualIds::kNegate;
  RowLogits<T> logits;
  for (int64_t r = 0; r < at.rows; ++r) {
    const int64_t i = at.row + r;
    fetch_row(tile, r + kFetchAhead);
    masked_logits<T>(rule, columns, at, i, tile.products + r * tile.stride, guide_row(tile, r), logits, nullptr);
    T* grad = tile.grad + r * tile.grad_stride;
    const RowIds<T> ids(rule, i);
    for (int64_t j = 0; j < at.cols; j += kLanes<T>) {
      Vec<T> g = sigmoid<T>(load(logits.first + j)) * tile.row.g[i];
      if (negated) g = ids.related(columns, j) ? -g : g;
      if (logits.has_second) g -= sigmoid<T>(load(logits.second + j)) * tile.related_row.g[i];
      store_row(grad, j, at.cols, g);
    }
  }
}

#include "kernels/prefixes.inl"
#include "kernels/ranks.inl"
#include "kernels/teacher.inl"

// Calls the sweep for the directions that are needed.
template <class T, bool kApart>
static void forward_apart(const LogitRule<T>& rule, const ForwardTile<T>& tile) {
  if (tile.row.max && tile.col.max) return forward_log_sum_exp<T, true, true, kApart>(rule, tile);
  if (tile.row.max) return forward_log_sum_exp<T, true, false, kApart>(rule, tile);
  return forward_log_sum_exp<T, false, true, kApart>(rule, tile);
}

template <class T>
static void forward(const LogitRule<T>& rule, const ForwardTile<T>& tile) {
  if (tile.row_ranks.sum || tile.col_ranks.sum) rank_tile(rule, tile);
  if (rule.softplus) return forward_softplus(rule, tile);
  if (rule.teacher) {
    if (tile.row.max && tile.col.max) return forward_teacher<T, true, true>(rule, tile);
    if (tile.row.max) return forward_teacher<T, true, false>(rule, tile);
    return forward_teacher<T, false, true>(rule, tile);
  }
  return rule.is_apart() ? forward_apart<T, true>(rule, tile) : forward_apart<T, false>(rule, tile);
}

template <class T, bool kApart>
static void backward_apart(const LogitRule<T>& rule, const BackwardTile<T>& tile) {
  if (tile.row.value && tile.col.value) return backward_log_sum_exp<T, true, true, kApart>(rule, tile);
  if (tile.row.value) return backward_log_sum_exp<T, true, false, kApart>(rule, tile);
  return backward_log_sum_exp<T, false, true, kApart>(rule, tile);
}

template <class T>
static void backward(const LogitRule<T>& rule, const BackwardTile<T>& tile) {
  if (rule.softplus) return backward_softplus(rule, tile);
  if (rule.teacher) {
    if (tile.row.value && tile.col.value) return backward_teacher<T, true, true>(rule, tile);
    if (tile.row.value) return backward_teacher<T, true, false>(rule, tile);
    return backward_teacher<T, false, true>(rule, tile);
  }
  return rule.is_apart() ? backward_apart<T, true>(rule, tile) : backward_apart<T, false>(rule, tile);
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
  return {forward<T>, backward<T>, scale<T>, weigh<T>, merge<T>, add_scale_dot<T>};
}
