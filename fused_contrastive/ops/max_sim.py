"""``max_sim``, late interaction: the operator, its one autograd formula and the public function.

With ``P[m, n, t, p] = x[m, t] . y[n, p]`` and the maxima at p*(m, n, t) and, in the other direction, t*(m, n, p):

    dx[m, t] = sum_n g_x[m, n] y[n, p*(m, n, t)] + sum over n and the p with t*(m, n, p) = t of g_y[m, n] y[n, p]

and dy likewise, so that the backward needs the argmaxima alone. A smooth maximum, ``tau logsumexp(P / tau)``, has the
weights ``w = softmax(P / tau)`` over p in their place, ``dx[m, t] = sum_n g_x[m, n] sum_p w[m, n, t, p] y[n, p]``.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from fused_contrastive.core import checks
from fused_contrastive.core.forks import guarded
from fused_contrastive.core.memory import rows_to_keep
from fused_contrastive.core.modes import is_plain, second_backward
from fused_contrastive.core.spec import BackendName, compute_dtype
from fused_contrastive.core.tokens import (
    MaxSimForward,
    MaxSimUpstream,
    TokenSpec,
    argmaxima,
    bytes_of_row,
    ordered,
)
from fused_contrastive.ops import dispatch, operands
from fused_contrastive.ops.packed import unpacked
from fused_contrastive.ops.problem import autocast
from fused_contrastive.ops.schema import library, without_autocast
from fused_contrastive.ops.transforms import register_formula, with_formula

REDUCTIONS = ("sum", "mean")
DIRECTIONS = ("x", "y", "both")
INPUTS = 8  # the number of arguments of max_sim_forward

# y is (N, P, D) for all pairs, or (M, K, P, D) where each item of x has K of its own; its mask has the same sizes.
_PROBLEM = "Tensor x, Tensor y, Tensor? x_mask, Tensor? y_mask, bool both, float smooth, SymInt kept_rows, str backend"
library.define(f"max_sim_forward({_PROBLEM}) -> (Tensor x_sums, Tensor y_sums, Tensor argmax_x, Tensor argmax_y)")
library.define(
    "max_sim_backward(Tensor? g_x, Tensor? g_y, Tensor argmax_x, Tensor argmax_y, bool[] needs, "
    f"{_PROBLEM}) -> (Tensor dx, Tensor dy)"
)


def _prepared(
    x: Tensor, y: Tensor, x_mask: Tensor | None, y_mask: Tensor | None, both: bool, smooth: float, kept_rows: int
) -> tuple[TokenSpec, Tensor]:
    """The problem and y as a backend takes them."""
    own = y.shape[1] if y.dim() == 4 else 0
    if own:
        y, y_mask = y.flatten(0, 1), None if y_mask is None else y_mask.flatten(0, 1)
    (x_order, x_lengths), (y_order, y_lengths) = ordered(x_mask), ordered(y_mask)
    return TokenSpec(x_lengths, y_lengths, both, kept_rows, own, smooth, x_order, y_order), y


def _forward(
    x: Tensor, y: Tensor, x_mask: Tensor | None, y_mask: Tensor | None, both: bool, smooth: float, kept_rows: int,
    backend: str,
) -> MaxSimForward:  # fmt: skip
    spec, items = _prepared(x, y, x_mask, y_mask, both, smooth, kept_rows)
    with without_autocast(x):
        return dispatch.BACKENDS[backend].max_sim_forward(spec, x, items)


def _backward_of_sums(
    g_x: Tensor | None, g_y: Tensor | None, argmax_x: Tensor, argmax_y: Tensor, needs: list[bool],
    x: Tensor, y: Tensor, x_mask: Tensor | None, y_mask: Tensor | None, both: bool, smooth: float, kept_rows: int,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Calls the backend. An operator must return tensors, so a gradient that is not needed has 0 elements."""
    spec, items = _prepared(x, y, x_mask, y_mask, both, smooth, kept_rows)
    nothing = x.new_empty(0)
    with without_autocast(x):
        dx, dy = dispatch.BACKENDS[backend].max_sim_backward(
            spec,
            x,
            items,
            saved=MaxSimForward(nothing, nothing, argmax_x, argmax_y),
            upstream=MaxSimUpstream(g_x, g_y if both else None),
            needs=(needs[0], needs[1]),
        )
    return x.new_empty(0) if dx is None else dx, x.new_empty(0) if dy is None else dy.view(y.shape)


def _forward_operator(*arguments: Any) -> MaxSimForward:
    """For callers by torch.ops, whose operands nothing has checked."""
    x, y, x_mask, y_mask, both, smooth, kept_rows, backend = arguments
    operands.tokens(x, y, (x_mask, y_mask), both, smooth, kept_rows, backend)
    return _forward(*arguments)


def _backward_operator(*arguments: Any) -> tuple[Tensor, Tensor]:
    g_x, g_y, argmax_x, argmax_y, needs, x, y, x_mask, y_mask, both, smooth, kept_rows, backend = arguments
    operands.tokens(x, y, (x_mask, y_mask), both, smooth, kept_rows, backend)
    saved = MaxSimForward(g_x, g_y, argmax_x, argmax_y)
    operands.tokens_saved(x, y, both, kept_rows, saved, MaxSimUpstream(g_x, g_y), needs)
    return _backward_of_sums(*arguments)


