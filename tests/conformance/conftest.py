"""Adapters against the libraries themselves, as ``make conformance`` installs them; skipped where they are not."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from fused_contrastive.ops import dispatch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models and data are made here, not fetched


@pytest.fixture(params=["reference", "cpp"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The backends that need no GPU and no interpreter: kernels are compared elsewhere, adapters here.

    The one that is named must have done the work, and no other: an adapter that leaves it to the library would agree
    with the library.
    """
    forwards: Counter[str] = Counter()
    for name in ("reference", "cpp"):
        module = dispatch.BACKENDS[name]
        for function in ("stats_forward", "row_loss", "max_sim_forward"):
            original = getattr(module, function)

            def counted(*args: Any, _original: Any = original, _name: str = name) -> Any:
                forwards[_name] += 1
                return _original(*args)

            monkeypatch.setattr(module, function, counted)
    yield request.param
    if request.node.get_closest_marker("may_not_run") is None:
        assert set(forwards) == {request.param}, f"forwards by backend: {dict(forwards)}"
