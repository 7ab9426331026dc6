"""Collectives for processes with different numbers of rows, some with a gradient. All of a group call each one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None

# (n, ...) of each process -> (world * n, ...); torch 2.13 renamed it.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_gather_rows(rows: Tensor, sizes: Sequence[int], group: Group) -> Tensor:
    """(n, ...) here, ``sizes`` everywhere -> (N, ...), process by process."""
    most, rest = max(sizes), rows.shape[1:]
    ours = rows.contiguous()
    if len(ours) < most:
        ours = torch.cat((ours, ours.new_zeros(most - len(ours), *rest)))
    everywhere = ours.new_empty(len(sizes) * most, *rest)
    all_gather_single(everywhere, ours, group=group)
    if min(sizes) == most:
        return everywhere
    return torch.cat([part[:size] for part, size in zip(everywhere.split(most), sizes, strict=True)])


def reduce_scatter_rows(rows: Tensor, sizes: Sequence[int], rank: int, group: Group) -> Tensor:
    """(N, ...) here and in every process -> (n, ...): the sum over processes of the rows that are this one's.

    It sends as many bytes as a reduce-scatter, but sums half-precision rows in float32, and in a fixed order.
    """
    own, rest = sizes[rank], rows.shape[1:]
    received = rows.new_empty(len(sizes) * own, *rest)
    dist.all_to_all_single(received, rows.contiguous(), [own] * len(sizes), list(sizes), group=group)
    parts = received.view(len(sizes), own, *rest)
    wide = torch.float32 if rows.dtype in (torch.float16, torch.bfloat16) else rows.dtype
    return parts.sum(dim=0, dtype=wide).to(rows.dtype)


def merge_log_sums(partial: Tensor, exact: bool, group: Group) -> Tensor:
    """(N,) logs of each process's sums -> logs of the sums over processes, by two all-reduces of 4 N bytes.

    The reference that is subtracted before exp may be any number near the maximum, so float32 serves; ``exact`` sends
    the sums in the statistics' dtype, for float64 features.
    """
    reference = partial.to(torch.float32, copy=True)
    dist.all_reduce(reference, dist.ReduceOp.MAX, group=group)
    limit = torch.finfo(torch.float32).max
    reference = reference.clamp(-limit, limit).to(partial.dtype)
    sums = (partial - reference).exp()
    sums = sums if exact else sums.float()
    dist.all_reduce(sums, group=group)
    return sums.to(partial.dtype).log() + reference


def largest(values: Tensor, group: Group) -> Tensor:
    """The elementwise maximum over processes."""
    values = values.clone()
    dist.all_reduce(values, dist.ReduceOp.MAX, group=group)
    return values


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: Sequence[int], rank: int, group: Group) -> Tensor:
        ctx.options = sizes, rank, group
        return all_gather_rows(rows, sizes, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return reduce_scatter_rows(gradient, *ctx.options), None, None, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Group) -> Tensor:
        ctx.group = group
        total = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _MergeLogSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, exact: bool, group: Group) -> Tensor:
        ctx.group = group
        merged = merge_log_sums(partial, exact, group)
        ctx.save_for_backward(partial, merged)
        return merged

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        partial, merged = ctx.saved_tensors
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        share = (partial - merged).exp().masked_fill(partial == -torch.inf, 0)
        return gradient * share, None, None


class _ReportLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, factor: float, group: Group) -> Tensor:
        ctx.factor = factor
        total = part.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return gradient * ctx.factor, None, None


def all_gather_with_gradient(rows: Tensor, sizes: Sequence[int], rank: int, group: Group) -> Tensor:
    """``all_gather_rows`` with a gradient: a row's gradient is the sum of all processes' gradients for it."""
    result: Tensor = _AllGather.apply(rows, sizes, rank, group)  # type: ignore[no-untyped-call]
    return result


def all_reduce(value: Tensor, group: Group) -> Tensor:
    """The sum over processes. All of them use it, so its gradient is the sum of their gradients."""
    result: Tensor = _AllReduce.apply(value, group)  # type: ignore[no-untyped-call]
    return result


def merge_log_sums_with_gradient(partial: Tensor, exact: bool, group: Group) -> Tensor:
    """``merge_log_sums`` with a gradient."""
    result: Tensor = _MergeLogSums.apply(partial, exact, group)  # type: ignore[no-untyped-call]
    return result


def report_loss(part: Tensor, factor: float, group: Group) -> Tensor:
    """The sum over processes of their parts of the loss; a process's own part gets the gradient times ``factor``."""
    result: Tensor = _ReportLoss.apply(part, factor, group)  # type: ignore[no-untyped-call]
    return result
