"""Adapters against the libraries themselves, as ``make conformance`` installs them; skipped where they are not."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["reference", "cpp"])
def backend(request: pytest.FixtureRequest) -> str:
    """The backends that need no GPU and no interpreter: kernels are compared elsewhere, adapters here."""
    return request.param
