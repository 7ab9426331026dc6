"""The code before and after the change on each adapter's page runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from snippets import run_page

PAGES = [
    "open_clip",
    "transformers",
    "sentence_transformers",
    "lightly",
    "pytorch_metric_learning",
    "x_clip",
    "pylate",
    "colpali_engine",
]
MODULES = {"sentence_transformers": "sentence_transformers.sentence_transformer", "lightly": "lightly.loss"}  # imported


@pytest.mark.parametrize("page", PAGES)
def test_page(page: str) -> None:
    module = MODULES.get(page, page)
    pytest.importorskip(module, reason=f"{module} is not installed: make conformance")
    assert run_page(f"docs/adapters/{page}.md") >= 2
