"""The loss on the statistics as one node of the graph: one launch forward (two for long vectors), one backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_contrastive.backends.triton import device
from fused_contrastive.backends.triton.tiles import log1p_unit
from fused_contrastive.core.reduction import Reduction

BLOCK = 1024
BLOCKS_PER_PROGRAM = 16


@triton.jit
def _loss(normaliser, pos, DECOUPLED: tl.constexpr):
    """-log(e^pos / (e^pos + e^normaliser)) = softplus(normaliser - pos); decoupled: normaliser - pos."""
    z = normaliser - pos
    if not DECOUPLED:  # a NaN in z comes through in exp(-|z|)
        z = tl.where(z > 0, z, 0.0) + log1p_unit(tl.exp(-tl.abs(z)))
    return z


@triton.jit
def _slope(normaliser, pos, DECOUPLED: tl.constexpr):
    """The loss's derivative by the normaliser: sigmoid(normaliser - pos)."""
    z = normaliser - pos
    slope = tl.where(z == z, 1.0, z)
    if not DECOUPLED:
        e = tl.exp(-tl.abs(z))
        slope = tl.where(z > 0, 1.0, e) / (1.0 + e)
    return slope


@triton.jit(do_not_specialize=["M", "averaged"])
def _forward(
    pos, first, second, losses, sums, M, averaged,
    DECOUPLED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Writes each row's loss, summed over directions and divided by ``averaged``.

    It goes to ``losses`` (M,), or the sum of each program's rows to ``sums`` (programs,). ``averaged`` is an
    integer because Triton would pass a floating-point weight as float32.
    """
    weight = 1.0 / averaged.to(tl.float64)
    begin = tl.program_id(0).to(tl.int64) * BLOCK * BLOCKS
    total = tl.zeros((BLOCK,), tl.float64)
    for block in range(min(BLOCKS, tl.cdiv(M - begin, BLOCK))):
        i = begin + block * BLOCK + tl.arange(0, BLOCK)
        inside = i < M
        p = tl.load(pos + i, mask=inside, other=0.0)
        loss = _loss(tl.load(first + i, mask=inside, other=0.0), p, DECOUPLED)
        if second is not None:
            loss += _loss(tl.load(second + i, mask=inside, other=0.0), p, DECOUPLED)
        if losses is not None:
            tl.store(losses + i, (loss * weight).to(losses.dtype.element_ty), mask=inside)
        total += tl.where(inside, loss, 0.0)
    if sums is not None:
        tl.store(sums + tl.program_id(0), (tl.sum(total, axis=0) * weight).to(sums.dtype.element_ty))


@triton.jit(do_not_specialize=["M", "averaged"])
def _backward(
    pos, first, second, g, g_pos, g_first, g_second, M, averaged, DECOUPLED: tl.constexpr, EACH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of pos and the normalisers. g has one element for each row (EACH) or one for all."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < M
    weight = 1.0 / averaged.to(tl.float64)
    by = (tl.load(g + i, mask=inside, other=0.0) if EACH else tl.load(g)).to(tl.float64) * weight
    p = tl.load(pos + i, mask=inside, other=0.0)
    slope = _slope(tl.load(first + i, mask=inside, other=0.0), p, DECOUPLED) * by
    tl.store(g_first + i, slope, mask=inside)
    to_pos = -slope
    if second is not None:
        slope = _slope(tl.load(second + i, mask=inside, other=0.0), p, DECOUPLED) * by
        tl.store(g_second + i, slope, mask=inside)
        to_pos -= slope
    tl.store(g_pos + i, to_pos, mask=inside)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pos: Tensor, first: Tensor, second: Tensor | None, decoupled: bool, reduction: Reduction,
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        pos, first = pos.contiguous(), first.contiguous()
        second = None if second is None else second.contiguous()
        ctx.save_for_backward(pos, first, second)
        m = pos.shape[0]
        ctx.averaged = (1 if second is None else 2) * (m if reduction == "mean" else 1)
        ctx.flags = {"DECOUPLED": decoupled, "BLOCK": BLOCK, "enable_fp_fusion": True}
        programs = triton.cdiv(m, BLOCK * BLOCKS_PER_PROGRAM)
        each = reduction == "none"
        losses = pos.new_empty(m, dtype=dtype) if each else None
        sums = None if each else pos.new_empty(programs, dtype=dtype if programs == 1 else torch.float64)
        with device.current(pos.device):
            _forward[(programs,)](
                pos, first, second, losses, sums, m, ctx.averaged, BLOCKS=BLOCKS_PER_PROGRAM, **ctx.flags
            )
        if losses is not None:
            return losses
        assert sums is not None
        return sums.view(()) if programs == 1 else sums.sum().to(dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        pos, first, second = ctx.saved_tensors
        pos, first, second = pos.contiguous(), first.contiguous(), second if second is None else second.contiguous()
        if torch.is_grad_enabled():  # for a second derivative, which needs operations that autograd records
            return (*_recorded(pos, first, second, g / ctx.averaged, ctx.flags["DECOUPLED"]), None, None, None)
        g_pos, g_first = torch.empty_like(pos), torch.empty_like(pos)
        g_second = None if second is None else torch.empty_like(pos)
        each = g.dim() == 1
        m = pos.shape[0]
        with device.current(pos.device):
            _backward[(triton.cdiv(m, BLOCK),)](
                pos, first, second, g.contiguous(), g_pos, g_first, g_second, m, ctx.averaged, EACH=each, **ctx.flags
            )
        return g_pos, g_first, g_second, None, None, None


def _recorded(
    pos: Tensor, first: Tensor, second: Tensor | None, g: Tensor, decoupled: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same gradients as operations that can be differentiated."""

    def slope(normaliser: Tensor) -> Tensor:
        return g * (torch.ones_like(pos) if decoupled else (normaliser - pos).sigmoid())

    g_first, g_second = slope(first), None if second is None else slope(second)
    return -g_first if g_second is None else -g_first - g_second, g_first, g_second


def cross_entropy(
    pos: Tensor, normalisers: Sequence[Tensor], decoupled: bool, reduction: Reduction, dtype: torch.dtype
) -> Tensor:
    """``Backend.cross_entropy``. The loss is a mean over the normalisers, so more than two are taken in pairs."""
    if len(normalisers) <= 2:
        return _node(pos, normalisers, decoupled, reduction, dtype)
    pairs = [normalisers[i : i + 2] for i in range(0, len(normalisers), 2)]
    losses = [len(pair) * _node(pos, pair, decoupled, reduction, torch.float64) for pair in pairs]
    return (torch.stack(losses).sum(dim=0) / len(normalisers)).to(dtype)


def _node(
    pos: Tensor, normalisers: Sequence[Tensor], decoupled: bool, reduction: Reduction, dtype: torch.dtype
) -> Tensor:
    first, *rest = normalisers
    second = rest[0] if rest else None
    return _CrossEntropy.apply(pos, first, second, decoupled, reduction, dtype)  # type: ignore[no-any-return]
