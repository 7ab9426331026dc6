"""InfoNCE with negatives (M, K, D) for each query: ragged ones and their fillers, memory, and the dot products."""

from __future__ import annotations

import processes
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_contrastive as fc
from fused_contrastive.ops import own_dots

M, K, D = 12, 5, 8


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ELEMENTS", "GPU_ELEMENTS"):
        monkeypatch.setattr(own_dots, name, 2 * K * D)


def features(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def ragged() -> tuple[list[Tensor], Tensor, Tensor]:
    """0 to K negatives for each query; the same in one tensor, padded with NaN; and its mask."""
    counts = [i % (K + 1) for i in range(M)]
    own = [torch.randn(count, D) for count in counts]
    filled, mask = torch.full((M, K, D), torch.nan), torch.zeros(M, K, dtype=torch.bool)
    for i, negatives in enumerate(own):
        places = torch.randperm(K)[: len(negatives)]
        filled[i, places], mask[i, places] = negatives, True
    return own, filled.requires_grad_(), mask


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("decoupled", [False, True])
def test_fillers_do_not_count(backend: str, normalize: bool, smoothing: float, decoupled: bool) -> None:
    query, key, (own, filled, mask) = features(M, D), features(M, D), ragged()
    options = {"normalize": normalize, "label_smoothing": smoothing, "decoupled": decoupled, "temperature": 0.5}
    losses = fc.info_nce_loss(
        query, key, negatives=filled, negatives_mask=mask, reduction="none", backend=backend, **options
    )
    losses.sum().backward()
    unit = (lambda t: F.normalize(t, dim=-1)) if normalize else (lambda t: t)
    q, k = query.detach().double().requires_grad_(), key.detach().double()
    for i in range(M):
        logits = unit(q[i]) @ unit(torch.cat((k, own[i].double()))).T / 0.5
        rest = logits[torch.arange(len(logits)) != i]
        denominator = rest.logsumexp(0) if decoupled else logits.logsumexp(0)
        loss = denominator - (1 - smoothing) * logits[i] - smoothing * logits.mean()
        torch.testing.assert_close(losses[i].double(), loss.detach(), rtol=1e-5, atol=1e-5)
        loss.backward()
    torch.testing.assert_close(query.grad.double(), q.grad, rtol=1e-4, atol=1e-5)
    assert (filled.grad[~mask] == 0).all()
    assert (filled.grad[mask] != 0).any()


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.uint8])
def test_a_mask_of_numbers(backend: str, dtype: torch.dtype) -> None:
    query, key, (_, filled, mask) = features(M, D), features(M, D), ragged()
    run = lambda mask: fc.info_nce_loss(query, key, negatives=filled, negatives_mask=mask, backend=backend)  # noqa: E731
    assert torch.equal(run(mask.to(dtype)), run(mask))


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("which", ["both", "x", "own"])
def test_derivatives(unit: bool, masked: bool, which: str) -> None:
    """First and second derivatives agree with finite differences."""
    m, d = 5, 4  # two chunks
    x, own = features(m, d, dtype=torch.float64), features(m, K, d, dtype=torch.float64)
    x.requires_grad_(which != "own")
    own.requires_grad_(which != "x")
    mask = torch.rand(m, K) < 0.6 if masked else None
    torch.autograd.gradcheck(lambda x, own: own_dots.own_dots(x, own, mask, unit), (x, own))
    torch.autograd.gradgradcheck(lambda x, own: own_dots.own_dots(x, own, mask, unit), (x, own))


@pytest.mark.parametrize("unit", [False, True])
def test_no_gradient_passes_a_filler(unit: bool) -> None:
    """Whatever arrives at its dot product, NaN included."""
    x, own, mask = features(M, D), features(M, K, D), torch.rand(M, K) < 0.6
    g = torch.randn(M, K)
    found = []
    for filler in (0.0, torch.nan):
        dots = own_dots.own_dots(x, own, mask, unit)
        found.append(torch.autograd.grad(dots, (x, own), g.masked_fill(~mask, filler)))
    for zero, nan in zip(*found, strict=True):
        assert torch.equal(zero, nan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_negative_of_zeros_gets_no_gradient(dtype: torch.dtype) -> None:
    x, own = features(M, D, dtype=dtype), features(M, K, D, dtype=dtype)
    own.data[3, 2] = 0
    own_dots.own_dots(x, own, unit=True).sum().backward()
    assert (own.grad[3, 2] == 0).all()
    assert x.grad.isfinite().all()
    expected = (F.normalize(own.double(), dim=-1) * x.detach().double()[:, None]).sum(dim=-1)
    torch.testing.assert_close(own_dots.own_dots(x, own, unit=True).double(), expected, rtol=1e-5, atol=1e-6)


def test_memory_is_the_gradient_s() -> None:
    """64 MB of bfloat16 negatives; their product with the queries in float32 would be 128 MB."""
    code = """
import resource, torch
import fused_contrastive as fc
def step(m):
    q, k = (torch.randn(m, 512, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    own = torch.empty(m, 16, 512, dtype=torch.bfloat16).normal_().requires_grad_()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fc.info_nce_loss(q, k, negatives=own, normalize=NORMALIZE, memory_budget=0).backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
step(64)
print(step(4096))
"""
    for normalize in (False, True):
        result = processes.run(code.replace("NORMALIZE", str(normalize)))
        assert result.returncode == 0, result.stderr
        # 64 MB are the gradient. Queries and keys take some 40 MB, on a CPU without bfloat16 products some 100.
        assert float(result.stdout) < 64 + 128


def test_negatives_made_of_the_queries(backend: str) -> None:
    """As for in-batch hard negatives. The gradient is the same with ``create_graph``."""
    a, key = features(M, D), torch.randn(M, D)
    index = torch.randint(M, (M, K))

    def loss() -> Tensor:
        query = F.normalize(a, dim=1)
        return fc.info_nce_loss(query, key, negatives=query[index], temperature=0.5, backend=backend)

    (expected,) = torch.autograd.grad(loss(), a)
    (found,) = torch.autograd.grad(loss(), a, create_graph=True)
    torch.testing.assert_close(found.detach(), expected)


def test_fillers_have_no_gradient_whatever_the_query_is() -> None:
    x, (_, own, mask) = features(M, D), ragged()
    x.data[3] = torch.inf
    own_dots.own_dots(x, own, mask).nansum().backward()
    assert (own.grad[~mask] == 0).all()


X, OWN = torch.randn(4, 3), torch.randn(4, 2, 3)
BAD = {
    "shared": (dict(negatives=X, negatives_mask=torch.ones(4, 2)), ValueError, "negatives_mask: got a tensor without"),
    "alone": (dict(negatives_mask=torch.ones(4, 2)), ValueError, "negatives_mask: got a tensor without negatives"),
    "shape": (
        dict(negatives=OWN, negatives_mask=torch.ones(4)),
        ValueError,
        r"negatives_mask: got shape \(4,\), expected",
    ),
    "values": (
        dict(negatives=OWN, negatives_mask=torch.full((4, 2), 2)),
        ValueError,
        "negatives_mask: got values from 2",
    ),
    "additive": (
        dict(negatives=OWN, negatives_mask=torch.tensor([[0, -torch.inf]] * 4)),
        ValueError,
        "negatives_mask: got values from -inf to 0",
    ),
    "a list": (
        dict(negatives=OWN, negatives_mask=[True]),
        TypeError,
        "negatives_mask: got list, expected a bool tensor",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    options, error, message = BAD[name]
    with pytest.raises(error, match=message):
        fc.info_nce_loss(X, X, **options)
