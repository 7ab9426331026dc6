"""Adapters against the libraries themselves, as ``make conformance`` installs them; skipped where they are not."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models and data are made here, not fetched


@pytest.fixture(params=["reference", "cpp"])
def backend(request: pytest.FixtureRequest) -> str:
    """The backends that need no GPU and no interpreter: kernels are compared elsewhere, adapters here."""
    return request.param
