// Sweeps with one exponential per logit in place of two, for tiles whose rows and columns have log-sum-exps near each
// other: exp(s) / 2^n, with one n for the tile, serves both directions. Dividing by a power of 2 rounds nothing.
// docs/cpu-kernels.md says when it holds; where it does not, the sweeps below return false and the general ones run.

// 2^n near exp(x), for |x| < kMaxReference.
template <class T>
struct PowerOfTwo {
  int n;
  T log, rest;        // 2^n = exp(log) * rest, where log is n ln 2 rounded to T
  T lowest, highest;  // exp(lowest) / 2^n is still a normal number; exp(highest) / 2^n is about 2^100

  explicit PowerOfTwo(T x) : n(int(x * T(1.44269504088896340736))) {
    constexpr double kLn2 = 0.69314718055994530942;
    log = T(n * kLn2);
    const double left = n * kLn2 - log;
    rest = T(1 + left + left * left / 2);
    lowest = ExpConstants<T>::kLowest + log;
    highest = T((n + 100) * kLn2);
  }
  // exp(x) / 2^n
  Vec<T> exp_over(Vec<T> x) const { return exp_shifted<T>(x, Vec<T>{}, -n, lowest); }
};

// Whether a sum divided by 2^n has lost nothing that matters: a term below T's smallest number is then negligible
// beside it, and beside the sums of other tiles that it is merged with.
template <class T>
static inline bool is_in_range(T sum) {
  constexpr T kRange = T(int64_t(1) << 30);
  return sum >= 1 / kRange && sum <= kRange;
}

// How many pairs of a tile are related.
template <class T>
static int64_t count_related(const LogitRule<T>& rule, const TileColumns<T>& columns, const TileBounds& at) {
  int64_t count = 0;
  for (int64_t i = at.row; i < at.row + at.rows; ++i) {
    const RowIds<T> row(rule, i);
    IntVec<T> related{};  // minus the number in each lane
    for (int64_t j = 0; j < at.cols; j += kLanes<T>) related += row.related(columns, j);
    for (int l = 0; l < kLanes<T>; ++l) count -= related[l];
  }
  return count;
}

// Whether every row and column of the tile has many pairs that are not excluded. Among few, a single term may be the
// whole sum, and then its exponential would have to be exact.
template <class T>
static inline bool leaves_many(const TileBounds& at, int64_t excluded) {
  constexpr int64_t kFew = 16;
  return at.rows >= kFew && at.cols >= kFew && excluded <= smaller(at.rows, at.cols) / 2;
}

// Whether the forward of this file can take the tile. Removes the ids from `rule` if no pair of the tile is related.
template <class T>
static inline bool is_known(LogitRule<T>& rule, const TileColumns<T>& columns, const TileBounds& at) {
  if (rule.col_bias || rule.upper) return false;
  if (!rule.row_ids || rule.adds()) return leaves_many<T>(at, 0);
  if (rule.equal_ids == EqualIds::kOnly) return false;
  const int64_t related = count_related(rule, columns, at);
  if (related == 0) rule.row_ids = nullptr;
  return leaves_many<T>(at, related) && !rule.is_apart();
}

// Adds up the logits of a row's related pairs: sets the row's sum, and adds each logit to its column's sum.
template <class T>
static void add_related(const RowLogits<T>& logits, const ForwardTile<T>& tile, int64_t r) {
  Vec<T> sum{};
  for (int64_t j = 0; j < tile.at.cols; j += kLanes<T>) {
    const Vec<T> s = load(logits.second + j) != Vec<T>{} ? load(logits.first + j) : Vec<T>{};
    sum += s;
    if (!tile.related_col.sum) continue;
    for (int64_t l = 0; l < smaller(kLanes<T>, tile.at.cols - j); ++l) tile.related_col.sum[j + l] += s[l];
  }
  if (tile.related_row.sum) tile.related_row.sum[r] = total<T>(sum);
}

