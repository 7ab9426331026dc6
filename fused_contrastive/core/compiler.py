"""Marks functions for torch.compile without importing its compiler, which takes as long as importing torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def constant(function: F) -> F:
    """Like ``torch.compiler.assume_constant_result``: a trace calls the function, and its result is a constant."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def outside(reason: str) -> Callable[[F], F]:
    """Like ``torch.compiler.disable``: the function runs between two graphs; with fullgraph=True, that is an error."""

    def mark(function: F) -> F:
        function._torchdynamo_disable = True  # type: ignore[attr-defined]
        function._torchdynamo_disable_msg = f"fused_contrastive.{reason}"  # type: ignore[attr-defined]
        return function

    return mark
