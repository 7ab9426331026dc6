"""Mutants of the losses of nested prefixes."""

from __future__ import annotations

from mutant import Mutant

MATRYOSHKA = "tests/losses/test_matryoshka.py"
OF_CPP = "not triton and (same_as_a_loop or gradients_of_some or short_prefix or several_tiles)"
PREFIXES = "csrc/stats/prefixes.cpp"

MUTANTS = [
    Mutant(
        "prefixes that end before", "a column's positive counts in the longer prefixes alone", PREFIXES,
        "for (int64_t l = tiles_.count() - 1; l >= k; --l)", "for (int64_t l = tiles_.count() - 1; l > k; --l)",
        (MATRYOSHKA,), OF_CPP,
    ),
    Mutant(
        "norm of one prefix", "the gradient through the norms is that of each prefix alone", PREFIXES,
        "along += dots.const_data_ptr", "along = dots.const_data_ptr",
        (MATRYOSHKA,), OF_CPP,
    ),
    Mutant(
        "positives without norms", "the positives' part of the gradient through the norms lacks the factors", PREFIXES,
        "dot * tiles_.factor(k, i, j) *", "dot *",
        (MATRYOSHKA,), OF_CPP,
    ),
    Mutant(
        "a target's own row", "with targets, a column's positive is the row with its number", PREFIXES,
        "add_positive(memory(dy_) + j * p.y.d, p.y.wide_row(j, scratch), p.x, i, i, T(1));",
        "add_positive(memory(dy_) + j * p.y.d, p.y.wide_row(j, scratch), p.x, j % p.x.rows, i, T(1));",
        (MATRYOSHKA,), OF_CPP,
    ),
    Mutant(
        "the longest prefix's kept products", "a kept prefix reads the products of the first that is kept",
        "csrc/stats/prefix_tiles.h",
        "(k - count() + kept_) * at.rows * at.cols", "0 * at.rows * at.cols",
        (MATRYOSHKA,), OF_CPP,
    ),
    Mutant(
        "gradients of longer prefixes", "the columns that prefixes share get the shortest one's gradient alone",
        "csrc/kernels/prefixes.inl",
        "if (kLonger) g += load_row(tile.longer", "if (kLonger) g += T(0) * load_row(tile.longer",
        (MATRYOSHKA,), OF_CPP,
    ),
    Mutant(
        "padding of a tile", "what lies beyond a tile's columns counts in the sums of its rows",
        "csrc/kernels/prefixes.inl",
        "for (int64_t l = tile.cols - j; !is_whole && l < kLanes<T>; ++l) dot[l] = 0;", "",
        (MATRYOSHKA,), OF_CPP,
    ),
    Mutant(
        "direction of a short prefix", "a prefix of norm 0 is divided by it", "fused_contrastive/core/prefixes.py",
        "torch.where(norms < LEAST_NORM, 0, norms.reciprocal())", "norms.reciprocal()",
        (MATRYOSHKA,), "reference",
    ),
    Mutant(
        "weights in order", "the first prefix's weight is that of all", "fused_contrastive/losses/matryoshka.py",
        "sum(factor * each for factor, each in", "sum(nested.weights[0] * each for _, each in",
        (MATRYOSHKA,), "reference",
    ),
]  # fmt: skip
