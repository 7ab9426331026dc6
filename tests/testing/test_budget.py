"""Every backend against the float64 oracle under the error budget: values and gradients, every option."""

from __future__ import annotations

import pytest
import torch

from fused_contrastive.core.budget import Deviation
from fused_contrastive.testing import harness
from fused_contrastive.testing.cases import DTYPES, Case, sample_of_grid
from fused_contrastive.testing.maker import Sizes
from fused_contrastive.testing.registry import LOSSES, PRIMITIVES

# (M, N, D): one row; a row more than a group of 16; one more than the 256-wide tile in both directions; odd D; wide and
# tall; two blocks of rows of unequal size.
SHAPES = [(1, 1, 3), (1, 7, 1), (17, 17, 5), (257, 257, 33), (2, 300, 8), (300, 2, 8), (2101, 70, 4), (70, 2101, 4)]
# For Triton's interpreter: one more than its 64 x 64 tile and 64 and 128-row blocks, and less; D above a step of 32.
SMALL_SHAPES = [(1, 1, 3), (1, 7, 1), (17, 17, 5), (65, 65, 33), (2, 70, 8), (70, 2, 8), (129, 40, 4), (40, 193, 4)]
PAIRS = [(b, *s) for b in ("reference", "cpp") for s in SHAPES] + [("triton", *s) for s in SMALL_SHAPES]
INTERPRETED = not torch.cuda.is_available()


def assert_within_budget(case: Case, backend: str) -> None:
    if backend == "triton" and case.dtype == torch.float64:
        pytest.skip("float64 is the reference's on a GPU")
    for deviation in harness.deviations(case, backend, torch.get_default_device()):
        assert deviation.share <= 1, f"{case}: {deviation}"


@pytest.mark.thinned("m n d option", "option dtype", everywhere=True)
@pytest.mark.parametrize("option", PRIMITIVES["contrastive_stats"].options)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "m", "n", "d"), PAIRS, indirect=["backend"])
def test_stats(m: int, n: int, d: int, dtype: torch.dtype, option: str, backend: str, seed: int) -> None:
    for scale in (0.01, 1000.0):
        assert_within_budget(Case("contrastive_stats", option, Sizes(n, d, dtype, scale, m=m), seed), backend)


@pytest.mark.thinned(everywhere=True)
@pytest.mark.parametrize("option", LOSSES["clip"].options)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d", "scale"), [(2, 3, 1000.0), (7, 64, 14.3), (257, 3, 100.0), (1100, 16, 14.3)])
def test_clip(n: int, d: int, scale: float, dtype: torch.dtype, option: str, backend: str, seed: int) -> None:
    if backend == "triton" and INTERPRETED:
        n = min(n, 100)
    assert_within_budget(Case("clip", option, Sizes(n, d, dtype, scale), seed), backend)


@pytest.mark.every_level
def test_random_cases(backend: str, seed: int, full: bool) -> None:
    cases = list(sample_of_grid(600 if full else 100, seed))
    if backend == "triton":
        cases = [case for case in cases if case.dtype != torch.float64]
    if backend == "triton" and INTERPRETED:
        cases = [case for case in cases if (case.sizes.m or case.sizes.n) * case.sizes.n < 20_000][: 50 if full else 8]
    for case in cases:
        assert_within_budget(case, backend)


@pytest.mark.parametrize("dim", [64, 513])
@pytest.mark.parametrize("n", [64, 257])
def test_matched_features_keep_relative_accuracy(n: int, dim: int, backend: str, seed: int) -> None:
    """Perfectly matched features at scale 50: a loss near 1e-11 and its gradients, where eager gives noise."""
    if backend == "triton" and INTERPRETED:
        n = min(n, 140)
    features = torch.nn.functional.normalize(torch.randn(n, dim, dtype=torch.float64), dim=1).float()
    case = Case("clip", "plain", Sizes(n, dim, torch.float32, 50.0), seed, features=(features, features.clone()))
    truth = harness.expected(case, torch.get_default_device()).truth
    for name, value in harness.ours(case, backend, torch.get_default_device()).items():
        error = (value - truth[name]).abs().max() / truth[name].abs().max()
        assert error < 5e-4, f"{name}: relative error {error:.1e}, loss {truth['loss']:.1e}"


@pytest.mark.parametrize(
    ("error", "eager_error", "allowed", "share"),
    [
        (1.0, 1.0, 2.0, 0.5),
        (0.0, 0.0, 0.0, 0.0),
        (1.0, 0.0, 0.0, 1.0),
        (torch.inf, 0.5, 1.0, torch.inf),
        (torch.inf, 0.0, torch.inf, torch.inf),  # the truth is infinite, and ours is not
        (torch.inf, torch.inf, torch.inf, 0.0),
        (1.0, torch.inf, torch.inf, 0.0),
        (torch.nan, 0.5, 1.0, torch.inf),
        (torch.nan, torch.inf, torch.inf, torch.inf),
    ],
)
def test_a_share_is_a_number(error: float, eager_error: float, allowed: float, share: float) -> None:
    assert Deviation("loss", error, eager_error, allowed).share == share
