"""The tests marked ``every_level`` also pass at the vector levels below this CPU's own, in a process for each level: at
the lowest one, with --full at all."""

from __future__ import annotations

import os
import subprocess
import sys

import processes
import pytest
import torch
from snippets import ROOT

from fused_contrastive.backends import cpp
from fused_contrastive.testing import harness
from fused_contrastive.testing.cases import OPTIONS, Case, sample
from fused_contrastive.testing.maker import Sizes

LEVELS = ["baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"]
ASKED = "FUSED_CONTRASTIVE_CPU_LEVEL"
FILES = [path for path in (ROOT / "tests").glob("*/**/test_*.py") if "mark.every_level" in path.read_text()]


@pytest.mark.parametrize("level", LEVELS)
def test_lower_levels_pass_the_same_tests(level: str, seed: int, full: bool) -> None:
    lower = LEVELS[: LEVELS.index(cpp.vector_level())]
    if level not in lower:
        pytest.skip(f"this CPU has {cpp.vector_level()}, which the other tests use")
    if not full and level != lower[0]:
        pytest.skip("--full runs the levels above the lowest one")
    environment = {**os.environ, ASKED: level, "FUSED_CONTRASTIVE_TEST_SEED": str(seed)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "every_level"]
    command += ["-k", "not reference and not triton", *FILES]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=processes.HANGS, env=environment, cwd=ROOT
    )  # fmt: skip
    assert result.returncode == 0, result.stdout


@pytest.mark.every_level
def test_the_level_is_what_was_asked_for() -> None:
    assert cpp.vector_level() == os.environ.get(ASKED, cpp.vector_level())


@pytest.mark.every_level
def test_every_option_keeps_the_budget(seed: int) -> None:
    for case in sample(2 * len(OPTIONS), seed):
        for deviation in harness.deviations(case, "cpp"):
            assert deviation.share <= 1, f"{case}: {deviation}"


@pytest.mark.every_level
@pytest.mark.parametrize(
    ("loss", "n", "dtype", "variant", "scale"),
    [
        ("siglip", 257, torch.float32, "plain", 0.5),
        ("siglip", 257, torch.float32, "plain", 1.0),
        ("siglip", 257, torch.float32, "none", 1.0),
        ("siglip", 257, torch.float64, "plain", 0.5),
        ("siglip", 257, torch.float64, "none", 1.0),
        ("siglip", 1500, torch.float32, "none", 1.0),
        ("siglip", 2500, torch.float64, "plain", 1.0),
        ("clip", 1001, torch.float64, "plain", 0.5),
        ("nt_xent", 500, torch.float64, "plain", 0.5),
        ("supcon", 1001, torch.float64, "out", 0.5),
    ],
    ids=str,
)
def test_sums_of_equal_terms(loss: str, n: int, dtype: torch.dtype, variant: str, scale: float, seed: int) -> None:
    """With D = 1 and normalised features S has two values, so that the rounding errors of a sum do not average out."""
    case = Case(loss, variant, Sizes(n, 1, dtype, scale), seed)
    for deviation in harness.deviations(case, "cpp"):
        assert deviation.share <= 1, f"{case}: {deviation}"


def test_unknown_vector_level() -> None:
    code = "import torch, fused_contrastive as f; f.clip_loss(torch.randn(2, 2), torch.randn(2, 2), 1.0)"
    result = processes.run(code, **{ASKED: "mmx"})
    assert result.returncode != 0
    assert f"{ASKED}: got 'mmx', expected baseline, avx2, avx512, avx512_bf16 or amx_bf16" in result.stderr
