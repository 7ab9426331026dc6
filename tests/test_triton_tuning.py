"""FUSED_CONTRASTIVE_AUTOTUNE=1: measures, says what it chose, and remembers it on disk. Under Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fused_contrastive.backends.triton import configs

CODE = """
import torch
from fused_contrastive import clip_loss
x, y = (torch.randn(70, 20).to(torch.bfloat16).requires_grad_() for _ in range(2))
before = torch.get_rng_state()
for budget in (0, 10**6):
    loss = clip_loss(x, y, 5.0, backend="triton", memory_budget=budget)
    loss.backward()
    torch.testing.assert_close(loss, clip_loss(x, y, 5.0, backend="cpp"))
assert torch.equal(before, torch.get_rng_state()), "tuning drew from the caller's random numbers"
"""


def run(cache: Path) -> str:
    environment = {
        "TRITON_INTERPRET": "1", "FUSED_CONTRASTIVE_AUTOTUNE": "1", "XDG_CACHE_HOME": str(cache),
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )
    assert result.returncode == 0, result.stderr
    return result.stderr


def test_tunes_once_and_remembers(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    said = run(tmp_path)
    (file,) = (tmp_path / "fused_contrastive").iterdir()
    chosen = json.loads(file.read_text())
    for kernel in ("statistics", "gradient", "kept"):
        key = f"half {kernel} bfloat16 D=64"
        assert f"tuned {key} on interpreter: Config(block_m=" in said
        assert set(chosen[key]) == set(configs.Config._fields)
    assert "tuned" not in run(tmp_path)
