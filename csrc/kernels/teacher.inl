// Sweeps for a teacher: log-sum-exps of our logits s and of the teacher's t, and sums of s weighted by exp(t). If all
// sums of a tile are near each other, one exponential of s and one of t serve both directions (shared_exp.inl).

// The teacher's logits of a tile's row, -inf in columns whose bias is, and beyond the row's end.
template <class T>
static inline Vec<T> teacher_logits(const LogitRule<T>& rule, const TileColumns<T>& columns, const T* row, int64_t j,
                                    int64_t cols) {
  const Vec<T> t = load_row(row, j, cols);
  if (!rule.col_bias) return t;
  return is_excluded<T>(load(columns.bias + j)) ? fill<T>(kNegInf<T>) : t;
}

// s times exp(t) where t counts, so that 0 * -inf does not become NaN. Elsewhere a logit of -inf makes the sum -inf.
template <class T>
static inline Vec<T> weighted(Vec<T> s, Vec<T> t, Vec<T> e) {
  return is_excluded<T>(t) ? Vec<T>{} : s * e;
}

template <class T>
static PowerOfTwo<T> power_of_row(const T* logits, int64_t cols, bool& fits) {
  const T reference = largest_of_row(logits, cols);
  fits = fits && reference > -kMaxReference<T> && reference < kMaxReference<T>;
  return PowerOfTwo<T>(fits ? reference : T(0));
}

// Returns false if a sum is out of range. What it has written must then be overwritten.
template <class T, bool kRow, bool kCol>
static bool forward_teacher_shared(const LogitRule<T>& rule, const TileColumns<T>& columns,
                                   const ForwardTile<T>& tile) {
  const TileBounds& at = tile.at;
  if (rule.col_bias || !leaves_many<T>(at, 0)) return false;
  RowLogits<T> masked;
  alignas(64) T teacher[kTileCols], sum[3][kTileCols] = {}, some[3][kTileCols];
  PowerOfTwo<T> power(0), of_teacher(0);
  bool fits = true;
  for (int64_t first = 0; first < at.rows; first += kSweepRows) {
    for (auto& each : some)
      for (int64_t j = 0; j < kTileCols; ++j) each[j] = 0;  // short sums: equal terms would all round one way
    for (int64_t r = first; r < smaller(first + kSweepRows, at.rows); ++r) {
      masked_logits(rule, columns, at, at.row + r, tile.products + r * tile.stride, guide_row(tile, r), masked,
                    pos_of(tile, at.row + r));
      for (int64_t j = 0; j < at.cols; j += kLanes<T>)
        store(teacher + j, teacher_logits(rule, columns, guide_row(tile, r), j, at.cols));
      if (r == 0) {
        power = power_of_row(masked.first, at.cols, fits);
        of_teacher = power_of_row(teacher, at.cols, fits);
        if (!fits) return false;
      }
      Vec<T> row[3] = {};
      for (int64_t j = 0; j < at.cols; j += kLanes<T>) {
        const Vec<T> s = load(masked.first + j), t = load(teacher + j);
        const Vec<T> e = power.exp_over(s < power.highest ? s : fill<T>(power.highest));
        const Vec<T> f = of_teacher.exp_over(t < of_teacher.highest ? t : fill<T>(of_teacher.highest));
        const Vec<T> terms[3] = {e, f, weighted<T>(s, t, f)};
        for (int k = 0; k < 3; ++k) {
          if (kRow) row[k] += terms[k];
          if (kCol) store(some[k] + j, load(some[k] + j) + terms[k]);
        }
      }
      if (!kRow) continue;
      const T sums[2] = {total<T>(row[0]), total<T>(row[1])};
      if (!is_in_range(sums[0]) || !is_in_range(sums[1])) return false;
      tile.row.max[r] = power.log, tile.row.sum[r] = sums[0] * power.rest;
      tile.related_row.max[r] = of_teacher.log, tile.related_row.sum[r] = sums[1] * of_teacher.rest;
      tile.weighted_row[r] = total<T>(row[2]) * of_teacher.rest;
    }
    for (int k = 0; k < 3; ++k)
      for (int64_t j = 0; kCol && j < at.cols; j += kLanes<T>) store(sum[k] + j, load(sum[k] + j) + load(some[k] + j));
  }
  for (int64_t j = 0; kCol && j < at.cols; ++j) {
    if (!is_in_range(sum[0][j]) || !is_in_range(sum[1][j])) return false;
    tile.col.max[j] = power.log, tile.col.sum[j] = sum[0][j] * power.rest;
    tile.related_col.max[j] = of_teacher.log, tile.related_col.sum[j] = sum[1][j] * of_teacher.rest;
    tile.weighted_col[j] = sum[2][j] * of_teacher.rest;
  }
  return true;
}

