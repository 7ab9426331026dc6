"""Packed tokens beside the same tokens padded and masked."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_contrastive import MaxSimScores, max_sim

D = 6


def padded(tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    items = torch.nn.utils.rnn.pad_sequence(list(tokens.split(lengths.tolist())), batch_first=True, padding_value=7.0)
    return items, torch.arange(items.shape[1]) < lengths[:, None]


@pytest.mark.thinned
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("smooth", [None, 0.3])
@pytest.mark.parametrize("direction", ["x", "y", "both"])
@pytest.mark.parametrize("sides", ["x", "y", "xy"])
def test_scores_and_gradients(
    sides: str, direction: Any, smooth: float | None, dtype: torch.dtype, backend: str
) -> None:
    x_lengths, y_lengths = torch.tensor([3, 0, 1, 5]), torch.tensor([2, 7, 4])
    x, y = (torch.randn(int(lengths.sum()), D, dtype=dtype).requires_grad_() for lengths in (x_lengths, y_lengths))
    of_x, of_y = padded(x, x_lengths), padded(y, y_lengths)
    options = {"direction": direction, "smooth": smooth, "reduction": "mean", "backend": backend}
    expected = max_sim(of_x[0], of_y[0], of_x[1], of_y[1], **options)
    named = {}
    if "x" in sides:
        named["x_lengths"] = x_lengths
    else:
        named["x_mask"] = of_x[1]
    if "y" in sides:
        named["y_lengths"] = y_lengths
    else:
        named["y_mask"] = of_y[1]
    found = max_sim(x if "x" in sides else of_x[0], y if "y" in sides else of_y[0], **named, **options)
    parts = zip(found, expected, strict=True) if isinstance(found, MaxSimScores) else [(found, expected)]
    for ours, theirs in parts:
        assert torch.equal(ours, theirs)
        gradients = [torch.autograd.grad((s**2).sum(), (x, y), retain_graph=True) for s in (ours, theirs)]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            assert a.any()


def test_items_without_tokens() -> None:
    x = torch.zeros(0, D, requires_grad=True)
    scores = max_sim(x, torch.randn(3, 4, D), x_lengths=torch.tensor([0, 0]))
    scores.sum().backward()
    assert torch.equal(scores, torch.zeros(2, 3))
    assert x.grad is not None
    assert x.grad.shape == (0, D)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x_lengths": torch.tensor([2, 2])}, ValueError, "x_lengths: got lengths that sum to 4, expected 5, the rows"),
        (
            {"x_lengths": torch.tensor([2**62] * 4 + [5])},
            ValueError,
            f"x_lengths: got a length of {2**62}, expected le",
        ),
        ({"x_lengths": torch.tensor([6, -1])}, ValueError, "x_lengths: got a length of -1, expected lengths of at lea"),
        ({"x_lengths": torch.tensor([2.0, 3.0])}, TypeError, "x_lengths: got dtype torch.float32, expected an int64 t"),
        ({"x_lengths": [2, 3]}, TypeError, "x_lengths: got list, expected an int64 tensor of shape (B,), the number o"),
        ({"x_mask": torch.ones(5).bool()}, ValueError, "x_mask: got it together with x_lengths, expected one of them"),
        ({"x_tokens": torch.zeros(2, 3, D)}, ValueError, "x_tokens: got shape (2, 3, 6) with x_lengths, expected a te"),
        ({"x_tokens": None}, ValueError, "x_tokens: got NoneType with x_lengths, expected a tensor (rows, D)"),
        ({"y_lengths": torch.tensor([3])}, ValueError, "y_tokens: got shape (2, 4, 6) with y_lengths, expected a tens"),
        ({"x_lengths": None}, ValueError, "x_tokens: got shape (5, 6), expected "),
    ],
    ids=str,
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"x_tokens": torch.zeros(5, D), "y_tokens": torch.zeros(2, 4, D), "x_lengths": torch.tensor([2, 3])}
    with pytest.raises(error, match="^" + re.escape(message)):
        max_sim(**{**given, **change})
