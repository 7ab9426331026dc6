"""The formulas of groups: each group by itself, from its rows alone, and the reduction over the rows of all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_contrastive.testing.oracle import Logits


def by_groups(
    formula: Callable[..., Any], counted: Callable[..., Tensor] | None = None, reduces: bool = True
) -> Callable[..., Any]:
    """A formula whose arguments have names, of each group if there are ``lengths``.

    Tensors of at least one dimension are cut into the groups' rows. ``counted`` gives, from a group's arguments, what a
    mean divides by, summed over the groups; by default its rows, or the sum of its weights. Without ``reduces`` the
    formula has no reduction.
    """

    def call(logits: Logits, lengths: Tensor | None = None, **arguments: Any) -> Any:
        if lengths is None:
            return formula(logits, **arguments)
        arguments.pop("memory_budget", None)
        reduction = arguments.pop("reduction", "mean")
        of_each = {"reduction": "none"} if reduces else {}
        results, counts, first = [], [], 0
        for length in lengths.tolist():
            rows = slice(first, first + length)
            first += length
            if not length:
                continue
            own = {name: t[rows] if isinstance(t, Tensor) and t.dim() else t for name, t in arguments.items()}
            results.append(formula(logits, **own, **of_each))
            if counted is not None:
                counts.append(counted(**own))
            elif reduces:
                counts.append(own["weight"].sum() if "weight" in own else results[-1].new_tensor(len(results[-1])))
        if isinstance(results[0], dict):
            return {name: torch.cat([each[name] for each in results]) for name in results[0]}
        losses = torch.cat(results)
        if reduction == "none":
            return losses
        if reduction == "sum":
            return losses.sum()
        total = torch.stack(counts).sum()
        return losses.sum() / torch.where(total == 0, 1, total)

    return call


def with_positives(labels: Tensor, features: Tensor, no_positive: str = "skip", **_: Any) -> Tensor:
    """How many features of a group count in SupCon's mean."""
    views = features.shape[1] if features.dim() == 3 else 1
    shared = (labels[:, None] == labels).sum(dim=1) * views
    return ((shared > 1) | (no_positive == "zero")).sum() * views


def columns(options: dict[str, Any], m: int) -> Tensor:
    """(m,) the positives' columns among those of all groups."""
    targets, lengths = options.get("targets"), options.get("lengths")
    if targets is None:
        return torch.arange(m, device="cpu")
    whole: Tensor = targets if lengths is None else targets + (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    return whole
