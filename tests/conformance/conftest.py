"""Tests of the adapters against the libraries themselves, which ``make conformance`` installs; skipped without them."""

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
    """The backends that need neither a GPU nor an interpreter, because these tests compare adapters and not kernels.

    The named backend must have done the work, and no other: an adapter that leaves the work to the library would agree
    with the library.
    """
    forwards: Counter[str] = Counter()
    for name in ("reference", "cpp"):
        module = dispatch.BACKENDS[name]
        for function in ("stats_forward", "prefixes_forward", "row_loss", "max_sim_forward", "merge_top_k"):
            original = getattr(module, function)

            def counted(*args: Any, _original: Any = original, _name: str = name) -> Any:
                forwards[_name] += 1
                return _original(*args)

            monkeypatch.setattr(module, function, counted)
    yield request.param
    if request.node.get_closest_marker("may_not_run") is None:
        assert set(forwards) == {request.param}, f"forwards by backend: {dict(forwards)}"
