"""The Triton backend, broken; without a GPU its tests run under Triton's interpreter."""

from __future__ import annotations

from mutant import Mutant

KERNELS = "fused_contrastive/backends/triton"
BUDGET = "tests/test_budget.py::test_stats"
LOSSES = "tests/test_losses.py::test_budget"
TRITON = "triton and float32-plain and (65-65 or 2-130 or 129-40)"
HALF = "triton and bfloat16-plain and (65-65 or 2-130 or 129-40)"

MUTANTS = [
    Mutant(
        "column mask off by one", "the column after the last one counts where N is no multiple of the tile",
        f"{KERNELS}/tiles.py",
        "out |= (cols >= col_end)[None, :]",
        "out |= (cols > col_end)[None, :]",
        (BUDGET,), TRITON,
    ),
    Mutant(
        "last tile not special", "a tile that reaches beyond the last column is masked only where it has a positive",
        f"{KERNELS}/tiles.py",
        "special = (row0 + BM > row_end) | (col0 + BN > col_end) | (c < 0)",
        "special = (row0 + BM > row_end) | (c < 0)",
        (BUDGET,), TRITON,
    ),
    Mutant(
        "feature mask off by one", "products take one feature too many where D is no multiple of the step",
        f"{KERNELS}/tiles.py",
        "inside = ks < D - k",
        "inside = ks <= D - k",
        (BUDGET,), HALF,
    ),
    Mutant(
        "32-bit offset", "the corner of a tile in a large matrix is computed in 32 bits",
        f"{KERNELS}/tiles.py",
        "row.to(tl.int64) * stride + tl.multiple_of(col, 16)",
        "row * stride + tl.multiple_of(col, 16)",
        ("tests/test_triton_configurations.py::test_offsets_of_rows_are_64_bit",),
    ),
    Mutant(
        "sums not rescaled", "a new maximum leaves the running sum relative to the old one",
        f"{KERNELS}/forward.py",
        "total = total * power(top - finite(higher), MODE).to(tl.float64) + added",
        "total = total + added",
        (BUDGET,), TRITON,
    ),
    Mutant(
        "lost tile not remade", "sums that underflow against the tile's maximum are taken as they are",
        f"{KERNELS}/forward.py",
        "tl.store(lost + where, (least_sum < LOST).to(tl.int32))",
        "tl.store(lost + where, (least_sum < 0.0).to(tl.int32))",
        (BUDGET,), HALF,
    ),
    Mutant(
        "columns not rescaled", "a strip's columns are added up against the references of different tiles",
        f"{KERNELS}/forward.py",
        "return total * by + more * its, higher",
        "return total + more, higher",
        (BUDGET,), HALF,
    ),
    Mutant(
        "triangle cut short", "the strip ends at the tile in which the diagonal begins",
        f"{KERNELS}/forward.py",
        "end = min(row_end, col0 + BN - 1)",
        "end = min(row_end, col0)",
        (LOSSES,), "triton and nt_xent and bfloat16",
    ),
    Mutant(
        "maximum of products", "a negative scale turns the maximum into the minimum",
        f"{KERNELS}/tiles.py",
        "| (col0 + BN > col_end) | (c < 0)",
        "| (col0 + BN > col_end)",
        ("tests/test_triton_kernels.py::test_scales_that_are_not_positive",),
    ),
    Mutant(
        "lost strip's columns stay", "what is made again of a lost strip is its rows alone",
        f"{KERNELS}/forward.py",
        "last = tl.where(tiles > 0, col_end, col_begin)",
        "last = col_begin",
        (BUDGET,), HALF,
    ),
    Mutant(
        "nothing left is lost", "a row with nothing left in a tile has its products made again",
        f"{KERNELS}/forward.py",
        "found = max(found, tl.max(tl.where(total < LOST, tl.max(left, axis=1), 0)))",
        "found = max(found, tl.max(tl.where(total < LOST, 1, 0)))",
        ("tests/test_triton_kernels.py::test_products_are_made_once_where_no_sum_is_lost",),
    ),
    Mutant(
        "lowest is highest", "of each segment the lowest normaliser is taken for that of its highest",
        f"{KERNELS}/backward.py",
        'tl.min(tl.where(high == float("-inf"), float("inf"), high))',
        "tl.max(high)",
        (BUDGET,), HALF,
    ),
    Mutant(
        "reference of the first column", "all kept cells of a row are read with the first one's reference",
        f"{KERNELS}/backward.py",
        "reference = tl.load(references + (i // CELL).to(tl.int64) * stride_references + j // CELL)",
        "reference = tl.load(references + (i // CELL).to(tl.int64) * stride_references)",
        (BUDGET,), "triton and bfloat16-plain and (65-65 or 40-193)",
    ),
    Mutant(
        "kept and far", "kept exponentials serve normalisers whose ratio float32 cannot hold",
        f"{KERNELS}/backward.py",
        "KEPT_REACH = tl.constexpr(60.0)",
        "KEPT_REACH = tl.constexpr(6000.0)",
        ("tests/test_stats.py::test_kept_weights_far_below_their_neighbours",), "triton",
    ),
    Mutant(
        "far tiles left", "tiles whose normalisers lie far apart keep what one exponential made of them",
        f"{KERNELS}/backward.py",
        "tiles = tl.where(far > 0, tiles, 0)",
        "tiles = tiles * 0",
        (BUDGET,), HALF,
    ),
    Mutant(
        "wrong dtype of kept tiles", "exponentials are kept in float16, where the small ones vanish",
        f"{KERNELS}/storage.py",
        "return (rows * padded(n) + 2 * _cells(rows) * _cells(padded(n)),), torch.bfloat16",
        "return (rows * padded(n) + 2 * _cells(rows) * _cells(padded(n)),), torch.float16",
        ("tests/test_stats.py::test_kept_weights_far_below_their_neighbours",), "triton",
    ),
    Mutant(
        "reach too far", "one exponential serves normalisers whose ratio float32 cannot hold",
        f"{KERNELS}/backward.py",
        "REACH = tl.constexpr(120.0)",
        "REACH = tl.constexpr(6000.0)",
        (BUDGET,), HALF,
    ),
    Mutant(
        "positive of no row", "columns beyond the last row get the gradient of a positive too",
        f"{KERNELS}/backward.py",
        "with_positive = inside & (i < paired)",
        "with_positive = inside & (i <= paired)",
        (BUDGET,), TRITON,
    ),
    Mutant(
        "low part dropped", "what rounding a log-normaliser to float32 leaves is dropped",
        f"{KERNELS}/backward.py",
        "z -= tl.expand_dims(tl.load(direction.low + i, mask=inside, other=0.0), 1 - AXIS)",
        "z -= 0.0",
        ("tests/test_stats.py::test_normalisers_of_float32_features_are_not_rounded",), "triton",
    ),
    Mutant(
        "sigmoid's sign in kernels", "the gradient of a pair with equal ids keeps the sign of a negative",
        f"{KERNELS}/sigmoid.py",
        "tl.where(equal, -1.0, 1.0)",
        "tl.where(equal, 1.0, 1.0)",
        (LOSSES,), "triton and siglip and float32",
    ),
    Mutant(
        "coefficient of the polynomial", "one coefficient of log2(1 + u) / u is off by a hundredth",
        f"{KERNELS}/sigmoid.py",
        "0.4776683787165162",
        "0.4876683787165162",
        ("tests/test_triton_kernels.py::test_sums_of_softplus_are_precise",),
    ),
    Mutant(
        "sigmoids of one half", "columns are done in groups, and the second group's sigmoids are the first one's",
        f"{KERNELS}/sigmoid.py",
        "tl.join(slope_a, slope_b)",
        "tl.join(slope_a, slope_a)",
        ("tests/test_triton_at_once.py::test_siglip",),
    ),
    Mutant(
        "rows of blocks overwrite dy", "in one walk, the second row of blocks overwrites dy in place of adding to it",
        f"{KERNELS}/at_once.py",
        "launch.add_product(dy[b.cols], g.values.T, p.x[b.rows], first=b.row0 == 0)",
        "launch.add_product(dy[b.cols], g.values.T, p.x[b.rows], first=True)",
        ("tests/test_triton_at_once.py::test_info_nce",),
    ),
    Mutant(
        "positives without their weight", "in one walk, the positives of dx are not divided by M",
        f"{KERNELS}/at_once.py",
        "                g_pos[rows] *= weight\n",
        "                g_pos[rows] *= 1.0\n",
        ("tests/test_triton_at_once.py::test_info_nce",),
    ),
    Mutant(
        "one direction's gradient in kernels", "of two directions, the positive gets the last one's gradient",
        f"{KERNELS}/loss_node.py",
        "to_pos -= slope",
        "to_pos = -slope",
        ("tests/test_cross_entropy.py::test_derivatives",), "triton and mean-2",
    ),
    Mutant(
        "dy overwritten by blocks", "the second block of rows overwrites dy in place of adding to it",
        f"{KERNELS}/launch.py",
        "add_product(dy[b.cols], g.T, p.x[b.rows], first=b.row0 == 0)",
        "add_product(dy[b.cols], g.T, p.x[b.rows], first=True)",
        (BUDGET,), TRITON,
    ),
    Mutant(
        "float16 weights not enlarged", "G is rounded to float16 as it is, and small weights vanish",
        f"{KERNELS}/launch.py",
        "self.top = FP16_TOP",
        "self.top = 1.0",
        ("tests/test_stats.py::test_small_weights_of_float16_features_do_not_vanish",), "triton",
    ),
    Mutant(
        "padding has a maximum", "tokens beyond an item's length take part in the maxima",
        f"{KERNELS}/max_sim.py",
        's = tl.where((p < y_length)[None, :], acc, float("-inf"))',
        's = tl.where((p < P)[None, :], acc, float("-inf"))',
        ("tests/test_max_sim.py::test_matches_float64", "tests/test_max_sim.py::test_items_without_tokens_score_zero"),
        "triton and (without or x-True)",
    ),
    Mutant(
        "NaN ranks first", "a score that is NaN keeps its bits as its place",
        f"{KERNELS}/top_k.py",
        "_swap(bits).masked_fill_(scores.isnan(), NAN_BITS)",
        "_swap(bits)",
        ("tests/test_rank.py::test_nan_and_infinity",), "triton",
    ),
]  # fmt: skip
