"""Mutants of the rules that decide which pairs count, in the C++ backend and in the losses; and of the teacher."""

from __future__ import annotations

from mutant import Mutant

PACKAGE = "fused_contrastive"
LOSSES = "tests/losses/test_losses.py::test_budget"
RELATED = "tests/losses/test_related.py"
LIMITS = "tests/ops/test_limits.py"
DISTILLATION = "tests/losses/test_distillation.py"

MUTANTS = [
    Mutant(
        "only the first id",
        "ids after the first of a row and column are not compared",
        "csrc/kernels/masked_logits.inl",
        "for (int64_t k = 0; k < count; ++k) {\n      IntVec<T> v;",
        "for (int64_t k = 0; k < 1; ++k) {\n      IntVec<T> v;",
        (LOSSES,),
        "cpp and float32 and (clip or info_nce)",
    ),
    Mutant(
        "limit not strict",
        "a pair at its limit does not count",
        "csrc/kernels/masked_logits.inl",
        "similarity > row_limit ? excluded : s",
        "similarity >= row_limit ? excluded : s",
        (f"{LIMITS}::test_limits_have_no_gradient_and_do_not_touch_the_bias",),
        "cpp",
    ),
    Mutant(
        "column limits are rows'",
        "columns leave out what rows do",
        "csrc/kernels/tile_sweeps.inl",
        "return limited ? logits[k].second : logits[k].first; };",
        "return logits[k].first; };",
        (LIMITS,),
        "one_side and 0",
    ),
    Mutant(
        "limits of the backward",
        "where directions share an exponential, the backward has no column limits",
        "csrc/kernels/shared_exp.inl",
        "((is_excluded<T>(second) ? none : by_col) + (is_excluded<T>(first) ? none : by_row));",
        "(by_col + (is_excluded<T>(first) ? none : by_row));",
        (LIMITS,),
        "both_directions and float32",
    ),
    Mutant(
        "related pairs by the others' normaliser",
        "the backward of related pairs by themselves",
        "csrc/kernels/tile_sweeps.inl",
        "if (kRow) g += weights_apart<T>(related, s, tile.row, tile.related_row, i);",
        "if (kRow) g += weights_apart<T>(related, s, tile.row, tile.row, i);",
        (LOSSES,),
        "cpp and float32 and several",
    ),
    Mutant(
        "related logits added once",
        "the gradient of the columns' sums of related logits is lost",
        "csrc/kernels/shared_exp.inl",
        "if (tile.related_col.g) g += load_row(",
        "if (false) g += load_row(",
        (LOSSES,),
        "cpp and float32 and several",
    ),
    Mutant(
        "guide of the first columns",
        "each group of columns has the guide's first ones",
        "csrc/stats/guide.h",
        "panels_.set_transposed(*y_, cols.begin, cols.end);",
        "panels_.set_transposed(*y_, 0, cols.end - cols.begin);",
        (f"{LIMITS}::test_a_guide_over_many_tiles",),
        "",
    ),
    Mutant(
        "weighted sum not rescaled",
        "a new maximum of the teacher leaves the weighted sum relative to the old one",
        "csrc/stats/running_statistic.h",
        "weighted = weighted * by + part_weighted_[k] * its;",
        "weighted = weighted + part_weighted_[k] * its;",
        (DISTILLATION,),
        "cpp or tiles",
    ),
    Mutant(
        "teacher by our normaliser",
        "the teacher's weights in the backward are relative to our log-sum-exp",
        "csrc/stats/backward.cpp",
        "const int64_t normaliser = part && problem.teacher ? 2 : part;",
        "const int64_t normaliser = part && problem.teacher ? 0 : part;",
        (DISTILLATION,),
        "cpp or tiles",
    ),
    Mutant(
        "pairs counted twice",
        "a pair that agrees in two places counts twice",
        f"{PACKAGE}/losses/related.py",
        "add(k + 1, mine, theirs, -sign)",
        "pass",
        (f"{RELATED}::test_related_counts",),
        "",
    ),
    Mutant(
        "copies above the limit",
        "no rounding is allowed for",
        f"{PACKAGE}/losses/margins.py",
        "(8 + 4 * d**0.5)",
        "(0 * d)",
        (f"{RELATED}::test_copies_count_at_margin_0_for_any_width",),
        "cpp",
    ),
    Mutant(
        "relative to the signed similarity",
        "a negative positive's relative margin has the other sign",
        f"{PACKAGE}/losses/margins.py",
        "margins.relative * similarity.abs()",
        "margins.relative * similarity",
        (LOSSES,),
        "reference and float32 and relative",
    ),
    Mutant(
        "debias without its least value",
        "the sum over negatives may fall to 0",
        f"{PACKAGE}/ops/correction.py",
        "return torch.where(some & (left > least), left, least)",
        "return torch.where(some, left, least)",
        (f"{RELATED}::test_debias_keeps_the_sum_above_its_least_value", LOSSES),
        "reference and (least or debias)",
    ),
    Mutant(
        "hardness without the mean weight",
        "weights of negatives are not divided by their mean",
        f"{PACKAGE}/ops/correction.py",
        "normaliser = (hard - easy + log_count)",
        "normaliser = (hard + log_count)",
        (LOSSES,),
        "reference and float32 and hardness",
    ),
]
