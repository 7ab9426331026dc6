"""Formulas of the losses, the autograd formula, processes and evaluation, broken."""

from __future__ import annotations

from mutant import Mutant

PACKAGE = "fused_contrastive"
LOSSES = "tests/test_losses.py::test_budget"
CPP = "cpp and float32"
WHOLE = "tests/test_distributed.py::test_whole_batch"

MUTANTS = [
    Mutant(
        "no gradient of the scale", "the temperature's gradient is dropped",
        f"{PACKAGE}/ops/autograd.py",
        "dscale if needs[2] else None,",
        "None,",
        ("tests/test_stats.py::test_scale_zero_has_a_gradient",), "cpp",
    ),
    Mutant(
        "dx for dy", "x gets no gradient unless y does",
        f"{PACKAGE}/ops/autograd.py",
        "dx if needs[0] else None,",
        "dx if needs[1] else None,",
        ("tests/test_stats.py::test_only_needed_gradients",), "cpp",
    ),
    Mutant(
        "sign of the scale's gradient", "of the reference",
        f"{PACKAGE}/backends/reference.py",
        "scale=(x * dx).sum() if needs.scale",
        "scale=-(x * dx).sum() if needs.scale",
        ("tests/test_budget.py::test_stats",), "reference and 17-17 and float32",
    ),
    Mutant(
        "products beyond the budget", "a chunk that is kept in part is read as if it were whole",
        f"{PACKAGE}/backends/reference.py",
        "products = saved.kept[rows] if rows.stop <= spec.kept_rows else",
        "products = saved.kept[rows] if rows.start < spec.kept_rows else",
        ("tests/test_stats.py::test_any_memory_budget_gives_the_same",), "reference",
    ),
    Mutant(
        "DCL keeps the positive", "decoupled is not passed on",
        f"{PACKAGE}/losses/clip.py",
        "dtype=dtype if plain else pos.dtype, decoupled=decoupled,",
        "dtype=dtype if plain else pos.dtype, decoupled=False,",
        ("tests/test_budget.py::test_clip",), CPP,
    ),
    Mutant(
        "share of label smoothing", "spread over the N - 1 negatives in place of all N",
        f"{PACKAGE}/losses/clip.py",
        "losses = losses + label_smoothing * (pos",
        "losses = losses + label_smoothing * len(pos) / max(1, len(pos) - 1) * (pos",
        ("tests/test_budget.py::test_clip",), CPP,
    ),
    Mutant(
        "NT-Xent's mean", "three views' positives are summed, not averaged",
        f"{PACKAGE}/losses/nt_xent.py",
        "denominator - stacked.mean(dim=0)",
        "denominator - stacked.sum(dim=0)",
        (LOSSES,), f"{CPP} and nt_xent",
    ),
    Mutant(
        "NT-Xent's other view", "of three views, the second positive is met twice",
        f"{PACKAGE}/losses/nt_xent.py",
        "_other_view(k * n), _other_view(-k * n)",
        "_other_view(n), _other_view(-n)",
        (LOSSES,), f"{CPP} and nt_xent",
    ),
    Mutant(
        "SigLIP's sign", "a positive is pushed away",
        f"{PACKAGE}/losses/siglip.py",
        "own = cross_entropy(pos, pos.new_zeros",
        "own = cross_entropy(-pos, pos.new_zeros",
        (LOSSES,), f"{CPP} and siglip",
    ),
    Mutant(
        "SupCon's variant in", "the number of positives is left out of the logarithm",
        f"{PACKAGE}/losses/supcon.py",
        "(against + shared.clamp_min(1).to(against.dtype).log())",
        "(against)",
        (LOSSES,), f"{CPP} and supcon",
    ),
    Mutant(
        "partners not transposed", "the gradient of dot products takes a map of rows for its transpose",
        f"{PACKAGE}/ops/row_dots.py",
        "gained = transposed(g * part)",
        "gained = partners(g * part)",
        ("tests/test_row_dots.py",), "",
    ),
    Mutant(
        "SupCon's own feature", "a feature is among its own positives",
        f"{PACKAGE}/losses/supcon.py",
        "return terms.rows_at(sums, code) - z",
        "return terms.rows_at(sums, code)",
        (LOSSES,), f"{CPP} and supcon",
    ),
    Mutant(
        "margin's sign", "the margin helps the positive",
        f"{PACKAGE}/losses/info_nce.py",
        "pos = pos - margin if margin else pos",
        "pos = pos + margin if margin else pos",
        (LOSSES,), f"{CPP} and info_nce",
    ),
    Mutant(
        "FILIP's mask", "padding of the images counts",
        f"{PACKAGE}/losses/filip.py",
        "image_tokens, text_tokens, image_mask, text_mask, reduction=",
        "image_tokens, text_tokens, None, text_mask, reduction=",
        (LOSSES,), f"{CPP} and filip",
    ),
    Mutant(
        "max_sim's mean", "over all tokens, real or not",
        f"{PACKAGE}/ops/max_sim.py",
        "tokens.shape[1] if mask is None else",
        "tokens.shape[1] if True else",
        ("tests/test_max_sim.py::test_matches_float64",), "cpp",
    ),
    Mutant(
        "a rank's targets", "every process's positives are those of the first",
        f"{PACKAGE}/distributed/agreement.py",
        "torch.arange(self.first_row, self.first_row + self.rows[self.rank], device=device)",
        "torch.arange(self.rows[self.rank], device=device)",
        (WHOLE,), "2",
    ),
    Mutant(
        "gradients of a mean", "what DDP is going to average is not multiplied by the processes",
        f"{PACKAGE}/distributed/agreement.py",
        'self.world if self.batch.gradients == "mean" else 1',
        "1",
        ("tests/test_training.py::test_two_processes",), "DDP",
    ),
    Mutant(
        "merged maximum", "columns' sums are merged relative to the smallest maximum",
        f"{PACKAGE}/distributed/collectives.py",
        "dist.all_reduce(reference, dist.ReduceOp.MAX, group=group)",
        "dist.all_reduce(reference, dist.ReduceOp.MIN, group=group)",
        (WHOLE,), "2",
    ),
    Mutant(
        "ring's other way", "a block that passes by is taken for the opposite process's",
        f"{PACKAGE}/ops/ring.py",
        "owner = (agreed.rank - step) % agreed.world",
        "owner = (agreed.rank + step) % agreed.world",
        (WHOLE,), "3",
    ),
    Mutant(
        "tie order of rank", "of equal scores the later candidate is ahead",
        f"{PACKAGE}/core/order.py",
        "(tie & (columns < column))",
        "(tie & (columns > column))",
        ("tests/test_rank.py::test_order_is_total", "tests/test_rank.py::test_target_ranks_with_ties"),
        "reference or total",
    ),
    Mutant(
        "recall off by one", "the candidate after the first k counts",
        f"{PACKAGE}/evaluation/retrieval.py",
        "(ranks < k)",
        "(ranks <= k)",
        ("tests/test_retrieval.py::test_recall_and_median",), "cpp",
    ),
    Mutant(
        "zero-shot's prompts", "the mean of a class's prompts is not normalised",
        f"{PACKAGE}/evaluation/zero_shot.py",
        "            if normalize:\n                classes = F.normalize(classes, dim=-1)\n",
        "",
        ("tests/test_rank.py::test_zero_shot",), "cpp",
    ),
    Mutant(
        "rows beyond the budget", "more is kept than the memory budget allows",
        f"{PACKAGE}/core/memory.py",
        "min(m, 64 * budget // of_64)",
        "min(m, 128 * budget // of_64)",
        ("tests/test_max_sim.py::test_what_is_kept_is_one_byte_for_each_of_the_tokens",
         "tests/test_stats.py::test_any_memory_budget_gives_the_same"), "cpp",
    ),
]  # fmt: skip
