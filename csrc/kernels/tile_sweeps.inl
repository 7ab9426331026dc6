// The sweeps over one tile of S: products into logits, logits into statistics or gradients. Included after vector.inl.

// Copies n values and pads the rest of a strip, so that loops over a strip need no tail.
template <class To, class From>
static inline void copy_padded(To* strip, const From* values, int64_t n, To pad) {
  for (int64_t j = 0; j < n; ++j) strip[j] = To(values[j]);
  for (int64_t j = n; j < kTileCols; ++j) strip[j] = pad;
}

// The columns' part of a LogitRule for one tile.
template <class T>
struct StripRule {
  alignas(64) T bias[kTileCols];
  alignas(64) typename Lanes<T>::Int ids[kTileCols];

  StripRule(const LogitRule<T>& rule, const Place& at) {
    if (rule.col_bias) copy_padded(bias, rule.col_bias + at.col, at.cols, T(0));
    if (rule.col_ids) copy_padded(ids, rule.col_ids + at.col, at.cols, typename Lanes<T>::Int(-1));
  }
  IntVec<T> load_ids(int64_t j) const {
    IntVec<T> v;
    __builtin_memcpy(&v, ids + j, sizeof v);
    return v;
  }
};

// The vector of row[j] and what follows, -inf beyond `n`: rows of products end without padding.
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

// One row of a tile: raw products -> masked logits in `out`, -inf up to a whole vector beyond the tile. Returns the
// positive's logit through `pos` if this tile holds it. Never inlined: forward and backward must round alike, and a
// compiler may contract scale * product + bias in one place and not in the other (at scale 1000: 6e-5 of a logit).
template <class T>
__attribute__((noinline)) static void mask_row(const LogitRule<T>& rule, const StripRule<T>& strip, const Place& at,
                                               int64_t i, const T* products, T* out, T* pos) {
  for (int64_t j = 0; j < at.cols; j += kLanes<T>) {
    Vec<T> s = load_row(products, j, at.cols) * rule.scale;
    if (rule.col_bias) s += load(strip.bias + j);
    store(out + j, s);
  }
  const int64_t target = rule.target(i) - at.col;
  const bool holds_target = target >= 0 && target < at.cols;
  if (holds_target && pos) *pos = out[target] == -kNegInf<T> ? T(__builtin_nan("")) : out[target];
  if (rule.row_ids) {
    const typename Lanes<T>::Int id = rule.row_ids[i];
    for (int64_t j = 0; j < at.cols; j += kLanes<T>) {
      const IntVec<T> equal = strip.load_ids(j) == id;
      const Vec<T> s = load(out + j), excluded = fill<T>(kNegInf<T>);
      if (rule.equal_ids == EqualIds::kExclude) store(out + j, equal ? excluded : s);
      if (rule.equal_ids == EqualIds::kOnly) store(out + j, equal ? s : excluded);
      if (rule.equal_ids == EqualIds::kNegate) store(out + j, equal ? -s : s);
    }
  }
  if (holds_target) out[target] = kNegInf<T>;
  const int64_t self = i - at.col;
  if (rule.exclude_self && self >= 0 && self < at.cols) out[self] = kNegInf<T>;
  if (rule.upper)
    for (int64_t j = 0; j < smaller(self + 1, at.cols); ++j) out[j] = kNegInf<T>;
  for (int64_t j = at.cols; j % kLanes<T> != 0; ++j) out[j] = kNegInf<T>;  // the scale may be negative or 0
}

// Row r of a tile as it is read, and as it is written, into the first cache: rows are further apart than a page, and
// the hardware fetches ahead within one.
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
constexpr int64_t kAhead = 2;  // rows

#include "kernels/shared_exp.inl"

template <class T, bool kRow, bool kCol>
static void forward_tile(const LogitRule<T>& rule, const ForwardTile<T>& tile) {
  const Place& at = tile.at;
  const StripRule<T> strip(rule, at);
  if (forward_near<T, kRow, kCol>(rule, strip, tile)) return;
  alignas(64) T logits[kGroupRows][kTileCols];
  alignas(64) T col_max[kTileCols], col_sum[kTileCols], next_max[kTileCols], reference[kTileCols];
  for (int64_t j = 0; j < kTileCols; ++j) col_max[j] = next_max[j] = kNegInf<T>, col_sum[j] = 0;

  for (int64_t first = 0; first < at.rows; first += kGroupRows) {
    const int64_t group = smaller(kGroupRows, at.rows - first);
    T row_max[kGroupRows];
    for (int64_t g = 0; g < group; ++g) {
      const int64_t i = at.row + first + g;
      mask_row(rule, strip, at, i, tile.products + (first + g) * tile.stride, logits[g], tile.pos + i);
      Vec<T> most = fill<T>(kNegInf<T>);
      for (int64_t j = 0; j < at.cols; j += kLanes<T>) {
        const Vec<T> s = load(logits[g] + j);
        if (kRow) most = maximum<T>(most, s);
        if (kCol) store(next_max + j, maximum<T>(load(next_max + j), s));
      }
      row_max[g] = largest<T>(most);
    }
    if (kCol) {
      for (int64_t j = 0; j < at.cols; j += kLanes<T>) {
        const Vec<T> next = load(next_max + j), ref = finite_reference<T>(next);
        store(col_sum + j, load(col_sum + j) * exp_nonpositive<T>(load(col_max + j) - ref));
        store(col_max + j, next);
        store(reference + j, ref);
      }
    }
    for (int64_t g = 0; g < group; ++g) {
      const T row_ref = finite_reference(row_max[g]);
      Vec<T> sum{};
      for (int64_t j = 0; j < at.cols; j += kLanes<T>) {
        const Vec<T> s = load(logits[g] + j);
        if (kRow) sum += exp_nonpositive<T>(s - row_ref);
        if (kCol) store(col_sum + j, load(col_sum + j) + exp_nonpositive<T>(s - load(reference + j)));
      }
      if (kRow) {
        tile.row_max[first + g] = row_max[g];
        tile.row_sum[first + g] = total<T>(sum);
      }
    }
  }
  if (kCol) {
    __builtin_memcpy(tile.col_max, col_max, at.cols * sizeof(T));
    __builtin_memcpy(tile.col_sum, col_sum, at.cols * sizeof(T));
  }
}

