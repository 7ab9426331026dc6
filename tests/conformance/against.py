"""Compares a library's own class and ours on one problem: value and every gradient, under the error budget."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_contrastive.core.budget import allowed, difference
from fused_contrastive.testing.harness import evaluate

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def features(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Features near the unit sphere but not on it, so that normalising them changes the result."""
    unit = F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)
    return (unit * torch.empty(*shape[:-1], 1, dtype=torch.float64).uniform_(0.7, 1.4)).to(dtype)


def assert_same(
    theirs: Callable[..., Tensor], ours: Callable[..., Tensor], leaves: dict[str, Tensor], scale: float
) -> None:
    """|ours - theirs in float64| <= 2 |theirs - theirs in float64| + 8 eps (largest value + largest term).

    The library's own error is not used for the loss of half-precision inputs: ours, in float32, may be off by eps times
    the scale, the error that rounding a feature once more makes in a logit.
    """
    truth = evaluate(theirs, {name: t.double() for name, t in leaves.items()}, {})
    eager = evaluate(theirs, leaves, {})
    found = evaluate(ours, leaves, {})
    matrix = next(t for t in leaves.values() if t.dim() > 1)
    eps = torch.finfo(matrix.dtype).eps
    for name, value in found.items():
        leaf = leaves.get(name[1:])
        term = 4 * scale if leaf is None else 4.0 if leaf.dim() < 2 else 4 * scale / len(matrix)
        if matrix.dtype == torch.float64:  # the truth has the same dtype, and its own rounding
            term *= max(1.0, scale, len(matrix) ** 0.5)
        off_by = difference(eager[name], truth[name])
        most = allowed(off_by, matrix.dtype, truth[name].abs().max().item() + term)
        if leaf is None and eps > 1e-3:
            most = eps * scale
        error = difference(value, truth[name])
        assert error <= most, f"{name}: off by {error:.2g}, {most:.2g} allowed"


def assert_close_results(theirs: Tensor | dict | tuple, ours: Tensor | dict | tuple) -> None:
    """Compares whatever two calls return: keys or length, and values."""
    if isinstance(theirs, dict):
        assert list(theirs) == list(ours)
        theirs, ours = tuple(theirs.values()), tuple(ours.values())
    if isinstance(theirs, tuple):
        assert len(theirs) == len(ours)
        for a, b in zip(theirs, ours, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
        return
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
