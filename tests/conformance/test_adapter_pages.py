"""The before and after of each adapter's page."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from snippets import run_page

PAGES = ["open_clip", "transformers", "sentence_transformers", "lightly", "pytorch_metric_learning", "x_clip"]


@pytest.mark.parametrize("page", PAGES)
def test_page(page: str) -> None:
    pytest.importorskip(page, reason=f"{page} is not installed: make conformance")
    assert run_page(f"docs/adapters/{page}.md") >= 2
