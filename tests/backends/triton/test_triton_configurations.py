"""The shipped Triton configurations, compiled for each architecture without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from snippets import ROOT
from torch.torch_version import TorchVersion as Version

from fused_contrastive.backends import triton as triton_backend
from fused_contrastive.backends.triton import configs, device
from fused_contrastive.core import memory

KINDS = ("--kind", "statistics", "prefixes", "max_sim")
EVERYTHING = [(*KINDS, "--arch", "sm_90", "sm_80"), (*KINDS, "--arch", "gfx942", "sm_100")]
EACH_ONCE = [(*KINDS, "--source", "half", "--plain", "--arch", "sm_90")]


@pytest.fixture(scope="module")
def compiled(pytestconfig: pytest.Config) -> list[dict[str, Any]]:
    """Compiled in separate processes, because in this one Triton interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])

    def run(options: tuple[str, ...]) -> list[dict[str, Any]]:
        command = [sys.executable, ROOT / "tools/configurations.py", "--json", *options]
        result = subprocess.run(command, capture_output=True, text=True, timeout=3600, env=environment)
        assert result.returncode == 0, result.stderr
        rows: list[dict[str, Any]] = json.loads(result.stdout)
        return rows

    jobs = EVERYTHING if pytestconfig.getoption("full") else EACH_ONCE
    with ThreadPoolExecutor(2) as pool:
        return [row for rows in pool.map(run, jobs) for row in rows]


def name(row: dict[str, Any]) -> str:
    return f"{row['arch']} {row['source']} {row['kernel']}, options {row['options']}"


def test_every_architecture_and_kernel_is_there(compiled: list[dict[str, Any]], full: bool) -> None:
    assert {row["arch"] for row in compiled} == {"sm_90", *(["gfx942", "sm_80", "sm_100"] if full else [])}
    assert {row["kernel"].split(",")[0] for row in compiled} == {
        "strip_statistics", "exact_statistics", "gradient", "gradient_of_kept", "exact_gradient", "sigmoid_statistics",
        "sigmoid_gradient", "prefix_statistics", "prefix_gradients", "max_sim maxima", "max_sim gradient",
        "max_sim smooth_gradient",
    }  # fmt: skip


def test_shared_memory_fits(compiled: list[dict[str, Any]]) -> None:
    for row in compiled:
        assert row["shared"] <= row["shared_limit"], name(row)


def test_defaults_spill_no_registers(compiled: list[dict[str, Any]]) -> None:
    import triton

    if Version(triton.__version__) < Version("3.6"):
        pytest.skip(f"Triton {triton.__version__}: what it spills is in docs/triton.md")
    spilling = []
    for row in compiled:
        again = row["source"] == "half" and row["kernel"].startswith("exact")  # computes again what is lost or far
        # Two products at once, or an item's own tokens; on sm_90, half features leave room for both.
        large = "smooth" in row["options"] or "own" in row["options"]
        large &= (row["source"], row["arch"]) != ("half", "sm_90")
        if row["options"] != "every" and not again and row["spilled"] > (8 if large else 0):
            spilling.append(f"{name(row)}: {row['spilled']}")
    assert not spilling


# Instructions per logit on sm_90 without options, with an allowance of some percent above Triton 3.6's and 3.9's.
MOST_INSTRUCTIONS = {
    "strip_statistics": 7.05, "strip_statistics, keeping": 8.5, "gradient": 6.3, "gradient_of_kept": 6.3,
    "sigmoid_statistics": 12.0, "sigmoid_statistics, keeping": 16.5,
    "prefix_statistics": 12.2, "prefix_gradients": 17.3,
}  # fmt: skip


@pytest.mark.parametrize("kernel", MOST_INSTRUCTIONS)
def test_instructions_per_logit(kernel: str, compiled: list[dict[str, Any]]) -> None:
    (row,) = (
        row for row in compiled
        if (row["arch"], row["source"], row["options"], row["kernel"]) == ("sm_90", "half", "none", kernel)
    )  # fmt: skip
    assert 0 < row["instructions_per_logit"] <= MOST_INSTRUCTIONS[kernel]


def test_tiles_are_stored_widely(compiled: list[dict[str, Any]]) -> None:
    """By the tensor memory accelerator where there is one, else 16 bytes at a time; never single elements."""
    stored = 0
    for row in compiled:
        kernel = row["kernel"]
        of_g = kernel.startswith(("gradient", "exact_gradient", "sigmoid_gradient", "prefix_gradients"))
        tiles = of_g or "keeping" in kernel
        if not tiles or row["arch"] == "gfx942" or "tokens" in row["options"]:
            continue
        stored += 1
        accelerated = row["arch"] != "sm_80" and row["source"] == "half" and not kernel.startswith(("exact", "prefix"))
        assert any(store.startswith("UTMASTG" if accelerated else "STG.E.128") for store in row["stores"]), name(row)
        assert not any(store.startswith(("STG.E.U8", "STG.E.U16")) for store in row["stores"]), name(row)
    assert stored >= 8


def test_matrix_units_are_used(compiled: list[dict[str, Any]]) -> None:
    """Kernels use mma.sync, wgmma, tcgen05 or mfma, unless their products were given or kept."""
    for row in compiled:
        without = not row["multiplies"] or (row["source"] == "gemm" and row["arch"] != "gfx942")
        assert (row["matrix_instructions"] > 0) == (not without), name(row)


def test_offsets_of_rows_are_64_bit(compiled: list[dict[str, Any]]) -> None:
    for row in compiled:
        assert not row["narrow_offsets"], f"{name(row)}: {row['narrow_offsets']}"


def test_the_page_shows_the_shipped_configurations() -> None:
    page = (ROOT / "docs/triton-configurations.md").read_text()
    kernels = {"statistics": "strip_statistics", "sums": "sigmoid_statistics", "kept": "gradient_of_kept"}
    for (arch, source, kernel), c in configs.CONFIGS.items():
        if arch != "interpreter" and (arch, source) != ("gfx942", "tf32"):
            shown = kernels.get(kernel, kernel)
            if source != "half" and kernel in ("statistics", "gradient"):
                shown = f"exact_{kernel}"
            tile = f"{c.block_m} x {c.block_n} x {c.block_k} | {c.warps} | {c.stages}"
            assert f"| {arch} | {source} | {shown} | none | {tile} |" in page, (
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
    reason = triton_backend.BACKEND.unavailable()
    assert reason is not None
    assert "needs Triton 3.4 or later, and finds 3.3.1" in reason


def test_the_page_shows_the_prediction() -> None:
    result = subprocess.run([sys.executable, ROOT / "tools/roofline.py"], capture_output=True, text=True, check=True)
    assert result.stdout in (ROOT / "docs/triton.md").read_text(), "remake with python tools/roofline.py"
    assert f"from D = {memory.LEAST_D} on" in result.stdout, "what is kept by default follows another prediction"