// The gradients that arrive at the sums of related logits, for the related pairs among a row's columns from j on.
template <class T>
static inline Vec<T> added_gradient(const RowLogits<T>& logits, const BackwardTile<T>& tile, int64_t i, int64_t j) {
  Vec<T> g = fill<T>(tile.related_row.g ? tile.related_row.g[i] : T(0));
  if (tile.related_col.g) g += load_row(tile.related_col.g + tile.at.col, j, tile.at.cols);
  return load(logits.second + j) != Vec<T>{} ? g : Vec<T>{};
}

// Returns false if it cannot take the tile or a sum is out of range, as NaN and inf always are. What it has written
// must then be overwritten.
template <class T, bool kRow, bool kCol>
static bool forward_shared_exp(const LogitRule<T>& whole_rule, const TileColumns<T>& columns,
                               const ForwardTile<T>& tile) {
  const TileBounds& at = tile.at;
  LogitRule<T> rule = whole_rule;
  if (!is_known(rule, columns, at)) return false;
  const bool limited = rule.is_limited();
  int64_t left_out = 0;  // by limits, and positives
  RowLogits<T> masked;
  const T* logits = masked.first;
  alignas(64) T col_sum[kTileCols] = {}, some[kTileCols];
  PowerOfTwo<T> power(0);  // near exp of the first row's maximum
  for (int64_t first = 0; first < at.rows; first += kSweepRows) {
    for (int64_t j = 0; j < kTileCols; ++j) some[j] = 0;  // short sums: equal terms would all round one way
    for (int64_t r = first; r < smaller(first + kSweepRows, at.rows); ++r) {
      masked_logits(rule, columns, at, at.row + r, tile.products + r * tile.stride, guide_row(tile, r), masked,
                    pos_of(tile, at.row + r));
      if (rule.adds() && masked.has_second) add_related(masked, tile, r);
      if (r == 0) {
        Vec<T> most = fill<T>(kNegInf<T>);
        for (int64_t j = 0; j < at.cols; j += kLanes<T>) most = maximum<T>(most, load(logits + j));
        const T reference = largest<T>(most);
        if (!(reference > -kMaxReference<T> && reference < kMaxReference<T>)) return false;
        power = PowerOfTwo<T>(reference);
      }
      Vec<T> sum{};
      IntVec<T> limits{};
      for (int64_t j = 0; j < at.cols; j += kLanes<T>) {
        const Vec<T> first = load(logits + j), second = limited ? load(masked.second + j) : first;
        const Vec<T> s = maximum<T>(first, second), zero{};
        const Vec<T> e = power.exp_over(s < power.highest ? s : fill<T>(power.highest));
        if (!limited) {
          if (kRow) sum += e;
          if (kCol) store(some + j, load(some + j) + e);
          continue;
        }
        const IntVec<T> of_row = is_excluded<T>(first), of_col = is_excluded<T>(second);
        limits += of_row | of_col;
        if (kRow) sum += of_row ? zero : e;
        if (kCol) store(some + j, load(some + j) + (of_col ? zero : e));
      }
      for (int l = 0; l < kLanes<T> && limited; ++l) left_out -= limits[l];
      if (kRow) {
        const T row_sum = total<T>(sum);
        if (!is_in_range(row_sum)) return false;
        tile.row.max[r] = power.log;
        tile.row.sum[r] = row_sum * power.rest;
      }
    }
    for (int64_t j = 0; kCol && j < at.cols; j += kLanes<T>) store(col_sum + j, load(col_sum + j) + load(some + j));
  }
  if (limited && !leaves_many<T>(at, left_out)) return false;
  for (int64_t j = 0; kCol && j < at.cols; ++j) {
    if (!is_in_range(col_sum[j])) return false;
    tile.col.max[j] = power.log;
    tile.col.sum[j] = col_sum[j] * power.rest;
  }
  return true;
}