library.impl("max_sim_forward", _forward_operator, "CompositeExplicitAutograd")
library.impl("max_sim_backward", _backward_operator, "CompositeExplicitAutograd")


@torch.library.register_fake("fused_contrastive::max_sim_forward", lib=library)
def _fake_forward(x, y, x_mask, y_mask, both, smooth, kept_rows, backend):  # type: ignore[no-untyped-def]
    m, columns, dtype = x.shape[0], y.shape[-3], compute_dtype(x.dtype)
    y_sums = x.new_empty((m, columns) if both else (0, 0), dtype=dtype)
    return x.new_empty(m, columns, dtype=dtype), y_sums, *argmaxima(kept_rows, columns, x, y, both)


@torch.library.register_fake("fused_contrastive::max_sim_backward", lib=library)
def _fake_backward(g_x, g_y, argmax_x, argmax_y, needs, x, y, *rest):  # type: ignore[no-untyped-def]
    return tuple(t.new_empty(t.shape if asked else 0) for t, asked in zip((x, y), needs, strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, x_mask, y_mask, *ctx.options = inputs
    _, _, argmax_x, argmax_y = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(argmax_x, argmax_y)
    ctx.save_for_backward(x, y, x_mask, y_mask, argmax_x, argmax_y)


def _backward(ctx: Any, g_x: Tensor | None, g_y: Tensor | None, *_: None) -> tuple[Any, ...]:
    if g_x is None and g_y is None:
        return (None,) * INPUTS
    x, y, x_mask, y_mask, argmax_x, argmax_y = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:2])
    direct = is_plain(x) and not torch.is_grad_enabled()
    run = _backward_of_sums if direct else torch.ops.fused_contrastive.max_sim_backward
    dx, dy = run(g_x, g_y, argmax_x, argmax_y, needs, x, y, x_mask, y_mask, *ctx.options)
    return dx if needs[0] else None, dy if needs[1] else None, *(None,) * (INPUTS - 2)


_call = with_formula("max_sim_forward", _forward, _backward, _setup_context)
register_formula("max_sim_backward", second_backward)


class MaxSimScores(NamedTuple):
    """Scores in both directions; C is N, or K for items of y of x's own.

    Attributes:
        x: (M, C) maxima over y's tokens, reduced over x's.
        y: (M, C) maxima over x's tokens, reduced over y's.
    """

    x: Tensor
    y: Tensor


@overload
def max_sim(
    x_tokens: Tensor, y_tokens: Tensor, x_mask: Tensor | None = None, y_mask: Tensor | None = None, *,
    x_lengths: Tensor | None = None, y_lengths: Tensor | None = None, reduction: Literal["sum", "mean"] = "sum",
    direction: Literal["x", "y"] = "x", smooth: float | None = None,
    memory_budget: int | Literal["auto"] = "auto", backend: BackendName = "auto",
) -> Tensor: ...  # fmt: skip


@overload
def max_sim(
    x_tokens: Tensor, y_tokens: Tensor, x_mask: Tensor | None = None, y_mask: Tensor | None = None, *,
    x_lengths: Tensor | None = None, y_lengths: Tensor | None = None, reduction: Literal["sum", "mean"] = "sum",
    direction: Literal["both"], smooth: float | None = None,
    memory_budget: int | Literal["auto"] = "auto", backend: BackendName = "auto",
) -> MaxSimScores: ...  # fmt: skip


