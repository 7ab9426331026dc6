"""benchmarks/gpu.py, the same code under Triton's interpreter at toy sizes: it measures, and refuses what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
INTERPRETED = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("triton")
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--toy", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=INTERPRETED)


def test_measures(tmp_path: Path) -> None:
    result = run("--dtypes", "bf16", "--out", str(tmp_path / "toy.json"))
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "toy.json").read_text())
    assert "torch" in found["provenance"]
    names = {row["implementation"] for row in found["rows"]}
    assert {"ours, recompute", "ours, kept", "eager"} <= names
    for row in found["rows"]:
        if row["implementation"].startswith("ours"):
            assert row["forward_u"] > 0
            assert row["both_u"] > row["forward_u"]


def test_refuses_to_time_what_is_wrong(tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
sys.argv = ["gpu.py", "--toy", "--dtypes", "bf16", "--out", {str(tmp_path / "toy.json")!r}]
import gpu
right = gpu.OURS["ours, kept"]
gpu.OURS["ours, kept"] = lambda x, y, scale: right(x, y, 1.2 * scale)
gpu.main()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, env=INTERPRETED)
    assert result.returncode != 0
    assert "ours, kept, bf16, N = 65, D = 20: WRONG: loss is off by" in result.stderr
    assert not (tmp_path / "toy.json").exists()


def test_million_is_the_same_code(tmp_path: Path) -> None:
    result = run("--million", "--out", str(tmp_path / "million.json"))
    assert result.returncode == 0, result.stderr
    (row,) = json.loads((tmp_path / "million.json").read_text())["rows"]
    assert 0 < row["loss"] < 20
