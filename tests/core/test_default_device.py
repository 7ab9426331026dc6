"""torch.set_default_device and torch.set_default_dtype do not change results.

A call that makes a tensor on the default device and combines it with its inputs fails if that device is "meta", as it
would on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from every_function import FUNCTIONS, MODULES, call
from every_loss import LOSSES, step
from torch import Tensor

import fused_contrastive as fc
from fused_contrastive.evaluation.sweep import sweep
from fused_contrastive.testing import harness
from fused_contrastive.testing.cases import MEMBERS, Case, sample
from fused_contrastive.testing.maker import Sizes
from fused_contrastive.testing.registry import LOSSES as REGISTRY

DEFAULTS = [("meta", torch.float64), ("meta", torch.float16)]
CPU = torch.device("cpu")


@contextmanager
def defaults(device: str, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def tensors(value: Any) -> list[Tensor]:
    """All tensors of a result, and its numbers as tensors."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for each in value.values() for t in tensors(each)]
    if isinstance(value, (tuple, list)):
        return [t for each in value for t in tensors(each)]
    return [torch.tensor(value, dtype=torch.float64, device="cpu")] if isinstance(value, (int, float)) else []


def assert_same(a: object, b: object) -> None:
    first, second = tensors(a), tensors(b)
    assert first
    assert len(first) == len(second)
    for s, t in zip(first, second, strict=True):
        assert (s.dtype, s.device) == (t.dtype, t.device)
        assert torch.equal(s.nan_to_num(7), t.nan_to_num(7))


def assert_defaults_do_not_matter(run: Callable[[], object]) -> None:
    ordinary = run()
    for device, dtype in DEFAULTS:
        with defaults(device, dtype):
            found = run()
        assert_same(found, ordinary)


@pytest.mark.parametrize("name", [*FUNCTIONS, *MODULES])
def test_everything_public(name: str) -> None:
    """The default is set for the whole process; a call makes its tensors on the device of its inputs."""

    def run() -> object:
        torch.manual_seed(0)  # of what is drawn
        found = call(name)
        found = [astuple(d)[1:] for d in found.deviations] if name == "verify" else found
        return astuple(found) if name == "diagnose" else found

    ordinary = run()
    torch.set_default_device("meta")
    try:
        found = run()
    finally:
        torch.set_default_device(None)
    assert_same(found, ordinary)


def test_a_block_that_verifies() -> None:
    torch.set_default_device("meta")
    try:
        with fc.verify_against_reference(on_breach="raise") as check:
            call("clip_loss")
    finally:
        torch.set_default_device(None)
    assert (check.calls, check.checked) == (1, 1)


