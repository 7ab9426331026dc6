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


def test_the_readme_s_tables_are_the_benchmark_s() -> None:
    """Line by line what `make bench` wrote, for the machine that the page names; then ratios from three machines."""
    cost = (ROOT / "README.md").read_text().partition("## Cost")[2].partition("## ")[0]
    results = ROOT / "benchmarks/results"
    first, second = (lines.splitlines() for lines in re.findall(r"(?:^\|.*\n)+", cost, re.MULTILINE))
    measured = (results / "cpu.md").read_text().splitlines()
    assert len(first) >= 6
    for line in first:
        assert line in measured, line
    report = json.loads((results / "cpu.json").read_text())
    for fact in (report["provenance"]["date"], report["provenance"]["torch"].partition("+")[0]):
        assert fact in cost

    pages = [(results / f"{name}.md").read_text() for name in ("cpu", "cpu-zen5", "cpu-intel-amx")]
    assert len(second) >= 12
    for line in second[2:]:
        loss, n, *ratios = (cell.strip() for cell in line.strip("|").split("|"))
        name, _, dtype = loss.partition(", ")
        row = rf"\| {name} N = {n}, D = \d+, {dtype or 'fp32'} \| .* \| ([\d.]+) \|"
        found = [re.search(row, page) for page in pages]
        assert ratios == [match[1] if match else "" for match in found], line


@pytest.mark.parametrize("page", ["mathematics", "cost", "verify"])
def test_understanding(page: str) -> None:
    assert run_page(f"docs/{page}.md") >= 2


@pytest.mark.parametrize("page", PAGES)
def test_links(page: str) -> None:
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text()):
        if "://" not in link:
            assert (ROOT / Path(page).parent / link).exists(), f"{page}: {link}"
