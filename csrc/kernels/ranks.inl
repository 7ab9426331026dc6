// Counts the logits of a tile above their row's and column's references, and finds the highest ones. It makes the
// logits from the products once more, which costs little while the tile is in the cache; the other sweeps stay as they
// are.

template <class T>
static void rank_tile(LogitRule<T> rule, const ForwardTile<T>& tile) {
  const TileBounds& at = tile.at;
  if (rule.equal_ids == EqualIds::kNegate) rule.equal_ids = EqualIds::kExclude;  // they are positives, as the target is
  const TileColumns<T> columns(rule, at);
  const bool of_cols = tile.col_ranks.sum != nullptr;
  alignas(64) T reference[kTileCols], col_count[kTileCols] = {}, col_max[kTileCols];
  for (int64_t j = 0; j < kTileCols; ++j) col_max[j] = kNegInf<T>;
  if (of_cols) copy_padded(reference, rule.col_reference + at.col, at.cols, T(0));
  const Vec<T> one = fill<T>(1), zero{};
  RowLogits<T> logits;
  for (int64_t r = 0; r < at.rows; ++r) {
    const int64_t i = at.row + r;
    masked_logits<T>(rule, columns, at, i, tile.products + r * tile.stride, guide_row(tile, r), logits, nullptr);
    if (tile.row_ranks.sum) {
      const Vec<T> above = fill<T>(rule.row_reference[i]);
      Vec<T> count{}, most = fill<T>(kNegInf<T>);
      for (int64_t j = 0; j < at.cols; j += kLanes<T>) {
        const Vec<T> s = load(logits.first + j);
        count += s <= above ? zero : one;  // a NaN counts
        most = s > most ? s : most;        // a NaN is never the highest
      }
      tile.row_ranks.sum[r] = total<T>(count);
      tile.row_ranks.max[r] = largest<T>(most);
    }
    if (!of_cols) continue;
    const T* of_col = rule.is_limited() ? logits.second : logits.first;
    for (int64_t j = 0; j < at.cols; j += kLanes<T>) {
      const Vec<T> s = load(of_col + j), most = load(col_max + j);
      store(col_count + j, load(col_count + j) + (s <= load(reference + j) ? zero : one));
      store(col_max + j, s > most ? s : most);
    }
  }
  if (!of_cols) return;
  __builtin_memcpy(tile.col_ranks.sum, col_count, at.cols * sizeof(T));
  __builtin_memcpy(tile.col_ranks.max, col_max, at.cols * sizeof(T));
}
