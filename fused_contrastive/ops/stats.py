"""``contrastive_stats``: the public form of the primitive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fused_contrastive.core import checks
from fused_contrastive.core.memory import rows_to_keep
from fused_contrastive.core.spec import autocast_enabled, compute_dtype
from fused_contrastive.ops import autograd, dispatch


class ContrastiveStats(NamedTuple):
    """Statistics of the similarity matrix; None for a direction that was not asked."""

    pos: Tensor  # (M,) the positives' logits
    row: Tensor | None  # (M,) log of the sum of exp over each row's logits that are not excluded
    col: Tensor | None  # (N,) likewise over each column's


def contrastive_stats(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor = 1.0,
    *,
    targets: Tensor | None = None,
    col_bias: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    exclude_self: bool = False,
    directions: Sequence[Literal["row", "col"]] = ("row", "col"),
    memory_budget: int | Literal["auto"] = "auto",
    backend: str = "auto",
) -> ContrastiveStats:
    """Positives and masked denominators of a similarity matrix that is never stored, in one fused pass.

    With logits ``S[i, j] = scale * x[i] . y[j] + col_bias[j]`` and the positive of row i in column t(i)::

        pos[i] = S[i, t(i)]                         NaN where that is +inf, as softmax has it
        row[i] = log sum over j of exp S[i, j]      the positive and all excluded pairs left out
        col[j] = log sum over i of exp S[i, j]      likewise

    The contrastive losses are vector arithmetic on these: InfoNCE (van den Oord et al. 2018, CLIP: Radford et al.
    2021) is the mean of ``softplus(row - pos)``, decoupled contrastive learning (Yeh et al. 2022) of ``row - pos``.
    Differentiable once in x, y, scale and col_bias.

    Args:
        x: (M, D) row features, float32, float64, bfloat16 or float16. Not normalised here.
        y: (N, D) column features, same dtype and device.
        scale: multiplies the products (an inverse temperature); a number or a 0-d tensor, which gets a gradient.
        targets: (M,) int64, the column of each row's positive. Default: t(i) = i, which needs M <= N.
        col_bias: (N,) added to each column's logits, with a gradient; -inf marks a column as empty.
        row_ids, col_ids: (M,) and (N,) int64; pairs with equal ids (false negatives, duplicates) are excluded.
        exclude_self: exclude S[i, i], for x is y.
        directions: which of "row" and "col" to compute.
        memory_budget: bytes to keep for the backward: 0 recomputes all products (4 matrix products for forward and
            backward), enough for M * N of them (4 bytes each; on a GPU 2 for half-precision features) saves one
            product, anything between saves a part of it. "auto" is a sixteenth of the machine's memory, of a GPU's a
            sixty-fourth.
        backend: "cpp" (CPU), "triton" (NVIDIA and AMD GPUs; not float64), "reference" (plain torch, any device), or
            "auto": "cpp" for CPU tensors, "triton" for GPU tensors but "reference" for float64 ones, elsewhere
            "reference".

    Returns:
        ContrastiveStats(pos (M,), row (M,), col (N,)) in float64 (float32 on devices without it), whatever the
        features: they are differences of large logarithms waiting to happen. Where nothing is left in a row, row is
        -inf.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or value.
        RuntimeError: the backend cannot run here; or a second derivative is asked.

    Under autocast, float32 features are cast to autocast's dtype as for a matmul; the products accumulate in float32.
    """
    x, y = autocast(x), autocast(y)
    checks.feature_pair("x", x, "y", y)
    m, n, dtype = x.shape[0], y.shape[0], compute_dtype(x.dtype)
    rows, cols = checks.directions(directions)
    checks.memory_budget(memory_budget)
    if targets is not None:
        checks.vector("targets", targets, m, x, of="one column index per row", integer=True)
    elif m > n:
        raise ValueError(f"targets: got None for M = {m} rows and N = {n} columns, expected targets because M > N")
    if col_bias is not None:
        checks.vector("col_bias", col_bias, n, x, of="one per column", integer=False)
        col_bias = col_bias.to(dtype)
    if (row_ids is None) != (col_ids is None):
        raise ValueError("row_ids, col_ids: got only one of them, expected both or neither")
    if row_ids is not None:
        checks.vector("row_ids", row_ids, m, x, of="one per row", integer=True)
        checks.vector("col_ids", col_ids, n, x, of="one per column", integer=True)
    if not isinstance(exclude_self, bool):
        raise TypeError(f"exclude_self: got {exclude_self!r}, expected True or False")
    scale = _scale(scale, x, dtype)

    chosen = dispatch.resolve(backend, x.device, x.dtype)
    differentiable = torch.is_grad_enabled() and (
        x.requires_grad or y.requires_grad or scale.requires_grad or (col_bias is not None and col_bias.requires_grad)
    )
    kept = 0
    if differentiable:
        kept = rows_to_keep(m, lambda rows: dispatch.BACKENDS[chosen].kept(rows, n, x.dtype), memory_budget, x.device)
    pos, row, col, _ = autograd.stats_forward(
        x, y, scale, targets, col_bias, row_ids, col_ids, exclude_self, rows, cols, kept, chosen,
        differentiable=differentiable,
    )  # fmt: skip
    return ContrastiveStats(pos, row if rows else None, col if cols else None)


def autocast(features: Tensor) -> Tensor:
    """What autocast does to the operands of a matmul."""
    if not isinstance(features, Tensor) or not autocast_enabled(features.device):
        return features
    casts = features.is_floating_point() and features.dtype != torch.float64
    return features.to(torch.get_autocast_dtype(features.device.type)) if casts else features


def _scale(scale: float | Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    checks.scalar("scale", scale)
    if not isinstance(scale, Tensor):
        return x.new_full((), scale, dtype=dtype)
    return scale.to(device=x.device, dtype=dtype)
