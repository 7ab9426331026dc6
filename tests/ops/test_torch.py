"""The operator as torch sees it: gradcheck, opcheck, torch.compile, autocast, transforms, double backward."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F

from fused_contrastive import ClipLoss, clip_loss, contrastive_stats
from fused_contrastive.core.spec import StatsSpec

OPTIONS = {
    "plain": {},
    "targets": {"targets": torch.tensor([3, 0, 0, 2])},
    "ids": {"row_ids": torch.tensor([0, 1, 2, 3]), "col_ids": torch.tensor([5, 0, 1, 1, 1])},
    "self": {"exclude_self": True},
    "row": {"directions": ["row"]},
    "col": {"directions": ["col"]},
}


@pytest.mark.parametrize("budget", [0, "auto", 2 * 5 * 8])
@pytest.mark.parametrize("option", OPTIONS)
def test_gradcheck(option: str, budget: object, backend: str) -> None:
    def stats(x, y, scale, bias):
        result = contrastive_stats(x, y, scale, col_bias=bias, memory_budget=budget, backend=backend, **OPTIONS[option])
        return tuple(t for t in result if t is not None)

    if backend == "triton":
        pytest.skip(
            "needs float64, which is the reference's on a GPU; test_budget.py holds its gradients to the oracle"
        )
    leaves = [torch.randn(4, 3), torch.randn(5, 3), torch.tensor(1.7), torch.randn(5)]
    assert torch.autograd.gradcheck(stats, [t.double().requires_grad_() for t in leaves])


def problem(dtype: torch.dtype, backend: str, **changes: object) -> tuple:
    x = torch.randn(5, 3, dtype=dtype, requires_grad=True)
    y = torch.randn(6, 3, dtype=dtype, requires_grad=True)
    spec = StatsSpec(torch.tensor(2.0, requires_grad=True), kept_rows=3)._replace(**changes)
    return x, y, *spec, backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_forward(dtype: torch.dtype, backend: str) -> None:
    op = torch.ops.fused_contrastive.stats_forward
    torch.library.opcheck(op, problem(dtype, backend))
    torch.library.opcheck(op, problem(dtype, backend, want_col=False, kept_rows=0))
    ids = {"row_ids": torch.arange(5), "col_ids": torch.arange(6) // 2}
    bias = torch.randn(6, requires_grad=True)
    torch.library.opcheck(op, problem(dtype, backend, targets=torch.arange(5), col_bias=bias, **ids))


def test_opcheck_backward(backend: str) -> None:
    inputs = problem(torch.float32, backend)
    _, row, col, kept = (t.detach() for t in torch.ops.fused_contrastive.stats_forward(*inputs))
    detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in inputs]
    arguments = (torch.randn(5), torch.randn(5), torch.randn(6), row, col, kept, [True, True, True, False], *detached)
    torch.library.opcheck(torch.ops.fused_contrastive.stats_backward, arguments)


def loss_and_gradients(loss, n: int, dtype: torch.dtype = torch.float32, d: int = 16):
    generator = torch.Generator().manual_seed(n)
    features = [F.normalize(torch.randn(n, d, generator=generator, device="cpu"), dim=1) for _ in range(2)]
    leaves = [t.to(torch.get_default_device(), dtype).requires_grad_() for t in features]
    leaves.append(torch.tensor(14.3, requires_grad=True))
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def test_compile_fullgraph_matches_eager_mode(backend: str) -> None:
    torch._dynamo.reset()
    module = ClipLoss(backend=backend, label_smoothing=0.1)
    compiled = torch.compile(module, fullgraph=True)
    for a, b in zip(loss_and_gradients(compiled, 40), loss_and_gradients(module, 40), strict=True):
        torch.testing.assert_close(a, b)


def test_compile_does_not_recompile_per_batch_size(backend: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ClipLoss(backend=backend), fullgraph=True, backend=counter)
    for n in range(20, 60, 3):
        for a, b in zip(loss_and_gradients(compiled, n), loss_and_gradients(clip_loss, n), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2  # the first size, then a dynamic one


def test_through_the_operator_and_directly_are_the_same() -> None:
    """Plain eager tensors bypass the registered operator; a subclass does not."""

    class Subclass(torch.Tensor):
        pass

    x, y = torch.randn(8, 4), torch.randn(8, 4)
    direct = [t.clone().requires_grad_() for t in (x, y)]
    through = [t.clone().as_subclass(Subclass).requires_grad_() for t in (x, y)]
    a, b = (sum(t.sum() for t in contrastive_stats(*leaves, 3.0)) for leaves in (direct, through))
    assert torch.equal(a, b.as_subclass(torch.Tensor))
    gradients = zip(torch.autograd.grad(a, direct), torch.autograd.grad(b, through), strict=True)
    assert all(torch.equal(g, h.as_subclass(torch.Tensor)) for g, h in gradients)


@pytest.mark.parametrize("through_operator", [False, True])
def test_double_backward_raises(through_operator: bool, backend: str) -> None:
    x, y = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    if through_operator:
        x = x.detach().as_subclass(type("Subclass", (torch.Tensor,), {})).requires_grad_()
    (gradient,) = torch.autograd.grad(clip_loss(x, y, 2.0, backend=backend), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.sum().backward()


def test_backward_twice_over_a_retained_graph(backend: str) -> None:
    x, y = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    loss = clip_loss(x, y, 2.0, backend=backend)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, backend: str) -> None:
    """float32 features are cast to half as in a matmul; the loss stays float32, and gradients reach the leaves."""
    x, y = torch.randn(30, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    with torch.autocast(x.device.type, dtype=dtype):
        loss = clip_loss(x, y, torch.tensor(2.0), backend=backend, label_smoothing=0.1)
    loss.backward()
    expected = clip_loss(x.to(dtype), y.to(dtype), 2.0, backend=backend, label_smoothing=0.1)
    assert loss.dtype == torch.float32
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


def test_no_logits_are_kept_without_a_gradient(backend: str) -> None:
    x = torch.randn(8, 4)
    assert clip_loss(x, x, 1.0, backend=backend).grad_fn is None
    with torch.no_grad():
        assert clip_loss(x.requires_grad_(), x, 1.0, backend=backend).grad_fn is None


def test_module_is_plain() -> None:
    module = ClipLoss(decoupled=True, label_smoothing=0.1)
    assert not list(module.parameters())
    assert not module.state_dict()
    assert "decoupled=True" in repr(module)
