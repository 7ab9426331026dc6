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
        "(cols >= col_end)[None, :]",
        "(cols > col_end)[None, :]",
        (BUDGET,), TRITON,
    ),
    Mutant(
        "last tile not special", "a tile that reaches beyond the last column is masked only where it has a positive",
        f"{KERNELS}/tiles.py",
        "(row0 + BM > row_end) | (col0 + BN > col_end) | (tl.max",
        "(row0 + BM > row_end) | (tl.max",
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
        "(row0 - row_begin).to(tl.int64) * stride",
        "(row0 - row_begin) * stride",
        ("tests/test_triton_configurations.py::test_offsets_of_rows_are_64_bit",),
    ),
    Mutant(
        "sums not rescaled", "a new maximum leaves the running sum relative to the old one",
        f"{KERNELS}/forward.py",
        "total = total * power(top - finite(higher), FAST).to(tl.float64) + added",
        "total = total + added",
        (BUDGET,), TRITON,
    ),
    Mutant(
        "lost tile not remade", "sums that underflow against the tile's maximum are taken as they are",
        f"{KERNELS}/forward.py",
        "lost = least < LOST",
        "lost = least < 0.0",
        (BUDGET,), HALF,
    ),
    Mutant(
        "lost tile read back", "the backward takes exponentials that have underflowed",
        f"{KERNELS}/forward.py",
        'reference = tl.where(lost, float("nan"), finite(top))',
        "reference = finite(top)",
        (BUDGET,), HALF,
    ),
    Mutant(
        "wrong dtype of kept tiles", "exponentials are kept in float16, where the small ones vanish",
        f"{KERNELS}/storage.py",
        "return (_even(rows * n) + 2 * _cells(rows) * _cells(n),), torch.bfloat16",
        "return (_even(rows * n) + 2 * _cells(rows) * _cells(n),), torch.float16",
        ("tests/test_stats.py::test_kept_weights_far_below_their_neighbours",), "triton",
    ),
    Mutant(
        "reach too far", "one exponential serves normalisers whose ratio float32 cannot hold",
        f"{KERNELS}/backward.py",
        "REACH = tl.constexpr(60.0)",
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
        "z -= tl.expand_dims(low, 1 - AXIS)",
        "z -= 0.0 * tl.expand_dims(low, 1 - AXIS)",
        ("tests/test_stats.py::test_normalisers_of_float32_features_are_not_rounded",), "triton",
    ),
    Mutant(
        "sigmoid's sign in kernels", "the gradient of a pair with equal ids keeps the sign of a negative",
        f"{KERNELS}/sigmoid.py",
        "row_end, cols, col_end), -slope, slope)",
        "row_end, cols, col_end), slope, slope)",
        (LOSSES,), "triton and siglip and float32",
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