template <class T, bool kRow, bool kCol>
static void backward_tile(const LogitRule<T>& rule, const BackwardTile<T>& tile) {
  const Place& at = tile.at;
  const StripRule<T> strip(rule, at);
  if constexpr (kRow && kCol)
    if (backward_near(rule, strip, tile)) return;
  alignas(64) T logits[kTileCols], col[kTileCols], col_low[kTileCols], g_col[kTileCols];
  if (kCol) {
    copy_padded(col, tile.col + at.col, at.cols, T(0));
    copy_padded(col_low, tile.col_low + at.col, at.cols, T(0));
    copy_padded(g_col, tile.g_col + at.col, at.cols, T(0));
  }
  for (int64_t r = 0; r < at.rows; ++r) {
    const int64_t i = at.row + r;
    fetch_row(tile, r + kAhead);
    mask_row<T>(rule, strip, at, i, tile.products + r * tile.stride, logits, nullptr);
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
  const Place& at = tile.at;
  const StripRule<T> strip(rule, at);
  alignas(64) T logits[kTileCols];
  for (int64_t r = 0; r < at.rows; ++r) {
    const int64_t i = at.row + r;
    mask_row(rule, strip, at, i, tile.products + r * tile.stride, logits, tile.pos + i);
    Vec<T> whole{};
    for (int64_t block = 0; block < at.cols; block += 8 * kLanes<T>) {  // no log follows to shrink the sum's error
      Vec<T> sum{};
      for (int64_t j = block; j < smaller(block + 8 * kLanes<T>, at.cols); j += kLanes<T>) {
        const Vec<T> s = load(logits + j);
        sum += (s > T(0) ? s : Vec<T>{}) + log1p_unit<T>(exp_minus_abs<T>(s));
      }
      whole += sum;
    }
    tile.row_sum[r] = total<T>(whole);
  }
}

template <class T>
static void backward_softplus(const LogitRule<T>& rule, const BackwardTile<T>& tile) {
  const Place& at = tile.at;
  const StripRule<T> strip(rule, at);
  const bool signs = rule.row_ids && rule.equal_ids == EqualIds::kNegate;
  alignas(64) T logits[kTileCols];
  for (int64_t r = 0; r < at.rows; ++r) {
    const int64_t i = at.row + r;
    fetch_row(tile, r + kAhead);
    mask_row<T>(rule, strip, at, i, tile.products + r * tile.stride, logits, nullptr);
    const typename Lanes<T>::Int id = signs ? rule.row_ids[i] : 0;
    for (int64_t j = 0; j < at.cols; j += kLanes<T>) {
      const Vec<T> s = load(logits + j), u = exp_minus_abs<T>(s);
      const Vec<T> g = (s > T(0) ? fill<T>(1) : u) / (u + T(1)) * tile.g_row[i];
      store_row(tile.grad + r * tile.grad_stride, j, at.cols, signs ? (strip.load_ids(j) == id ? -g : g) : g);
    }
  }
}

template <class T>
static void forward(const LogitRule<T>& rule, const ForwardTile<T>& tile) {
  if (rule.softplus) return forward_softplus(rule, tile);
  if (tile.row_max && tile.col_max) return forward_tile<T, true, true>(rule, tile);
  if (tile.row_max) return forward_tile<T, true, false>(rule, tile);
  return forward_tile<T, false, true>(rule, tile);
}

template <class T>
static void backward(const LogitRule<T>& rule, const BackwardTile<T>& tile) {
  if (rule.softplus) return backward_softplus(rule, tile);
  if (tile.row && tile.col) return backward_tile<T, true, true>(rule, tile);
  if (tile.row) return backward_tile<T, true, false>(rule, tile);
  return backward_tile<T, false, true>(rule, tile);
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
static double finish_row(T* grad, const T* features, const T* other, T g, T scale, int64_t d) {
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
static Kernels<T> table() {
  return {forward<T>, backward<T>, merge<T>, finish_row<T>};
}
