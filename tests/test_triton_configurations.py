"""The shipped Triton configurations, compiled for each architecture on a machine that has none of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.torch_version import TorchVersion as Version

from fused_contrastive.backends import triton as triton_backend
from fused_contrastive.backends.triton import configs, device

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
    return f"{row['arch']} {row['source']} {row['kernel']} {row['reduction']}, options {row['options']}"


def test_every_architecture_is_there(compiled: list[dict[str, Any]]) -> None:
    assert {row["arch"] for row in compiled} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert {row["kernel"] for row in compiled} == {"statistics", "sums", "gradient", "kept"}


def test_shared_memory_fits(compiled: list[dict[str, Any]]) -> None:
    for row in compiled:
        assert row["shared"] <= row["shared_limit"], name(row)


def test_defaults_spill_no_registers(compiled: list[dict[str, Any]]) -> None:
    import triton

    if Version(triton.__version__) < Version("3.9"):
        pytest.skip(f"Triton {triton.__version__}: the table is of 3.9, what older ones spill is in docs/triton.md")
    for row in compiled:
        if row["options"] == "none":
            assert row["spilled"] == 0, name(row)


def test_matrix_units_are_used(compiled: list[dict[str, Any]]) -> None:
    """mma.sync, wgmma, tcgen05 and mfma; where the vendor GEMM gives the products, or sigmoids were kept, none."""
    for row in compiled:
        without = row["source"] == "given" or (row["kernel"], row["reduction"]) == ("kept", "softplus")
        assert (row["matrix_instructions"] > 0) == (not without), name(row)


def test_offsets_of_rows_are_64_bit(compiled: list[dict[str, Any]]) -> None:
    for row in compiled:
        assert not row["narrow_offsets"], f"{name(row)}: {row['narrow_offsets']}"


def test_the_page_shows_the_shipped_configurations() -> None:
    page = (ROOT / "docs/triton-configurations.md").read_text()
    for (arch, source, kernel), c in configs.CONFIGS.items():
        if arch != "interpreter":
            tile = f"{c.block_m} x {c.block_n} x {c.block_k} | {c.warps} | {c.stages}"
            reduction = "softplus" if kernel == "sums" else "softmax"
            assert f"| {arch} | {source} | {kernel} | {reduction} | none | {tile} |" in page, (
                f"{arch} {source} {kernel}: remake with make configurations"
            )


def fake_gpu(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int]) -> None:
    properties = types.SimpleNamespace(name=name, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)


@pytest.mark.parametrize(
    ("capability", "expected", "tma"),
    [((8, 0), "sm_80", False), ((8, 9), "sm_80", False), ((9, 0), "sm_90", True), ((10, 3), "sm_100", True),
     ((12, 0), "sm_80", False)],
)  # fmt: skip
def test_architecture_of_a_device(
    capability: tuple[int, int], expected: str, tma: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpu(monkeypatch, "some GPU", capability)
    found = device.of_cuda(torch.device("cuda", 0))
    assert (found.architecture, found.tma, found.multiprocessors) == (expected, tma, 132)


def test_too_old_a_gpu_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch, "Tesla T4", (7, 5))
    with pytest.raises(RuntimeError, match=r"cannot run on Tesla T4 \(compute capability 7.5\): it needs 8.0"):
        device.of_cuda(torch.device("cuda", 0))


def test_too_old_a_triton_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda package: "3.3.1")
    reason = triton_backend.unavailable()
    assert reason is not None
    assert "needs Triton 3.4 or later, and finds 3.3.1" in reason


def test_the_page_shows_the_prediction() -> None:
    result = subprocess.run(
        [sys.executable, ROOT / "benchmarks/roofline.py"], capture_output=True, text=True, check=True
    )
    assert result.stdout in (ROOT / "docs/triton.md").read_text(), "remake with python benchmarks/roofline.py"