def features(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    made = torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")
    return F.normalize(made, dim=-1).to(torch.get_default_device())


def whole_numbers(below: int, count: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(below)
    return torch.randint(below, (count,), generator=generator, device="cpu").to(torch.get_default_device())


OPTIONS = [(name, option) for name, member in MEMBERS.items() for option in member.options]


@pytest.mark.parametrize(("loss", "option"), OPTIONS)
def test_inputs_of_cases(loss: str, option: str, seed: int) -> None:
    for duplicates in (False, True):
        case = Case(loss, option, Sizes(6, 5, torch.float16, 14.3, duplicates), seed)
        assert_defaults_do_not_matter(lambda case=case: case.inputs())
        with torch.device("cpu"):
            leaves, options = case.inputs("meta")
        assert {t.device.type for t in (*leaves.values(), *options.values()) if isinstance(t, Tensor)} == {"meta"}


def test_samples_of_losses(seed: int) -> None:
    ordinary = list(sample(40, seed))
    with torch.device("meta"):
        assert list(sample(40, seed)) == ordinary


@pytest.mark.parametrize(("loss", "option"), OPTIONS)
def test_textbooks(loss: str, option: str, seed: int) -> None:
    case = Case(loss, option, Sizes(6, 16, torch.float32, 14.3), seed)
    assert_defaults_do_not_matter(lambda: astuple(harness.expected(case)))


@pytest.mark.parametrize(("loss", "option"), OPTIONS)
@pytest.mark.parametrize("backend", ["reference", "cpp"], indirect=True)
def test_every_option(loss: str, option: str, backend: str, seed: int) -> None:
    device = torch.get_default_device()
    case = Case(loss, option, Sizes(9, 16, torch.float32, 14.3), seed)
    assert_defaults_do_not_matter(lambda: harness.ours(case, backend, device))


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_of_half_precision(loss: str) -> None:
    x, y = features(12, 8).bfloat16(), features(12, 8, seed=1).bfloat16()
    scale = torch.tensor(5.0, device="cpu", dtype=torch.float32)
    assert_defaults_do_not_matter(lambda: step(loss, [x, y, scale]))


@pytest.mark.parametrize("loss", [*REGISTRY])
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_losses_by_kernels(loss: str, backend: str, seed: int) -> None:
    device, option = torch.get_default_device(), next(iter(REGISTRY[loss].options))
    case = Case(loss, option, Sizes(4, 16, torch.float32, 14.3), seed)
    assert_defaults_do_not_matter(lambda: harness.ours(case, backend, device))


def test_statistics_of_one_set_and_of_logistic_losses(backend: str) -> None:
    x, y, ids = features(12, 8), features(14, 8, seed=1), whole_numbers(4, 12)
    columns, targets = whole_numbers(5, 14), whole_numbers(14, 12)

    def run() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, y)]
        values = [
            fc.self_stats(leaves[0], 3.0, backend=backend),
            fc.self_stats(leaves[0], 3.0, ids=ids, equal_ids="only", backend=backend),
            *fc.sigmoid_stats(*leaves, 3.0, targets=targets, row_ids=ids, col_ids=columns, backend=backend),
        ]
        total = torch.stack([t[t.isfinite()].sum() for t in values]).sum()
        return [*(t.detach() for t in values), *torch.autograd.grad(total, leaves)]

    assert_defaults_do_not_matter(run)


@pytest.mark.parametrize("budget", [0, "auto"])
def test_max_sim(budget: object, backend: str) -> None:
    x, y = features(4, 3, 8), features(5, 6, 8, seed=1)
    x_mask, y_mask = features(4, 3, seed=2) > -0.3, features(5, 6, seed=3) > -0.3

    def run() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, y)]
        options = {"reduction": "mean", "memory_budget": budget, "backend": backend}
        scores = fc.max_sim(*leaves, x_mask, y_mask, direction="both", **options)
        return [*(t.detach() for t in scores), *torch.autograd.grad(scores.x.sum() + scores.y.square().sum(), leaves)]

    assert_defaults_do_not_matter(run)


def test_rankings(backend: str) -> None:
    x, y, targets = features(9, 8), features(14, 8, seed=1), whole_numbers(14, 9)
    rules = {"targets": targets, "exclude_ids": (targets % 3, whole_numbers(3, 14)), "relative_margin": 0.1}
    prompts = features(6, 3, 8, seed=2)
    for run in (
        lambda: fc.rank(x, y, 5, scale=2.0, backend=backend),
        lambda: fc.rank(x, y, 5, backend=backend, **rules),
        lambda: fc.sample_negatives(
            x, y, 2.0, 3, targets=targets, generator=torch.Generator("cpu").manual_seed(1), backend=backend
        ),
        lambda: fc.target_ranks(x, y[: len(x)], backend=backend),
        lambda: fc.target_ranks(x, y, targets=targets, backend=backend),
        lambda: fc.recall_at_k(x, y, (1, 5), targets=targets, backend=backend),
        lambda: fc.median_rank(x, y, targets=targets, backend=backend),
        lambda: fc.zero_shot(x, prompts, k=3, scale=10.0, probabilities=True, backend=backend),
    ):
        assert_defaults_do_not_matter(run)


def test_evaluation() -> None:
    x, y = features(9, 8), features(9, 8, seed=1)
    assert_defaults_do_not_matter(lambda: astuple(fc.diagnose(x, y, 10.0, k=3)))
    assert_defaults_do_not_matter(lambda: [astuple(row) for row in sweep(x, y, [0.05, 0.5])])


def test_verification() -> None:
    x, y = features(9, 8), features(9, 8, seed=1)
    assert_defaults_do_not_matter(lambda: [astuple(d)[1:] for d in fc.verify(fc.clip_loss, x, y, 10.0).deviations])
