"""The pages' snippets run, and their links exist. Pages that need other libraries are tested in conformance/."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from snippets import ROOT, run_page

PAGES = sorted(str(p.relative_to(ROOT)) for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")))


def features() -> dict[str, torch.Tensor]:
    return {name: F.normalize(torch.randn(12, 8), dim=-1) for name in ("images", "texts")}


def test_after_training() -> None:
    prompts = F.normalize(torch.randn(6, 3, 8), dim=-1)
    given = {**features(), "scale": torch.tensor(10.0), "class_prompts": prompts}
    assert run_page("docs/after-training.md", given) >= 1


def test_late_interaction() -> None:
    assert run_page("docs/late-interaction.md") >= 3


def test_recipes() -> None:
    assert run_page("docs/adapters/recipes.md") >= 8


def test_false_negatives() -> None:
    assert run_page("docs/false-negatives.md") >= 10


def test_hard_negatives() -> None:
    assert run_page("docs/hard-negatives.md") >= 6


def test_large_batches() -> None:
    assert run_page("docs/large-batches.md") >= 4


def test_groups() -> None:
    assert run_page("docs/groups.md") >= 3


def test_distributed() -> None:
    assert run_page("docs/distributed.md") >= 1


RESULTS = ROOT / "benchmarks/results"


def section(page: str, title: str) -> str:
    return (ROOT / page).read_text().partition(f"## {title}\n")[2].partition("\n## ")[0]


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each table, line by line; the second line, of dashes, is left out."""
    found = [table.splitlines() for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)]
    cells = [[[cell.strip() for cell in line.strip("|").split("|")] for line in table] for table in found]
    return [[head, *rows] for head, _, *rows in cells]


@pytest.mark.parametrize(("page", "title"), [("README.md", "Benchmark"), ("docs/cost.md", "Measured")])
def test_times_are_the_benchmark_s(page: str, title: str) -> None:
    """The table equals, cell by cell, what `make bench` wrote for the machine that the page names."""
    text = section(page, title)
    shown, measured = tables(text)[0], tables((RESULTS / "cpu.md").read_text())[0]
    assert len(shown) >= 5
    assert shown[0][0] == measured[0][0]
    times = {(line[0], n): time for line in measured[1:] for n, time in zip(measured[0][1:], line[1:], strict=True)}
    for line in shown[1:]:
        assert line[1:] == [times[line[0], n] for n in shown[0][1:]], line[0]
    report = json.loads((RESULTS / "cpu.json").read_text())
    for fact in (report["provenance"]["date"], report["provenance"]["torch"].partition("+")[0]):
        assert fact in text


def test_ratios_are_the_benchmark_s() -> None:
    """The table has them for three machines."""
    _, (_, *lines) = tables(section("docs/cost.md", "Measured"))
    pages = [(RESULTS / f"{name}.md").read_text() for name in ("cpu", "cpu-zen4", "cpu-zen5")]
    assert len(lines) >= 12
    for line in lines:
        name, _, dtype = line[0].partition(", ")
        row = rf"\| {name} N = {line[1]}, D = \d+, {dtype or 'fp32'} \| .* \| ([\d.]+) \|"
        found = [re.search(row, page) for page in pages]
        assert line[2:] == [match[1] if match else "" for match in found], line


@pytest.mark.parametrize("page", ["mathematics", "cost", "monitor", "verify"])
def test_understanding(page: str) -> None:
    assert run_page(f"docs/{page}.md") >= 2


@pytest.mark.parametrize("page", PAGES)
def test_links(page: str) -> None:
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text()):
        if "://" not in link:
            assert (ROOT / Path(page).parent / link).exists(), f"{page}: {link}"
