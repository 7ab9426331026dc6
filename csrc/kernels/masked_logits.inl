// The mask: one row of a tile's products becomes logits, and -inf where a pair is excluded. All sweeps call it, so that
// a new exclusion rule is written here and nowhere else.

// The bias, the ids and the limits of a tile's columns.
template <class T>
struct TileColumns {
  alignas(64) T bias[kTileCols];
  alignas(64) T limit[kTileCols];
  alignas(64) typename Lanes<T>::Int ids[kMostIds][kTileCols];

  TileColumns(const LogitRule<T>& rule, const TileBounds& at) {
    if (rule.col_bias) copy_padded(bias, rule.col_bias + at.col, at.cols, T(0));
    if (rule.col_limit) copy_padded(limit, rule.col_limit + at.col, at.cols, T(0));
    if (rule.row_ids)
      for (int64_t k = 0; k < rule.ids; ++k)
        copy_padded(ids[k], rule.col_ids + k * rule.col_count + at.col, at.cols, typename Lanes<T>::Int(-1));
  }
};

// One row's ids, compared with those of the columns.
template <class T>
struct RowIds {
  typename Lanes<T>::Int ids[kMostIds];
  int64_t count;

  RowIds(const LogitRule<T>& rule, int64_t i) : count(rule.ids) {
    for (int64_t k = 0; k < count; ++k) ids[k] = rule.row_ids[k * rule.row_count + i];
  }
  // Which of the columns from j on share an id with the row.
  IntVec<T> related(const TileColumns<T>& columns, int64_t j) const {
    IntVec<T> any{};
    for (int64_t k = 0; k < count; ++k) {
      IntVec<T> v;
      __builtin_memcpy(&v, columns.ids[k] + j, sizeof v);
      any |= v == ids[k];
    }
    return any;
  }
};

template <class T>
static inline bool is_any(IntVec<T> v) {
  typename Lanes<T>::Int bits = 0;
  for (int l = 0; l < kLanes<T>; ++l) bits |= v[l];
  return bits != 0;
}

// A row's logits. If `has_second`, `second` holds: with limits, the logits for the columns' statistic; if related pairs
// are reduced by themselves, their logits; if they are added up, 1 for each of them and 0 for the others.
template <class T>
struct RowLogits {
  alignas(64) T first[kTileCols];
  alignas(64) T second[kTileCols];
  bool has_second;
};

template <class T>
static inline IntVec<T> is_excluded(Vec<T> logits) {
  return logits == fill<T>(kNegInf<T>);
}

template <class T>
static void apply_ids(const LogitRule<T>& rule, const TileColumns<T>& columns, const TileBounds& at, int64_t i,
                      RowLogits<T>& out) {
  const RowIds<T> row(rule, i);
  const Vec<T> excluded = fill<T>(kNegInf<T>);
  IntVec<T> any{};
  for (int64_t j = 0; j < at.cols; j += kLanes<T>) {
    const IntVec<T> related = row.related(columns, j);
    const Vec<T> s = load(out.first + j);
    switch (rule.equal_ids) {
      case EqualIds::kExclude:
        store(out.first + j, related ? excluded : s);
        break;
      case EqualIds::kOnly:
        store(out.first + j, related ? s : excluded);
        break;
      case EqualIds::kNegate:
        store(out.first + j, related ? -s : s);
        break;
      case EqualIds::kApart:
        any |= related;
        store(out.second + j, related ? (rule.softplus ? -s : s) : excluded);
        store(out.first + j, related ? excluded : s);
        break;
      case EqualIds::kAdd:
        any |= related;
        store(out.second + j, related ? fill<T>(1) : Vec<T>{});
    }
  }
  out.has_second = is_any<T>(any);
}

// Turns products of S's row i into masked logits, with -inf up to a whole vector beyond the tile; limits are compared
// with `guide`, if it is not null. If this tile holds the positive, its logit goes to `pos` and is masked too. Never
// inlined: a compiler may round scale * product + bias once in one place and twice in another, forward and backward.
template <class T>
__attribute__((noinline)) static void masked_logits(const LogitRule<T>& rule, const TileColumns<T>& columns,
                                                    const TileBounds& at, int64_t i, const T* products, const T* guide,
                                                    RowLogits<T>& out, T* pos) {
  T* logits = out.first;
  out.has_second = false;
  for (int64_t j = 0; j < at.cols; j += kLanes<T>) {
    Vec<T> s = load_row(products, j, at.cols) * rule.scale;
    if (rule.col_bias) s += load(columns.bias + j);
    store(logits + j, s);
  }
  const int64_t target = rule.target(i) - at.col;
  const bool holds_target = rule.paired && target >= 0 && target < at.cols;
  if (holds_target && pos) *pos = logits[target] == -kNegInf<T> ? kNaN<T> : logits[target];
  if (rule.row_ids) apply_ids(rule, columns, at, i, out);
  const auto exclude = [&](int64_t j) {
    logits[j] = kNegInf<T>;
    if (out.has_second) out.second[j] = rule.adds() ? T(0) : kNegInf<T>;
  };
  if (holds_target) exclude(target);
  const int64_t self = i - at.col;
  if (rule.exclude_self && self >= 0 && self < at.cols) exclude(self);
  if (rule.upper)
    for (int64_t j = 0; j < smaller(self + 1, at.cols); ++j) exclude(j);
  for (int64_t j = at.cols; j % kLanes<T> != 0; ++j) exclude(j);  // -inf times a scale <= 0 is not -inf
  if (!rule.is_limited()) return;
  out.has_second = true;
  const Vec<T> excluded = fill<T>(kNegInf<T>), row_limit = fill<T>(rule.row_limit ? rule.row_limit[i] : -kNegInf<T>);
  for (int64_t j = 0; j < at.cols; j += kLanes<T>) {
    const Vec<T> similarity = guide ? load_row(guide, j, at.cols) : load_row(products, j, at.cols) * rule.scale;
    const Vec<T> s = load(logits + j);
    store(out.second + j, rule.col_limit ? (similarity > load(columns.limit + j) ? excluded : s) : s);
    store(logits + j, similarity > row_limit ? excluded : s);
  }
}
