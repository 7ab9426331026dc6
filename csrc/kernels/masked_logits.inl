// The mask: one row of a tile's products becomes logits, and -inf where a pair is excluded. All sweeps call it, so that
// a new exclusion rule is written here and nowhere else.

// The bias and the ids of a tile's columns.
template <class T>
struct TileColumns {
  alignas(64) T bias[kTileCols];
  alignas(64) typename Lanes<T>::Int ids[kTileCols];

  TileColumns(const LogitRule<T>& rule, const TileBounds& at) {
    if (rule.col_bias) copy_padded(bias, rule.col_bias + at.col, at.cols, T(0));
    if (rule.col_ids) copy_padded(ids, rule.col_ids + at.col, at.cols, typename Lanes<T>::Int(-1));
  }
  IntVec<T> load_ids(int64_t j) const {
    IntVec<T> v;
    __builtin_memcpy(&v, ids + j, sizeof v);
    return v;
  }
};

// Turns products of S's row i into masked logits, with -inf up to a whole vector beyond the tile. If this tile holds
// the positive, its logit goes to `pos` and is masked too. Never inlined, so that forward and backward round alike: a
// compiler may round scale * product + bias once in one place and twice in the other.
template <class T>
__attribute__((noinline)) static void masked_logits(const LogitRule<T>& rule, const TileColumns<T>& columns,
                                                    const TileBounds& at, int64_t i, const T* products, T* logits,
                                                    T* pos) {
  for (int64_t j = 0; j < at.cols; j += kLanes<T>) {
    Vec<T> s = load_row(products, j, at.cols) * rule.scale;
    if (rule.col_bias) s += load(columns.bias + j);
    store(logits + j, s);
  }
  const int64_t target = rule.target(i) - at.col;
  const bool holds_target = target >= 0 && target < at.cols;
  if (holds_target && pos) *pos = logits[target] == -kNegInf<T> ? kNaN<T> : logits[target];
  if (rule.row_ids) {
    const typename Lanes<T>::Int id = rule.row_ids[i];
    for (int64_t j = 0; j < at.cols; j += kLanes<T>) {
      const IntVec<T> equal = columns.load_ids(j) == id;
      const Vec<T> s = load(logits + j), excluded = fill<T>(kNegInf<T>);
      if (rule.equal_ids == EqualIds::kExclude) store(logits + j, equal ? excluded : s);
      if (rule.equal_ids == EqualIds::kOnly) store(logits + j, equal ? s : excluded);
      if (rule.equal_ids == EqualIds::kNegate) store(logits + j, equal ? -s : s);
    }
  }
  if (holds_target) logits[target] = kNegInf<T>;
  const int64_t self = i - at.col;
  if (rule.exclude_self && self >= 0 && self < at.cols) logits[self] = kNegInf<T>;
  if (rule.upper)
    for (int64_t j = 0; j < smaller(self + 1, at.cols); ++j) logits[j] = kNegInf<T>;
  for (int64_t j = at.cols; j % kLanes<T> != 0; ++j) logits[j] = kNegInf<T>;  // -inf times a scale <= 0 is not -inf
}
