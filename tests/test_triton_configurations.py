"""The shipped Triton configurations, compiled for each architecture on a machine that has none of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """In a process of its own: here, Triton interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, ROOT / "benchmarks/configurations.py", "--json"],
        capture_output=True, text=True, timeout=1200, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows: list[dict[str, Any]] = json.loads(result.stdout)
    return rows


def name(row: dict[str, Any]) -> str:
    return f"{row['arch']} {row['source']} {row['kernel']}, options {row['options']}"


def test_every_architecture_is_there(compiled: list[dict[str, Any]]) -> None:
    assert {row["arch"] for row in compiled} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert {row["kernel"] for row in compiled} == {"statistics", "gradient", "kept"}


def test_shared_memory_fits(compiled: list[dict[str, Any]]) -> None:
    for row in compiled:
        assert row["shared"] <= row["shared_limit"], name(row)


def test_defaults_spill_no_registers(compiled: list[dict[str, Any]]) -> None:
    for row in compiled:
        if row["options"] == "none":
            assert row["spilled"] == 0, name(row)


def test_matrix_units_are_used(compiled: list[dict[str, Any]]) -> None:
    """mma.sync, wgmma, tcgen05 and mfma; where the vendor GEMM gives the products, none."""
    for row in compiled:
        assert (row["matrix_instructions"] > 0) == (row["source"] != "given"), name(row)


def test_offsets_of_rows_are_64_bit(compiled: list[dict[str, Any]]) -> None:
    for row in compiled:
        assert not row["narrow_offsets"], f"{name(row)}: {row['narrow_offsets']}"


def test_the_page_shows_the_shipped_configurations() -> None:
    from fused_contrastive.backends.triton.configs import CONFIGS

    page = (ROOT / "docs/triton-configurations.md").read_text()
    for (arch, source, kernel), c in CONFIGS.items():
        if arch != "interpreter":
            tile = f"{c.block_m} x {c.block_n} x {c.block_k} | {c.warps} | {c.stages}"
            assert f"| {arch} | {source} | {kernel} | none | {tile} |" in page, (
                f"{arch} {source} {kernel}: remake with make configurations"
            )


def test_the_page_shows_the_prediction() -> None:
    result = subprocess.run(
        [sys.executable, ROOT / "benchmarks/roofline.py"], capture_output=True, text=True, check=True
    )
    assert result.stdout in (ROOT / "docs/triton.md").read_text(), "remake with python benchmarks/roofline.py"
