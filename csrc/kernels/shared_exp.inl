// Sweeps for tiles whose log-sum-exps are all near each other; included by tile.inl, whose sweeps are for any tile.
//
// One exponential then serves both directions. In the forward exp(s) / 2^n, with one n for the tile, is summed along
// rows and along columns, in the place of exp(s - row's maximum) and exp(s - column's). In the backward
//   g_row exp(s - row) + g_col exp(s - col) = exp(s) / 2^n (g_row 2^n exp(-row) + g_col 2^n exp(-col)).
// Dividing by a power of 2 rounds nothing, and exp_shifted is as accurate far from 2^n as near it: what must not happen
// is that a term falls out of T's range and is more than nothing to its row or its column. And that one term is all
// that there is: its log-sum-exp is to be exact, and a logit of 0.01 allows no error of its exponential's.

// 2^n near exp(x), |x| < kExact.
template <class T>
struct Power {
  int n;
  T log, rest;        // 2^n = exp(log) * rest, with a logarithm that T holds
  T lowest, highest;  // exp(lowest) / 2^n is a normal number still; exp(highest) / 2^n, some 2^100, near nothing

  explicit Power(T x) : n(int(x * T(1.44269504088896340736))) {
    constexpr double kLn2 = 0.69314718055994530942;
    log = T(n * kLn2);
    const double left = n * kLn2 - log;
    rest = T(1 + left + left * left / 2);
    lowest = Lanes<T>::kLowest + log;
    highest = T((n + 100) * kLn2);
  }
  Vec<T> exp_over(Vec<T> x) const { return exp_shifted<T>(x, Vec<T>{}, -n, lowest); }
};

// How near: sums over 2^n within kNear of 1. Then what falls below T's smallest number is nothing to any of them, nor
// in `merge` to those of other tiles.
template <class T>
constexpr T kNear = T(int64_t(1) << 30);
template <class T>
static inline bool is_near(T sum) {
  return sum >= 1 / kNear<T> && sum <= kNear<T>;
}

// Whether every row and column of the tile has more pairs than a few.
template <class T>
static inline bool is_plain(const LogitRule<T>& rule, const Place& at) {
  constexpr int64_t kFew = 16;
  return at.rows >= kFew && at.cols >= kFew && !rule.row_ids && !rule.col_bias && !rule.upper;
}

// Returns false, having written partials that do not count, where they are not near: NaN and inf never are.
template <class T, bool kRow, bool kCol>
static bool forward_near(const LogitRule<T>& rule, const StripRule<T>& strip, const ForwardTile<T>& tile) {
  const Place& at = tile.at;
  if (!is_plain(rule, at)) return false;
  alignas(64) T logits[kTileCols], col_sum[kTileCols] = {}, of_group[kTileCols];
  Power<T> power(0);  // near exp of the first row's maximum
  for (int64_t first = 0; first < at.rows; first += kGroupRows) {
    for (int64_t j = 0; j < kTileCols; ++j) of_group[j] = 0;  // the sums of equal terms round alike: few at a time
    for (int64_t r = first; r < smaller(first + kGroupRows, at.rows); ++r) {
      mask_row(rule, strip, at, at.row + r, tile.products + r * tile.stride, logits, tile.pos + at.row + r);
      if (r == 0) {
        Vec<T> most = fill<T>(kNegInf<T>);
        for (int64_t j = 0; j < at.cols; j += kLanes<T>) most = maximum<T>(most, load(logits + j));
        const T reference = largest<T>(most);
        if (!(reference > -Lanes<T>::kExact && reference < Lanes<T>::kExact)) return false;
        power = Power<T>(reference);
      }
      Vec<T> sum{};
      for (int64_t j = 0; j < at.cols; j += kLanes<T>) {
        const Vec<T> s = load(logits + j), e = power.exp_over(s < power.highest ? s : fill<T>(power.highest));
        if (kRow) sum += e;
        if (kCol) store(of_group + j, load(of_group + j) + e);
      }
      if (kRow) {
        const T of_row = total<T>(sum);
        if (!is_near(of_row)) return false;
        tile.row_max[r] = power.log;
        tile.row_sum[r] = of_row * power.rest;
      }
    }
    for (int64_t j = 0; kCol && j < at.cols; j += kLanes<T>) store(col_sum + j, load(col_sum + j) + load(of_group + j));
  }
  for (int64_t j = 0; kCol && j < at.cols; ++j) {
    if (!is_near(col_sum[j])) return false;
    tile.col_max[j] = power.log;
    tile.col_sum[j] = col_sum[j] * power.rest;
  }
  return true;
}

// Factors g exp(2^n's logarithm - norm - low) for n values that all are near each other; false if one cannot be held.
template <class T>
static bool factors_over(const Power<T>& power, const T* norm, const T* low, const T* g, int64_t n, T* out) {
  constexpr T kLeast = T(1e-25), kMost = T(1e25);
  bool held = true;
  for (int64_t j = 0; j < n; j += kLanes<T>) {
    const int64_t count = smaller(kLanes<T>, n - j);
    alignas(64) T at[3][kLanes<T>] = {};
    for (int64_t l = 0; l < count; ++l) at[0][l] = -norm[j + l], at[1][l] = low[j + l], at[2][l] = g[j + l];
    const Vec<T> factor = exp_shifted<T>(load(at[0]), load(at[1]), power.n, -Lanes<T>::kExact) * load(at[2]);
    for (int64_t l = 0; l < count; ++l) {
      const T size = factor[l] < 0 ? -factor[l] : factor[l];
      held &= (size >= kLeast && size <= kMost) || at[2][l] == 0;
      out[j + l] = factor[l];
    }
  }
  return held;
}

// Both directions' gradient from one exponential, exp(s) / 2^n, where all normalisers of the tile are near each other.
template <class T>
static bool backward_near(const LogitRule<T>& rule, const StripRule<T>& strip, const BackwardTile<T>& tile) {
  constexpr T kApart = T(40);
  const Place& at = tile.at;
  T least = tile.row[at.row], most = least;
  const auto widen = [&](const T* norm, int64_t n) {
    bool numbers = true;
    for (int64_t i = 0; i < n; ++i) {
      numbers &= norm[i] > -Lanes<T>::kExact && norm[i] < Lanes<T>::kExact;
      least = norm[i] < least ? norm[i] : least;
      most = norm[i] > most ? norm[i] : most;
    }
    return numbers;
  };
  if (!widen(tile.row + at.row, at.rows) || !widen(tile.col + at.col, at.cols) || !(most - least <= kApart))
    return false;
  const Power<T> power(least + (most - least) / 2);
  alignas(64) T logits[kTileCols], of_row[kTileRows], of_col[kTileCols] = {};
  if (!factors_over(power, tile.row + at.row, tile.row_low + at.row, tile.g_row + at.row, at.rows, of_row) ||
      !factors_over(power, tile.col + at.col, tile.col_low + at.col, tile.g_col + at.col, at.cols, of_col))
    return false;
  for (int64_t r = 0; r < at.rows; ++r) {
    fetch_row(tile, r + kAhead);
    mask_row<T>(rule, strip, at, at.row + r, tile.products + r * tile.stride, logits, nullptr);
    for (int64_t j = 0; j < at.cols; j += kLanes<T>)
      store_row(tile.grad + r * tile.grad_stride, j, at.cols,
                power.exp_over(load(logits + j)) * (load(of_col + j) + of_row[r]));
  }
  return true;
}
