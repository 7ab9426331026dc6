"""Inputs that change between check and use, or between forward and backward, unseen by a version counter.

The result is an error or the right values, and no call reads or writes memory outside its tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import fused_contrastive as fc
from fused_contrastive.testing import harness
from fused_contrastive.testing.cases import Case
from fused_contrastive.testing.maker import Sizes
from fused_contrastive.testing.registry import LOSSES

CPU = torch.device("cpu")
N, D = 12, 8
FAR = 10**12  # an index that leads to no mapped memory
on_cpu = pytest.mark.parametrize("backend", ["reference", "cpp"], indirect=True)


def features(*shape: int) -> Tensor:
    return torch.randn(*shape, D, requires_grad=True)


BY_TARGETS: dict[str, Callable[..., Tensor]] = {
    "stats": lambda t, **o: fc.contrastive_stats(features(N), features(N), 2.0, targets=t, **o).pos.sum(),
    "stats recomputed": lambda t, **o: fc.contrastive_stats(
        features(N), features(N), 2.0, targets=t, memory_budget=0, **o
    ).row.sum(),
    "stats bias": lambda t, **o: fc.contrastive_stats(
        features(N), features(N), 2.0, targets=t, col_bias=torch.zeros(N, requires_grad=True), **o
    ).pos.sum(),
    "sigmoid": lambda t, **o: fc.sigmoid_stats(features(N), features(N), 2.0, targets=t, **o).pos.sum(),
    "info_nce": lambda t, **o: fc.info_nce_loss(features(N), features(N), targets=t, reduction="none", **o).sum(),
}


@on_cpu
@pytest.mark.parametrize("name", BY_TARGETS)
def test_targets_that_change_before_the_backward(name: str, backend: str) -> None:
    buffer = np.arange(N)
    loss = BY_TARGETS[name](torch.from_numpy(buffer), backend=backend)
    buffer[3] = FAR
    with pytest.raises((IndexError, RuntimeError), match=r"targets|out of"):
        loss.backward()


@on_cpu
@pytest.mark.parametrize("value", [FAR, -FAR, N, -N - 1])
def test_targets_that_change_between_check_and_use(value: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_contrastive.core.checks.target_range", lambda *_: None)
    targets = torch.arange(N)
    targets[5] = value
    with pytest.raises((IndexError, RuntimeError), match=r"targets|out of"):
        fc.contrastive_stats(features(N), features(N), targets=targets, backend=backend)


def test_targets_that_change_during_the_loss_in_one_walk() -> None:
    buffer = np.arange(N)
    x, y = features(N), features(N)
    loss = fc.info_nce_loss(x, y, targets=torch.from_numpy(buffer), memory_budget=0, backend="cpp")
    loss.backward(retain_graph=True)  # the gradients were made in the forward
    buffer[3] = FAR
    with pytest.raises((IndexError, ValueError), match="targets"):
        loss.backward()


@on_cpu
def test_ids_that_change_before_the_backward_index_nothing(backend: str) -> None:
    buffer = np.arange(N)
    ids = torch.from_numpy(buffer)
    loss = fc.info_nce_loss(features(N), features(N), row_ids=ids, col_ids=ids, backend=backend)
    buffer[:] = FAR
    loss.backward()


@pytest.mark.parametrize("side", ["x", "y"])
@pytest.mark.parametrize("direction", ["x", "y", "both"])
@on_cpu
def test_masks_that_change_before_the_backward(side: str, direction: str, backend: str) -> None:
    x, y = features(4, 6), features(5, 40)
    masks = {"x": np.ones((4, 6), bool), "y": np.ones((5, 40), bool)}
    scores = fc.max_sim(
        x, y, torch.from_numpy(masks["x"]), torch.from_numpy(masks["y"]), direction=direction, backend=backend
    )
    masks[side][:, 1:] = False
    total = scores.x.sum() + scores.y.sum() if direction == "both" else scores.sum()
    if backend == "cpp" and (direction == "both" or direction == ("y" if side == "x" else "x")):
        with pytest.raises(IndexError, match="max_sim: an argmax"):  # an argmax names a token that is now masked
            total.backward()
    else:
        total.backward()


@pytest.mark.parametrize("name", ["x", "y", "targets", "ids", "bias"])
def test_memory_that_was_freed(name: str) -> None:
    given = dict(x=torch.randn(N, D), y=torch.randn(N, D), targets=torch.arange(N), ids=torch.arange(N))
    given["bias"] = torch.zeros(N)

    def call() -> fc.ContrastiveStats:
        return fc.contrastive_stats(
            given["x"], given["y"], targets=given["targets"], col_bias=given["bias"], row_ids=given["ids"],
            col_ids=torch.arange(N), backend="cpp",
        )  # fmt: skip

    call()
    given[name].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"storage|not allocated"):
        call()


@pytest.mark.parametrize("bytes_left", [0, 4 * D])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_features_that_were_freed_before_the_backward(bytes_left: int, dtype: torch.dtype) -> None:
    x, y = torch.randn(N, D, dtype=dtype), torch.randn(N, D, dtype=dtype).requires_grad_()
    loss = fc.clip_loss(x, y, 1.0, memory_budget=0, backend="cpp")
    x.untyped_storage().resize_(bytes_left)
    with pytest.raises(RuntimeError, match="x: its storage has"):
        loss.backward()


def test_tokens_that_were_freed() -> None:
    x, y = torch.randn(4, 3, D), torch.randn(4, 3, D)
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="x: its storage has"):
        fc.max_sim(x, y, backend="cpp")


@on_cpu
def test_zeros_without_memory(backend: str) -> None:
    lazy = torch._efficientzerotensor((N, D))
    real = torch.zeros(N, D)
    y = torch.randn(N, D)
    for a, b in ((lazy, y), (y, lazy)):
        found = fc.contrastive_stats(a, b, 3.0, backend=backend)
        for one, other in zip(
            found, fc.contrastive_stats(*(real if t is lazy else t for t in (a, b)), 3.0), strict=True
        ):
            torch.testing.assert_close(one, other)


def other_strides(t: Tensor) -> Tensor:
    """The same values with gaps between them, and the last dimensions swapped in memory."""
    if t.dim() == 0 or t.numel() == 0:
        return t
    swapped = t.movedim(-1, 0)
    room = t.new_empty((*swapped.shape, 2))
    room[..., 0] = swapped
    return room[..., 0].movedim(0, -1)


# All options; on Triton's kernels only the first option of each loss.
CASES = [
    (backend, loss, option)
    for loss, member in LOSSES.items()
    for place, option in enumerate(member.options)
    for backend in ("reference", "cpp", "triton")
    if backend != "triton" or place == 0
]


@pytest.mark.parametrize(("backend", "loss", "option"), CASES, indirect=["backend"])
def test_hooks_that_give_back_other_strides(loss: str, option: str, backend: str, seed: int) -> None:
    n = 6 if backend == "triton" and not torch.cuda.is_available() else 40
    case = Case(loss, option, Sizes(n, 16, torch.float32, 5.0), seed)
    plain = harness.ours(case, backend)
    with saved_tensors_hooks(lambda t: t, other_strides):
        hooked = harness.ours(case, backend)
    for name, value in plain.items():
        torch.testing.assert_close(hooked[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.thinned
@pytest.mark.parametrize("budget", ["auto", 0, 4 * N * N // 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_hooks_that_give_back_other_strides_for_the_primitives(
    budget: int | str, dtype: torch.dtype, masked: bool, backend: str, seed: int
) -> None:
    def gradients() -> list[Tensor]:
        torch.manual_seed(seed)
        shapes = ((N,), (N,), (3, 5), (4, 6))
        x, y, a, b = (torch.randn(*shape, D).to(dtype).requires_grad_() for shape in shapes)
        stats = fc.contrastive_stats(x, y, 2.0, memory_budget=budget, backend=backend)
        masks = (torch.rand(3, 5) < 0.6, torch.rand(4, 6) < 0.6) if masked else (None, None)
        scores = fc.max_sim(a, b, *masks, direction="both", memory_budget=budget, backend=backend)
        total = sum(t.square().sum() for t in (*stats, *scores))
        return list(torch.autograd.grad(total, (x, y, a, b)))

    plain = gradients()
    with saved_tensors_hooks(lambda t: t, other_strides):
        hooked = gradients()
    for one, other in zip(hooked, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@on_cpu
@pytest.mark.parametrize("rows", [N, 5000])
def test_hooks_that_make_two_tensors_of_one(rows: int, backend: str) -> None:
    """For x against itself, x is saved twice: a second tensor from a hook must not be used as another matrix."""
    x, seen = features(N), []

    def unpack(t: Tensor) -> Tensor:
        seen.append(t.shape == (N, D))
        return torch.randn(rows, D) if seen.count(True) == 2 and seen[-1] else t

    def loss() -> Tensor:
        row = fc.contrastive_stats(x, x, directions=("row",), exclude_self=True, memory_budget=0, backend=backend).row
        return row.sum()

    with saved_tensors_hooks(lambda t: t, unpack):
        hooked = loss()
    (found,) = torch.autograd.grad(hooked, x)
    (right,) = torch.autograd.grad(loss(), x)
    torch.testing.assert_close(found, right)


@pytest.mark.parametrize("backend", ["cpp", "triton"], indirect=True)
def test_hooks_that_give_back_less(backend: str) -> None:
    def less(t: Tensor) -> Tensor:
        return t[:1] if t.dim() == 2 and t.shape != (N, D) else t

    x, y, a, b = features(N), features(N), features(3, 5), features(4, 6)
    with saved_tensors_hooks(lambda t: t, less):
        stats = fc.contrastive_stats(x, y, 2.0, memory_budget=10**6, backend=backend)
    with pytest.raises(ValueError, match=r"^kept: got"):
        stats.row.sum().backward()
    with saved_tensors_hooks(lambda t: t, lambda t: t[:1] if t.dtype == torch.uint8 else t):
        scores = fc.max_sim(a, b, backend=backend)
    if backend == "cpp":  # computes the missing argmaxima again
        right = torch.autograd.grad(fc.max_sim(a, b, backend=backend).sum(), (a, b))
        torch.testing.assert_close(torch.autograd.grad(scores.sum(), (a, b)), right)
    else:
        with pytest.raises(ValueError, match=r"^argmax_x: got"):
            scores.sum().backward()