@guarded
def max_sim(
    x_tokens: Tensor,
    y_tokens: Tensor,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    *,
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
    reduction: Literal["sum", "mean"] = "sum",
    direction: Literal["x", "y", "both"] = "x",
    smooth: float | None = None,
    memory_budget: int | Literal["auto"] = "auto",
    backend: BackendName = "auto",
) -> Tensor | MaxSimScores:
    """Late-interaction scores without the tensor of their tokens' products: of all pairs, or with items of x's own.

    Every token of one item meets its best match among the other's::

        score[m, n] = sum over t of max over p of x_tokens[m, t] . y_tokens[n, p]       direction "x"
        score[m, n] = sum over p of max over t of x_tokens[m, t] . y_tokens[n, p]       direction "y"

    with the sum of ColBERT (Khattab & Zaharia 2020, arXiv:2004.12832) or the mean of FILIP (Yao et al. 2021,
    arXiv:2111.07783), over the tokens that the masks call real. Given y_tokens (M, K, P, D), item m of x is scored
    against its own K items alone: ``score[m, k]`` has y_tokens[m, k] in place of y_tokens[n]. That is the form of
    explicit negatives and of distillation (ColBERTv2: Santhanam et al. 2022, arXiv:2112.01488).

    With ``smooth`` = tau, ``tau * log(sum over p of exp(s / tau))`` stands in place of the maximum over p of the
    products s. It exceeds the maximum by at most tau log P, and approaches it as tau falls; its gradient goes to all
    tokens, by the softmax of s / tau.

    Differentiable once in both; if several products are equal, the first is the maximum and gets the gradient.

    Args:
        x_tokens: (M, T, D), M items of T tokens (ColBERT's queries), float32, float64, bfloat16 or float16. Not
            normalised here.
        y_tokens: (N, P, D) items to score all of them against (ColBERT's documents), or (M, K, P, D), K for each item
            of x; same dtype and device.
        x_mask, y_mask: (M, T) and (N, P) or (M, K, P) bool (or numbers 0 and 1), True for a real token; the others are
            ignored, whatever they hold. Default: all are real.
        reduction: "sum" or "mean", over the real tokens of x (direction "y": of y).
        direction: "x", "y" or "both", which takes the products once (twice with ``smooth`` or items of x's own).
        x_lengths, y_lengths: (M,) and (N,) int64, at least 0, how many tokens each item has, where the tokens come
            packed: x_tokens or y_tokens is then (rows, D), the items' tokens one after the other, without a mask. A
            padded copy of them is made. Lengths on a GPU are copied to the host, and they break a compiled graph.
        smooth: tau > 0, in the unit of the products. None: the maximum.
        memory_budget: bytes to keep for the backward, which needs only the index of each maximum: 1 byte for each of
            M * N * T (or M * K * T) maxima (2 if P > 256; direction "y": M * N * P maxima). What does not fit is
            computed again. "auto" is a sixteenth of the machine's memory, or a sixty-fourth of a GPU's. With ``smooth``
            nothing is kept.
        backend: as in ``contrastive_stats``.

    Returns:
        (M, N) or (M, K) scores in float32 (float64 for float64 tokens), under autocast too; MaxSimScores(x, y) for
        "both". Where an item of a pair has no real token its score is 0, with "mean" too, and its gradient zero. NaN
        and inf in real tokens propagate: a score is NaN where one of its products is, with ``smooth`` also where one
        is +inf.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or value.
        RuntimeError: the backend cannot run here; or a second derivative is needed.

    Under autocast, float32 tokens are cast to autocast's dtype as for a matmul; the products accumulate in float32.
    """
    x, y = autocast(x_tokens), autocast(y_tokens)
    x, x_mask = unpacked("x", x, x_lengths, x_mask)
    y, y_mask = unpacked("y", y, y_lengths, y_mask)
    checks.token_pair("x_tokens", x, "y_tokens", y, own=True)
    if x_mask is not None:
        x_mask = checks.mask("x_mask", x_mask, x.shape[:-1], "x_tokens", x)
    if y_mask is not None:
        y_mask = checks.mask("y_mask", y_mask, y.shape[:-1], "y_tokens", y)
    checks.one_of("reduction", reduction, REDUCTIONS)
    checks.one_of("direction", direction, DIRECTIONS)
    if smooth is not None:
        checks.divisor("smooth", smooth, x)
    checks.memory_budget(memory_budget)
    chosen = dispatch.resolve(backend, x.device, x.dtype)
    mean, own, tau = reduction == "mean", y.dim() == 4, float(smooth or 0)
    options = tau, memory_budget, chosen
    if direction == "both" and not own and not tau:
        x_sums, y_sums = _sums(x, y, x_mask, y_mask, True, *options)
        return (
            MaxSimScores(_mean(x_sums, x, x_mask), _mean(y_sums.T, y, y_mask).T)
            if mean
            else MaxSimScores(x_sums, y_sums)
        )

    def scores(x: Tensor, y: Tensor, x_mask: Tensor | None, y_mask: Tensor | None) -> Tensor:
        sums, _ = _sums(x, y, x_mask, y_mask, False, *options)
        return _mean(sums, x, x_mask) if mean else sums

    def other_way() -> Tensor:
        if not own:
            return scores(y, x, y_mask, x_mask).T
        m, k = y.shape[:2]  # each item of y has one of x
        repeated, mask = (None if t is None else t.repeat_interleave(k, dim=0)[:, None] for t in (x, x_mask))
        assert repeated is not None
        items, items_mask = y.flatten(0, 1), None if y_mask is None else y_mask.flatten(0, 1)
        return scores(items, repeated, items_mask, mask).view(m, k)

    if direction == "y":
        return other_way()
    of_x = scores(x, y, x_mask, y_mask)
    return of_x if direction == "x" else MaxSimScores(of_x, other_way())


def _sums(
    x: Tensor, y: Tensor, x_mask: Tensor | None, y_mask: Tensor | None, both: bool, smooth: float, budget: int | str,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    differentiable = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
    kept = 0
    if differentiable and not smooth:
        row = bytes_of_row(y.shape[-3], x, y, both)
        kept = rows_to_keep(x.shape[0], ((64, row), torch.uint8), budget, x.device)
    x_sums, y_sums, _, _ = _call(
        x, y, x_mask, y_mask, both, smooth, kept, backend, differentiable=differentiable
    )  # fmt: skip
    return x_sums, y_sums


def _mean(sums: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Sums over the real tokens of the items of the rows -> means; 0 where there are none."""
    return sums / (tokens.shape[1] if mask is None else mask.sum(dim=1, keepdim=True).clamp_min(1))