// Writes the factors g 2^n exp(-norm - low) of n rows or columns to `out`. Returns false if one is too small or too
// large to multiply with.
template <class T>
static bool factors_over(const PowerOfTwo<T>& power, const T* norm, const T* low, const T* g, int64_t n, T* out) {
  constexpr T kLeast = T(1e-25), kMost = T(1e25);
  bool fits = true;
  for (int64_t j = 0; j < n; j += kLanes<T>) {
    const int64_t count = smaller(kLanes<T>, n - j);
    alignas(64) T at[3][kLanes<T>] = {};
    for (int64_t l = 0; l < count; ++l) at[0][l] = -norm[j + l], at[1][l] = low[j + l], at[2][l] = g[j + l];
    const Vec<T> factor = exp_shifted<T>(load(at[0]), load(at[1]), power.n, -kMaxReference<T>) * load(at[2]);
    for (int64_t l = 0; l < count; ++l) {
      const T size = factor[l] < 0 ? -factor[l] : factor[l];
      fits &= (size >= kLeast && size <= kMost) || at[2][l] == 0;
      out[j + l] = factor[l];
    }
  }
  return fits;
}

// Writes g_row exp(s - row) + g_col exp(s - col) as exp(s) / 2^n times the sum of both factors. Returns false, with
// nothing written, if related pairs have normalisers of their own, if the normalisers are too far apart, or if a factor
// does not fit.
template <class T>
static bool backward_shared_exp(const LogitRule<T>& whole_rule, const TileColumns<T>& columns,
                                const BackwardTile<T>& tile) {
  constexpr T kApart = T(40);
  const TileBounds& at = tile.at;
  LogitRule<T> rule = whole_rule;
  if (rule.is_apart() && count_related(rule, columns, at) == 0) rule.row_ids = nullptr;
  if (rule.is_apart()) return false;
  const bool limited = rule.is_limited();
  const Vec<T> none{};
  T least = tile.row.value[at.row], most = least;
  const auto widen = [&](const T* norm, int64_t n) {
    bool numbers = true;
    for (int64_t i = 0; i < n; ++i) {
      numbers &= norm[i] > -kMaxReference<T> && norm[i] < kMaxReference<T>;
      least = norm[i] < least ? norm[i] : least;
      most = norm[i] > most ? norm[i] : most;
    }
    return numbers;
  };
  const auto [row, row_low, g_row] = tile.row;
  const auto [col, col_low, g_col] = tile.col;
  if (!widen(row + at.row, at.rows) || !widen(col + at.col, at.cols) || !(most - least <= kApart)) return false;
  const PowerOfTwo<T> power(least + (most - least) / 2);
  RowLogits<T> masked;
  const T* logits = masked.first;
  alignas(64) T row_factor[kTileRows], col_factor[kTileCols] = {};
  if (!factors_over(power, row + at.row, row_low + at.row, g_row + at.row, at.rows, row_factor) ||
      !factors_over(power, col + at.col, col_low + at.col, g_col + at.col, at.cols, col_factor))
    return false;
  for (int64_t r = 0; r < at.rows; ++r) {
    fetch_row(tile, r + kFetchAhead);
    masked_logits<T>(rule, columns, at, at.row + r, tile.products + r * tile.stride, guide_row(tile, r), masked,
                     nullptr);
    for (int64_t j = 0; j < at.cols; j += kLanes<T>) {
      const Vec<T> first = load(logits + j);
      Vec<T> g = power.exp_over(first) * (load(col_factor + j) + row_factor[r]);
      if (limited) {
        const Vec<T> second = load(masked.second + j), by_row = fill<T>(row_factor[r]), by_col = load(col_factor + j);
        g = power.exp_over(maximum<T>(first, second)) *
            ((is_excluded<T>(second) ? none : by_col) + (is_excluded<T>(first) ? none : by_row));
      } else if (masked.has_second) {
        g += added_gradient(masked, tile, at.row + r, j);
      }
      store_row(tile.grad + r * tile.grad_stride, j, at.cols, g);
    }
  }
  return true;
}
