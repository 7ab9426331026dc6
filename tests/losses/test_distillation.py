"""Distillation at its edges; the formula is in the error budget's tests."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_contrastive as fc


def features(n: int, d: int = 8) -> Tensor:
    return F.normalize(torch.randn(n, d), dim=1)


def test_the_teacher_s_own_features_give_no_gradient(backend: str) -> None:
    """If our softmax is the teacher's, the loss is its entropy, and is at its least."""
    x, y = features(9).requires_grad_(), features(9).requires_grad_()
    loss = fc.distillation_loss(x, y, 5.0, x.detach(), y.detach(), 5.0, backend=backend)
    log_rows, log_cols = (5.0 * x @ y.T).log_softmax(1), (5.0 * y @ x.T).log_softmax(1)
    entropy = -(log_rows.exp() * log_rows).sum() - (log_cols.exp() * log_cols).sum()
    torch.testing.assert_close(loss, entropy / 18)
    for gradient in torch.autograd.grad(loss, (x, y)):
        assert gradient.abs().max() < 1e-6


def test_nan_in_the_teacher_is_nan_in_the_loss(backend: str) -> None:
    """In one row or in all, whose softmax then has no largest logit."""
    x, y, teacher_x, teacher_y = (features(6) for _ in range(4))
    some = teacher_x.detach().clone()
    some[3] = torch.nan
    for given, scale in ((some, 5.0), (torch.full_like(some, torch.nan), 5.0), (teacher_x, torch.nan)):
        loss = fc.distillation_loss(x, y, 10.0, given, teacher_y, scale, reduction="none", backend=backend)
        assert loss[3].isnan()
        assert loss.isnan().all() or given is some


@pytest.mark.parametrize("budget", [0, "auto"])
def test_an_infinite_teacher_has_no_gradient_that_is_a_number(budget: int | str, backend: str) -> None:
    """As in PyTorch, where softmax of a row with an infinite logit is NaN."""
    x, y, teacher_y = (
        features(2).requires_grad_(),
        features(3).requires_grad_(),
        torch.tensor([[0.0], [torch.inf], [1.0]]),
    )
    loss = fc.distillation_loss(
        x, y, 1.0, torch.ones(2, 1), teacher_y, 1.0, symmetric=False, memory_budget=budget, backend=backend
    )
    loss.backward()
    assert loss.isnan()
    assert x.grad is not None
    assert y.grad is not None
    assert x.grad.isnan().all()
    assert y.grad.isnan().all()


def test_targets_weight_1_is_clip(backend: str) -> None:
    x, y, other = features(9), features(9), features(9)
    found = fc.distillation_loss(x, y, 5.0, other, other, 3.0, targets_weight=1.0, backend=backend)
    torch.testing.assert_close(found, fc.clip_loss(x, y, 5.0, backend=backend))


def test_a_sharp_teacher_is_a_target(backend: str) -> None:
    """At scale 1e4 the teacher's softmax is one-hot, and its normalisers lie far from ours."""
    x, y, order = features(40), features(40), torch.randperm(40)
    teacher = torch.eye(40)
    found = fc.distillation_loss(x, y, 5.0, teacher, teacher[order], 1e4, symmetric=False, backend=backend)
    torch.testing.assert_close(found, fc.info_nce_loss(x, y, logit_scale=5.0, targets=order.argsort(), backend=backend))


@pytest.mark.parametrize("budget", [0, 100_000, "auto"])
def test_over_many_tiles(budget: int | str) -> None:
    x, y, scale = features(300).requires_grad_(), features(700).requires_grad_(), torch.tensor(9.0, requires_grad=True)
    a, b = features(300, 5), features(700, 5)
    loss = fc.distillation_loss(x, y, scale, a, b, 20.0, symmetric=False, memory_budget=budget)
    target = (20.0 * a @ b.T).softmax(1)
    expected = F.cross_entropy(scale * x @ y.T, target)
    torch.testing.assert_close(loss, expected)
    leaves = (x, y, scale)
    for g, h in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(g, h, rtol=1e-4, atol=1e-7)


def test_compile_fullgraph() -> None:
    torch._dynamo.reset()
    leaves = [features(8).requires_grad_(), features(8).requires_grad_(), torch.tensor(4.0, requires_grad=True)]
    teacher = features(8), features(8), 7.0
    compiled = torch.compile(fc.distillation_loss, fullgraph=True, backend="aot_eager")
    found = compiled(*leaves, *teacher, targets_weight=0.2)
    expected = fc.distillation_loss(*leaves, *teacher, targets_weight=0.2)
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b)


x4, x5 = torch.randn(4, 3), torch.randn(5, 3)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"teacher_x": None}, TypeError, r"teacher_x: got NoneType, expected a tensor of shape \(4, G\)"),
        ({"teacher_y": x5}, ValueError, r"teacher_y: got shape \(5, 3\), expected \(4, G\)"),
        ({"teacher_y": x4[:, :2]}, ValueError, r"teacher_y: got shape \(4, 2\), expected \(4, G\), the same G"),
        ({"teacher_x": x4[:0]}, ValueError, r"teacher_x: got shape \(0, 3\)"),
        ({"teacher_x": x4.long()}, TypeError, "teacher_x: got dtype torch.int64"),
        ({"teacher_scale": None}, TypeError, "teacher_scale: got None"),
        ({"teacher_scale": "1"}, TypeError, "teacher_scale: got str"),
        ({"y": x5}, ValueError, "y: got 5 rows, expected 4, as many as x"),
        ({"targets_weight": 1.5}, ValueError, r"targets_weight: got 1.5, expected a number in \[0, 1\]"),
        ({"weight": torch.ones(5)}, ValueError, r"weight: got shape \(5,\)"),
        ({"symmetric": 1}, TypeError, "symmetric: got 1"),
        (
            {"x": x5, "teacher_x": x5, "symmetric": False, "targets_weight": 0.5},
            ValueError,
            "targets_weight: got it with 5",
        ),
    ],
)
def test_bad_input(changes: dict, error: type, text: str) -> None:
    given = {"x": x4, "y": x4, "logit_scale": 1.0, "teacher_x": x4, "teacher_y": x4, "teacher_scale": 2.0}
    with pytest.raises(error, match=text):
        fc.distillation_loss(**{**given, **changes})


def test_module() -> None:
    x, y, a, b = (features(6) for _ in range(4))
    module = fc.DistillationLoss(symmetric=False, targets_weight=0.3, normalize=True)
    expected = fc.distillation_loss(x, y, 3.0, a, b, 4.0, symmetric=False, targets_weight=0.3, normalize=True)
    assert torch.equal(module(x, y, 3.0, a, b, 4.0), expected)
