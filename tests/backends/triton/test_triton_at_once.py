"""Losses whose gradients the Triton backend forms in the forward: every option, over several rows of blocks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_contrastive as fc

pytest.importorskip("triton")

from fused_contrastive.backends.triton import at_once, device, launch

M, N, D = 100, 140, 20  # one full 64-row tile of the interpreter and a part of one; three tiles of columns

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "decoupled, normalised": {"decoupled": True, "normalize": True},
    "targets, margin": {"targets": True, "margin": 0.4},
    "ids, bias": {"row_ids": True, "col_ids": True, "col_bias": True},
}
# Relative to the largest gradient. The interpreter truncates to bfloat16 where a GPU rounds.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.6e-2, torch.float16: 5e-3}


@pytest.fixture(autouse=True)
def small(triton_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(at_once, "HELD_BYTES", 1)
    monkeypatch.setattr(at_once, "LEAST_TILES", 1)


def where() -> str:
    return "cpu" if device.INTERPRETED else "cuda"


def leaves_of(dtype: torch.dtype, sizes: tuple[int, int], scalars: dict[str, float]) -> dict[str, Tensor]:
    features = [F.normalize(torch.randn(size, D, device="cpu")).to(dtype) for size in sizes]
    named = dict(zip(("x", "y"), features, strict=True))
    return {**named, **{name: torch.tensor(value, device="cpu") for name, value in scalars.items()}}


def check(loss: Any, leaves: dict[str, Tensor], options: dict[str, Any], tolerance: float) -> None:
    """Compares the loss, and the gradients of 3 times the loss, with the reference in float64."""
    found: dict[str, dict[str, Tensor]] = {}
    for backend, dtype in (("triton", None), ("reference", torch.float64)):
        held = {name: t.detach().clone().to(where(), dtype).requires_grad_() for name, t in leaves.items()}
        positional, named = [held[name] for name in ("x", "y")], {k: v for k, v in held.items() if k not in ("x", "y")}
        result = loss(*positional, **named, **options, memory_budget=0, backend=backend)
        if backend == "triton":
            assert type(result.grad_fn).__name__ == "_GradientsInTheForwardBackward"
        (3 * result).backward()
        found[backend] = {"loss": result.detach().double(), **{k: v.grad.double() for k, v in held.items()}}
    for name, truth in found["reference"].items():
        largest = truth.abs().max()
        if name == "logit_scale":  # the sum of x . dx / scale over the rows, whose terms nearly cancel
            parts = (leaves["x"].double().to(where()) * found["reference"]["x"]).sum(dim=1) / leaves["logit_scale"]
            largest = torch.maximum(largest, parts.abs().sum())
        error = (found["triton"][name] - truth).abs().max() / largest
        exact = name == "loss" and "normalize" not in options  # otherwise unit features are rounded to their dtype
        assert error <= (1e-5 if exact else tolerance), f"{name}: {error:.1e}"


@pytest.mark.thinned("name", "dtype", everywhere=True)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_info_nce(name: str, dtype: torch.dtype) -> None:
    options = dict(CASES[name])
    leaves = leaves_of(dtype, (M, N), {"logit_scale": 9.0})
    if options.pop("col_bias", False):
        leaves["col_bias"] = torch.randn(N, device="cpu")
    if options.get("targets"):
        options["targets"] = torch.randint(N, (M,), device="cpu").to(where())
    for ids, size in (("row_ids", M), ("col_ids", N)):
        if options.get(ids):
            options[ids] = torch.randint(50, (size,), device="cpu").to(where())
    check(fc.info_nce_loss, leaves, options, TOLERANCE[dtype])


@pytest.mark.thinned("ids", "dtype", everywhere=True)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("ids", [False, True], ids=["pairs", "ids"])
def test_siglip(ids: bool, dtype: torch.dtype) -> None:
    leaves = leaves_of(dtype, (M, M), {"logit_scale": 10.0, "logit_bias": -10.0})
    labels = torch.arange(M, device=where()) // 3
    options = {"row_ids": labels, "col_ids": labels} if ids else {}
    check(fc.siglip_loss, leaves, options, TOLERANCE[dtype])


def test_far_normalisers() -> None:
    """Rows whose normalisers lie too far from their tile's references are computed again, also in held blocks."""
    leaves = leaves_of(torch.float16, (M, N), {"logit_scale": 1.0})
    leaves["x"] *= torch.logspace(-3, 3, M, device="cpu")[:, None].to(torch.float16)
    check(fc.info_nce_loss, leaves, {}, 5e-3)


def test_a_scaled_float16_loss_is_scaled_at_the_end() -> None:
    """Gradients have weight 1 / M, partly too small for float16, until the factor of a GradScaler multiplies them."""
    leaves = leaves_of(torch.float16, (M, N), {"logit_scale": 0.01})
    grads = []
    for dtype in (torch.float16, torch.float64):
        x, y = (leaves[name].detach().to(where(), dtype, copy=True).requires_grad_() for name in ("x", "y"))
        backend = "triton" if dtype == torch.float16 else "reference"
        loss = fc.info_nce_loss(x, y, logit_scale=0.01, memory_budget=0, backend=backend)
        (2.0**12 * loss).backward()
        grads.append(x.grad.double())
    assert (grads[0] - grads[1]).abs().max() <= 2e-3 * grads[1].abs().max()


def test_rows_of_blocks_are_whole_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """If y is long, fewer rows are held at once, but at least four of the largest tiles, and all rows are covered."""
    x = torch.zeros(5000, 4, dtype=torch.bfloat16, device=where())
    problem = launch.Prepared(fc.core.spec.StatsSpec(torch.tensor(1.0)), x, x[:300])
    monkeypatch.setattr(at_once, "HELD_BYTES", 2**20)
    rows = [blocks[0].rows for blocks in at_once._rows_of_blocks(problem)]
    assert rows[0].start == 0
    assert rows[-1].stop == 5000
    assert all(a.stop == b.start for a, b in itertools.pairwise(rows))
    assert all((r.stop - r.start) * 512 * 2 <= 2**20 for r in rows)
