"""No observer outlives a test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fused_contrastive.core import observing


@pytest.fixture(autouse=True)
def nothing_left_over() -> Iterator[None]:
    yield
    assert not observing._of_eager.anywhere
    assert not observing._observers.anywhere
