"""The C++ backend, broken."""

from __future__ import annotations

from mutant import Mutant

STATS = "tests/test_stats.py"
BUDGET = "tests/test_budget.py::test_stats"
LOSSES = "tests/test_losses.py::test_budget"
MAX_SIM = "tests/test_max_sim.py"
RANK = "tests/test_rank.py"
AT_ONCE = "tests/test_at_once.py"
CPP = "cpp and (hand or float32 and (257-257 or 17-17 or 300-2 or 2101))"

MUTANTS = [
    Mutant(
        "last tile not merged", "of several tiles of a section, the last one's partial sums are left out",
        "csrc/totals.h",
        "for (int64_t p = 0; p < parts_; ++p) {",
        "for (int64_t p = 0; p < std::max<int64_t>(1, parts_ - 1); ++p) {",
        (BUDGET,), CPP,
    ),
    Mutant(
        "last strip skipped", "columns beyond the last whole tile are not swept",
        "csrc/tiles.h",
        "return ceil_div(s.cols.size(), tile_cols_); }",
        "return std::max<int64_t>(1, s.cols.size() / tile_cols_); }",
        (BUDGET,), CPP,
    ),
    Mutant(
        "unknown id is the first", "a row whose id no column has gets the code of the smallest one",
        "csrc/prepared.h",
        "at::scalar_tensor(-1, rank.options())",
        "at::scalar_tensor(0, rank.options())",
        (f"{STATS}::test_ids_by_hand", BUDGET), CPP,
    ),
    Mutant(
        "dy of targets skipped", "where targets are given, y gets no gradient of the positives",
        "csrc/gradients.h",
        "if (g && p_.targets) dy_.index_add_",
        "if (g && !g) dy_.index_add_",
        (BUDGET,), CPP,
    ),
    Mutant(
        "dy overwritten", "each section of rows overwrites dy in place of adding to it",
        "csrc/gradients.h",
        "p.n = p.c_row = d;",
        "p.n = p.c_row = d; p.add = of_x;",
        (BUDGET, f"{STATS}::test_large_losses_alive_at_once"), "cpp",
    ),
    Mutant(
        "kept tile at column 0", "the backward reads kept products from the first column on",
        "csrc/stats_backward.cpp",
        "s.kept ? kept_data + at.row * n + at.col : tile",
        "s.kept ? kept_data + at.row * n : tile",
        (BUDGET, f"{STATS}::test_large_losses_alive_at_once"), "cpp",
    ),
    Mutant(
        "normaliser rounded", "what rounding a log-normaliser to float32 leaves is dropped in the backward",
        "csrc/totals.h",
        "low[first + i] = static_cast<T>(finite - high[first + i]);",
        "low[first + i] = T(0);",
        (f"{STATS}::test_normalisers_of_float32_features_are_not_rounded",), "cpp",
    ),
    Mutant(
        "the rest of a sum", "products leave out the steps beyond the last whole part of a sum",
        "csrc/product.inl",
        "const int64_t steps = smaller(depth, p.k - k);",
        "const int64_t steps = p.k > depth && p.k - k < depth ? 0 : smaller(depth, p.k - k);",
        (BUDGET,), "cpp",
    ),
    Mutant(
        "parts of a sum overwritten", "of a long sum only the last part is left",
        "csrc/product.inl",
        "const bool add = p.add || k > 0;",
        "const bool add = p.add;",
        (BUDGET,), "cpp",
    ),
    Mutant(
        "neighbours overwritten", "a panel's padding is written over what follows a row of the result",
        "csrc/product.inl",
        "if (columns >= kPanel<E>) {",
        "if (columns > 0) {",
        (BUDGET,), "cpp",
    ),
    Mutant(
        "transposed only in the corner", "of a panel that is transposed, the second half repeats the first",
        "csrc/product.inl",
        "transpose_square(b + half * n * b_row + done,",
        "transpose_square(b + done,",
        (BUDGET,), "cpp",
    ),
    Mutant(
        "odd row lost", "where rows are odd in number, bfloat16 leaves the last one out of the product with x",
        "csrc/gradients.h",
        "return {m, 0, ceil_div(k.size(), kStep), a,",
        "return {m, 0, k.size() / kStep, a,",
        (BUDGET,), "cpp and bfloat16",
    ),
    Mutant(
        "a skipped tile counts", "of the upper triangle, what lies in the scratch of a skipped tile is multiplied",
        "csrc/tiles.h",
        "return {s.cols.begin + std::max<int64_t>(0, (story - s.cols.begin) / tile_cols_) * tile_cols_, s.cols.end};",
        "return s.cols;",
        (LOSSES, f"{STATS}"), "cpp and (nt_xent or supcon or self) and not triton",
    ),
    Mutant(
        "each pair twice", "the scale's gradient of features against themselves counts both sides of a pair",
        "csrc/gradients.h",
        "[](int64_t) { return -1; }) / 2;",
        "[](int64_t) { return -1; });",
        (LOSSES,), "cpp and nt_xent and float32",
    ),
    Mutant(
        "margin of the weights alone", "gradients formed in the forward ignore the margin",
        "csrc/stats_at_once.cpp",
        "static_cast<double>(pos_data[i]) - margin",
        "static_cast<double>(pos_data[i])",
        (AT_ONCE,), "",
    ),
    Mutant(
        "gradient of the first rows", "gradients formed in the forward take the normalisers of the first rows for all",
        "csrc/stats_at_once.cpp",
        "norm.set(rows.begin, value);",
        "norm.set(0, value);",
        (AT_ONCE,), "",
    ),
    Mutant(
        "equal ids not excluded", "exclude nothing by ids",
        "csrc/tile.inl",
        "if (rule.equal_ids == EqualIds::kExclude) store(out + j, equal ? excluded : s);",
        "if (rule.equal_ids == EqualIds::kExclude) store(out + j, s);",
        (f"{STATS}::test_ids_by_hand",), "cpp",
    ),
    Mutant(
        "self at a tile's edge", "S[i, i] is not excluded where it is a tile's first column",
        "csrc/tile.inl",
        "if (rule.exclude_self && self >= 0 && self < at.cols)",
        "if (rule.exclude_self && self > 0 && self < at.cols)",
        (f"{STATS}::test_exclude_self_by_hand", BUDGET), CPP,
    ),
    Mutant(
        "padding not excluded", "lanes beyond a tile's end hold -inf times the scale",
        "csrc/tile.inl",
        "for (int64_t j = at.cols; j % kLanes<T> != 0; ++j) out[j] = kNegInf<T>;",
        "",
        (f"{STATS}::test_negative_scale", f"{STATS}::test_scale_zero_has_a_gradient"), "cpp",
    ),
    Mutant(
        "wrong maximum on merge", "two partials are merged against the second's maximum",
        "csrc/tile.inl",
        "const Vec<T> most = maximum<T>(load(m + k), load(m2 + k)), ref",
        "const Vec<T> most = load(m2 + k), ref",
        (BUDGET,), CPP,
    ),
    Mutant(
        "column sums not rescaled", "a new maximum of a column leaves its sum relative to the old one",
        "csrc/tile.inl",
        "store(col_sum + j, load(col_sum + j) * exp_nonpositive<T>(load(col_max + j) - ref));",
        "store(col_sum + j, load(col_sum + j));",
        (BUDGET,), CPP,
    ),
    Mutant(
        "row and column swapped", "the backward's column gradients are those of the rows' places",
        "csrc/tile.inl",
        "copy_padded(g_col, tile.g_col + at.col, at.cols, T(0));",
        "copy_padded(g_col, tile.g_col + (at.row < at.col ? at.row : at.col), at.cols, T(0));",
        (BUDGET,), CPP,
    ),
    Mutant(
        "positive skipped in the tail", "features beyond the last whole vector get no gradient of the positive",
        "csrc/tile.inl",
        "const T total = other ? grad[j] + other[j] * g : grad[j];",
        "const T total = grad[j];",
        (BUDGET,), CPP,
    ),
    Mutant(
        "sigmoid's sign", "the gradient of a pair with equal ids keeps the sign of a negative",
        "csrc/tile.inl",
        "signs ? (strip.load_ids(j) == id ? -g : g) : g",
        "signs ? (strip.load_ids(j) == id ? g : g) : g",
        (LOSSES,), "cpp and siglip and float32",
    ),
    Mutant(
        "last of equal tokens", "of equal products the last one is the maximum",
        "csrc/max_sim.inl",
        "const IntVec<T> higher = s > top[v];",
        "const IntVec<T> higher = s >= top[v];",
        (f"{MAX_SIM}::test_the_first_of_equal_tokens_gets_the_gradient", f"{MAX_SIM}::test_by_hand"), "cpp",
    ),
    Mutant(
        "ties across lanes", "of equal products in two lanes, the first lane's wins",
        "csrc/max_sim.inl",
        "(s > top) | ((s == top) & (where < at))",
        "s > top",
        (f"{MAX_SIM}::test_random_problems", f"{MAX_SIM}::test_matches_float64"), "cpp",
    ),
    Mutant(
        "index of a part", "maxima of a long item's later parts are counted from 0",
        "csrc/max_sim.inl",
        "at += static_cast<Int>(first);",
        "",
        (f"{MAX_SIM}::test_items_longer_than_a_block_of_the_cpp_backend",),
    ),
    Mutant(
        "every part counts", "the maxima of a long item are added up part by part",
        "csrc/max_sim.cpp",
        "if (out_y && xt.last)",
        "if (out_y)",
        (f"{MAX_SIM}::test_items_longer_than_a_block_of_the_cpp_backend",),
    ),
    Mutant(
        "ties by the larger column", "of equal scores the later candidate comes first",
        "csrc/top_k.cpp",
        "? a.column < b.column : b_nan",
        "? a.column > b.column : b_nan",
        (f"{RANK}::test_duplicates_go_by_index",), "cpp",
    ),
    Mutant(
        "last column of a chunk", "the last score of a short chunk is not looked at",
        "csrc/top_k.cpp",
        "for (int64_t j = 0; j < n; ++j) passes |=",
        "for (int64_t j = 0; j + 1 < n; ++j) passes |=",
        (f"{RANK}::test_rank_with_ties", f"{RANK}::test_real_features"), "cpp",
    ),
    Mutant(
        "rank of duplicates", "an equal score before the target does not stand ahead of it",
        "csrc/top_k.cpp",
        "count += scores[j] >= score;",
        "count += scores[j] > score;",
        (f"{RANK}::test_target_ranks_with_ties",), "cpp",
    ),
    Mutant(
        "one direction's gradient", "of two directions, the positive gets the last one's gradient",
        "csrc/cross_entropy.cpp",
        "out_pos[i] -= out[i];",
        "out_pos[i] = -out[i];",
        ("tests/test_cross_entropy.py",), "cpp",
    ),
    Mutant(
        "slab handed out twice", "kept products of one loss overwrite those of another",
        "csrc/memory.cpp",
        "slab = std::exchange(spare_, {});",
        "slab = spare_;",
        (f"{STATS}::test_large_losses_alive_at_once",), "cpp",
    ),
    Mutant(
        "slab too small", "a block given back serves a larger problem",
        "csrc/memory.cpp",
        "if (slab.bytes >= bytes && slab.bytes / 2 <= bytes) return slab;",
        "if (slab.memory && slab.bytes / 2 <= bytes) return slab;",
        (f"{STATS}::test_kept_products_of_problems_that_grow_and_shrink",),
    ),
]  # fmt: skip