template <class T, bool kRow, bool kCol>
static void forward_teacher(const LogitRule<T>& rule, const ForwardTile<T>& tile) {
  const TileBounds& at = tile.at;
  const TileColumns<T> columns(rule, at);
  if (forward_teacher_shared<T, kRow, kCol>(rule, columns, tile)) return;
  RowLogits<T> masked;
  alignas(64) T teacher[kTileCols], weighted_sum[kTileCols] = {};
  ColumnLogSums<T> col, of_teacher;
  for (int64_t r = 0; r < at.rows; ++r) {
    masked_logits(rule, columns, at, at.row + r, tile.products + r * tile.stride, guide_row(tile, r), masked,
                  pos_of(tile, at.row + r));
    for (int64_t j = 0; j < at.cols; j += kLanes<T>) {
      const Vec<T> s = load(masked.first + j), t = teacher_logits(rule, columns, guide_row(tile, r), j, at.cols);
      store(teacher + j, t);
      if (!kCol) continue;
      col.see(s, j);
      of_teacher.see(t, j);
      const Vec<T> ref = finite_reference<T>(load(of_teacher.next_max + j));
      store(weighted_sum + j, load(weighted_sum + j) * exp_nonpositive<T>(load(of_teacher.max + j) - ref));
    }
    if (kCol) {
      col.rescale(at.cols);
      of_teacher.rescale(at.cols);
    }
    const T row_max = largest_of_row(masked.first, at.cols), teacher_max = largest_of_row(teacher, at.cols);
    const T row_ref = finite_reference(row_max), teacher_ref = finite_reference(teacher_max);
    Vec<T> row[3] = {};
    for (int64_t j = 0; j < at.cols; j += kLanes<T>) {
      const Vec<T> s = load(masked.first + j), t = load(teacher + j);
      if (kRow) {
        const Vec<T> f = exp_nonpositive<T>(t - teacher_ref);
        row[0] += exp_nonpositive<T>(s - row_ref);
        row[1] += f;
        row[2] += weighted<T>(s, t, f);
      }
      if (kCol) {
        const Vec<T> f = exp_nonpositive<T>(t - load(of_teacher.reference + j));
        col.add(exp_nonpositive<T>(s - load(col.reference + j)), j);
        of_teacher.add(f, j);
        store(weighted_sum + j, load(weighted_sum + j) + weighted<T>(s, t, f));
      }
    }
    if (!kRow) continue;
    tile.row.max[r] = row_max, tile.row.sum[r] = total<T>(row[0]);
    tile.related_row.max[r] = teacher_max, tile.related_row.sum[r] = total<T>(row[1]);
    tile.weighted_row[r] = total<T>(row[2]);
  }
  if (!kCol) return;
  col.write(tile.col, at.cols);
  of_teacher.write(tile.related_col, at.cols);
  __builtin_memcpy(tile.weighted_col, weighted_sum, at.cols * sizeof(T));
}

// Sets `middle` to the middle of the normalisers of a tile's rows and columns. Returns false if they are out of range
// or too far apart for one exponential.
template <class T>
static bool power_between(const Normalised<T>& row, const Normalised<T>& col, const TileBounds& at, T& middle) {
  constexpr T kApart = T(40);
  T least = row.value[at.row], most = least;
  bool numbers = true;
  const auto widen = [&](const T* norm, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      numbers &= norm[i] > -kMaxReference<T> && norm[i] < kMaxReference<T>;
      least = norm[i] < least ? norm[i] : least;
      most = norm[i] > most ? norm[i] : most;
    }
  };
  widen(row.value + at.row, at.rows);
  widen(col.value + at.col, at.cols);
  middle = least + (most - least) / 2;
  return numbers && most - least <= kApart;
}

// Writes g_row exp(s - row) + g_col exp(s - col) plus the same sum for t with related_row and related_col.
template <class T, bool kRow, bool kCol>
static void backward_teacher(const LogitRule<T>& rule, const BackwardTile<T>& tile) {
  const TileBounds& at = tile.at;
  const TileColumns<T> columns(rule, at);
  RowLogits<T> masked;
  const TileNormalised<T> col(tile.col, at), of_teacher(tile.related_col, at);
  alignas(64) T row_factor[2][kTileRows], col_factor[2][kTileCols] = {};
  T middle[2] = {};
  bool shared = kRow && kCol;
  if constexpr (kRow && kCol) {
    shared = power_between(tile.row, tile.col, at, middle[0]) &&
             power_between(tile.related_row, tile.related_col, at, middle[1]);
  }
  const PowerOfTwo<T> power(middle[0]), teacher_power(middle[1]);
  if constexpr (kRow && kCol) {
    const auto factors = [&](const PowerOfTwo<T>& by, const Normalised<T>& of, int64_t first, int64_t n, T* out) {
      return factors_over(by, of.value + first, of.low + first, of.g + first, n, out);
    };
    shared = shared && factors(power, tile.row, at.row, at.rows, row_factor[0]) &&
             factors(power, tile.col, at.col, at.cols, col_factor[0]) &&
             factors(teacher_power, tile.related_row, at.row, at.rows, row_factor[1]) &&
             factors(teacher_power, tile.related_col, at.col, at.cols, col_factor[1]);
  }
  for (int64_t r = 0; r < at.rows; ++r) {
    const int64_t i = at.row + r;
    fetch_row(tile, r + kFetchAhead);
    masked_logits<T>(rule, columns, at, i, tile.products + r * tile.stride, guide_row(tile, r), masked, nullptr);
    T* grad = tile.grad + r * tile.grad_stride;
    for (int64_t j = 0; j < at.cols; j += kLanes<T>) {
      const Vec<T> s = load(masked.first + j), t = teacher_logits(rule, columns, guide_row(tile, r), j, at.cols);
      Vec<T> g{};
      if (shared) {
        g = power.exp_over(s) * (load(col_factor[0] + j) + row_factor[0][r]) +
            teacher_power.exp_over(t) * (load(col_factor[1] + j) + row_factor[1][r]);
      } else {
        if (kRow) g += row_weights(tile.row, i, s) + row_weights(tile.related_row, i, t);
        if (kCol) g += col.weights(s, j) + of_teacher.weights(t, j);
      }
      store_row(grad, j, at.cols, g);
    }
  }
}
