"""Pages' snippets run, and their links lead somewhere. Those that need other libraries are in conformance/."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from snippets import ROOT, run_page

PAGES = sorted(str(p.relative_to(ROOT)) for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")))


def test_readme() -> None:
    features = {name: F.normalize(torch.randn(12, 8), dim=-1).requires_grad_() for name in ("images", "texts")}
    prompts = F.normalize(torch.randn(6, 3, 8), dim=-1)
    assert run_page("README.md", {**features, "scale": torch.tensor(10.0), "class_prompts": prompts}) >= 2


def test_recipes() -> None:
    assert run_page("docs/adapters/recipes.md") >= 8


def test_distributed() -> None:
    assert run_page("docs/distributed.md") >= 1


def test_the_readme_s_table_is_the_benchmark_s() -> None:
    """Line by line what `make bench` wrote, for the machine and commit that the page names."""
    cost = (ROOT / "README.md").read_text().partition("## Cost")[2].partition("## ")[0]
    measured = (ROOT / "benchmarks/results/cpu.md").read_text()
    lines = [line for line in cost.splitlines() if line.startswith("|")]
    assert len(lines) >= 6
    for line in lines:
        assert line in measured.splitlines(), line
    report = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())
    for fact in (report["provenance"]["date"], report["provenance"]["torch"].partition("+")[0]):
        assert fact in cost


@pytest.mark.parametrize("page", ["mathematics", "cost", "verify"])
def test_understanding(page: str) -> None:
    assert run_page(f"docs/{page}.md") >= 2


@pytest.mark.parametrize("page", PAGES)
def test_links(page: str) -> None:
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text()):
        if "://" not in link:
            assert (ROOT / Path(page).parent / link).exists(), f"{page}: {link}"
