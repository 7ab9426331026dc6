"""lightly's NTXentLoss, with and without memory bank, DCLLoss and DCLWLoss."""

from __future__ import annotations

import pytest
import torch
from against import DTYPES, assert_same, features

library = pytest.importorskip("lightly.loss", reason="lightly is not installed: make conformance")

from fused_contrastive.adapters import lightly as ours  # noqa: E402


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.07, 0.5, -0.5])
@pytest.mark.parametrize("n", [2, 33])
@pytest.mark.parametrize("name", ["NTXentLoss", "DCLLoss", "DCLWLoss"])
def test_losses(name: str, n: int, temperature: float, dtype: torch.dtype, backend: str) -> None:
    theirs, adapted = getattr(library, name)(temperature), getattr(ours, name)(temperature)
    adapted.backend = backend
    leaves = {"out0": features(n, 16, dtype=dtype), "out1": features(n, 16, dtype=dtype)}
    assert_same(theirs, adapted, leaves, abs(1 / temperature))


def test_one_sample(backend: str) -> None:
    loss = ours.NTXentLoss()
    loss.backend = backend
    x, y = features(1, 4), features(1, 4)
    torch.testing.assert_close(loss(x, y), library.NTXentLoss()(x, y))


def test_weight_function(backend: str) -> None:
    def weight(out0: torch.Tensor, out1: torch.Tensor) -> torch.Tensor:
        return ((out0 - out1) ** 2).sum(dim=1)

    theirs, adapted = library.DCLLoss(0.2, weight), ours.DCLLoss(0.2, weight)
    adapted.backend = backend
    assert_same(theirs, adapted, {"out0": features(12, 8), "out1": features(12, 8)}, 5.0)


def test_memory_bank_over_steps(backend: str) -> None:
    """17 slots, 5 a step: the queue wraps. Without a gradient to compute it does not change. The bank is float32."""
    theirs, adapted = (cls(0.1, memory_bank_size=(17, 8)) for cls in (library.NTXentLoss, ours.NTXentLoss))
    adapted.backend = backend
    adapted.memory_bank.bank.copy_(theirs.memory_bank.bank)
    for step in range(6):
        leaves = [features(5, 8).requires_grad_(step != 3) for _ in range(2)]
        a, b = theirs(*leaves), adapted(*leaves)
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
        if step != 3:
            wanted = torch.autograd.grad(a, leaves)
            for g, h in zip(torch.autograd.grad(b, leaves), wanted, strict=True):
                torch.testing.assert_close(g, h, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(adapted.memory_bank.bank, theirs.memory_bank.bank)
        assert adapted.memory_bank.bank_ptr == theirs.memory_bank.bank_ptr


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_memory_bank_of_another_dtype(dtype: torch.dtype, backend: str) -> None:
    """The bank stays float32; the library's own works only after a conversion to the features' dtype."""
    theirs, adapted = (cls(0.2, memory_bank_size=(17, 8)) for cls in (library.NTXentLoss, ours.NTXentLoss))
    adapted.backend = backend
    adapted.memory_bank.bank.copy_(theirs.memory_bank.bank)
    theirs.to(torch.float64)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 2e-2}
    for _ in range(5):
        leaves = [features(5, 8, dtype=dtype).requires_grad_() for _ in range(2)]
        wide = [t.detach().double().requires_grad_() for t in leaves]
        a, b = theirs(*wide), adapted(*leaves)
        torch.testing.assert_close(b.double(), a, **tolerance)
        wanted = torch.autograd.grad(a, wide)
        for g, h in zip(torch.autograd.grad(b, leaves), wanted, strict=True):
            torch.testing.assert_close(g.double(), h, **tolerance)
        assert adapted.memory_bank.bank.dtype == torch.float32
        torch.testing.assert_close(adapted.memory_bank.bank.double(), theirs.memory_bank.bank, **tolerance)


def test_memory_bank_under_autocast(backend: str) -> None:
    theirs, adapted = (cls(0.2, memory_bank_size=(17, 8)) for cls in (library.NTXentLoss, ours.NTXentLoss))
    adapted.backend = backend
    adapted.memory_bank.bank.copy_(theirs.memory_bank.bank)
    x, y = features(5, 8).requires_grad_(), features(5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a, b = theirs(x, y), adapted(x, y)
    torch.testing.assert_close(b.float(), a.float(), rtol=2e-2, atol=2e-2)
    (wanted,), (found,) = torch.autograd.grad(a, x), torch.autograd.grad(b, x)
    torch.testing.assert_close(found, wanted, rtol=5e-2, atol=2e-2)


def test_state_and_errors() -> None:
    adapted = ours.NTXentLoss(memory_bank_size=(8, 4))
    assert adapted.state_dict().keys() == library.NTXentLoss(memory_bank_size=(8, 4)).state_dict().keys()
    with pytest.raises(ValueError, match="Illegal temperature"):
        ours.NTXentLoss(0.0)


@pytest.mark.parametrize("name", ["NTXentLoss", "DCLLoss", "DCLWLoss"])
def test_patch(name: str) -> None:
    original = getattr(library, name)
    with ours.patch_lightly():
        assert getattr(library, name) is getattr(ours, name)
    assert getattr(library, name) is original is not getattr(ours, name)


@pytest.mark.parametrize("name", ["NTXentLoss", "DCLLoss"])
def test_what_does_not_fit_is_named_as_it_was_passed(name: str) -> None:
    loss, x = getattr(ours, name)(), features(4, 8)
    for out1, message in (
        (features(3, 8), "out1: got 3 rows, expected 4, as many as out0"),
        (features(4, 6), "out1: got D = 6, expected 8, the D of out0"),
        (x.double(), "out1: got dtype torch.float64, expected torch.float32, the dtype of out0"),
        (features(1, 4, 8), r"out1: got shape \(1, 4, 8\), expected 2 dimensions"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            loss(x, out1)
    with pytest.raises(NotImplementedError, match=r"BarlowTwinsLoss: a class of lightly .*: use lightly\.loss\.Barlow"):
        ours.BarlowTwinsLoss  # noqa: B018
