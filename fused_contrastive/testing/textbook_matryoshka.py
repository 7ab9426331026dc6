"""The formula of nested prefixes: each by itself, from its columns of the features alone, and their weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fused_contrastive.testing.oracle import Logits

FEATURES = ("image_features", "text_features", "query", "key", "negatives")


def by_prefixes(formula: Callable[..., Any]) -> Callable[..., Any]:
    """A formula whose arguments have names, of each prefix if there are ``dims``."""

    def call(
        logits: Logits, dims: Sequence[int] | None = None, dim_weights: Sequence[float] | None = None, **arguments: Any
    ) -> Any:
        if dims is None:
            return formula(logits, **arguments)
        losses = []
        for dim, weight in zip(dims, dim_weights or [1.0] * len(dims), strict=True):
            own = {name: t[:, :dim] if name in FEATURES else t for name, t in arguments.items()}
            losses.append(weight * formula(logits, **own))
        return sum(losses)

    return call
