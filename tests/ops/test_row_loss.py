"""Losses whose gradients are formed in the forward (ops/row_loss.py), against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_contrastive as fc
from fused_contrastive.backends import cpp

pytestmark = pytest.mark.skipif(cpp.BACKEND.unavailable() is not None, reason="backend cpp cannot run here")

M, N, D = 700, 1300, 34  # several sections of rows, groups of columns and tiles, the last ones partial

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "decoupled": {"decoupled": True},
    "margin": {"margin": 0.4},
    "targets": {"targets": True},
    "bias": {"col_bias": True},
    "ids": {"row_ids": True, "col_ids": True},
    "targets, bias and margin": {"targets": True, "col_bias": True, "margin": 0.4},
}


def info_nce(names: dict[str, Any], **at: Any) -> tuple[Callable[..., Tensor], dict[str, Tensor], dict[str, Any]]:
    leaves = {"query": F.normalize(torch.randn(M, D)), "key": F.normalize(torch.randn(N, D))}
    leaves["logit_scale"] = torch.tensor(9.0)
    options = dict(names)
    if options.pop("col_bias", False):
        leaves["col_bias"] = torch.randn(N)
    if options.get("targets"):
        options["targets"] = torch.randint(N, (M,))
    for name, size in (("row_ids", M), ("col_ids", N)):
        if options.get(name):
            options[name] = torch.randint(50, (size,))
    return fc.info_nce_loss, leaves, {**options, **at}


def run(
    loss: Callable[..., Tensor], leaves: dict[str, Tensor], options: dict[str, Any], factor: float = 1.0
) -> tuple[dict[str, Tensor], str]:
    """Loss and gradients in float64, and the names of the graph's nodes."""
    held = {name: t.detach().clone().requires_grad_() for name, t in leaves.items()}
    found = loss(**held, **options)
    graph, nodes = "", [found.grad_fn]
    while nodes:
        node = nodes.pop()
        graph += f"{node.name()} "
        nodes += [n for n, _ in node.next_functions if n is not None] if node is not None else []
    (factor * found).backward()
    results = {name: t.grad.double() for name, t in held.items() if t.grad is not None}
    return {"loss": found.detach().double(), **results}, graph


def assert_close(found: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        error = (found[name] - value).abs().max() / value.abs().max()
        assert error <= tolerance, f"{name}: {error}"


DTYPES = {torch.float32: 3e-6, torch.float64: 1e-13, torch.bfloat16: 8e-3, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_info_nce(name: str, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    loss, leaves, options = info_nce(CASES[name])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {k: t.to(dtype if k in ("query", "key") else wide) for k, t in leaves.items()}
    found, graph = run(loss, leaves, {**options, "memory_budget": 0, "backend": "cpp"})
    assert "GradientsInTheForward" in graph
    truth, graph = run(loss, {k: t.double() for k, t in leaves.items()}, {**options, "backend": "reference"})
    assert "GradientsInTheForward" not in graph
    assert_close(found, truth, DTYPES[dtype])


@pytest.mark.every_level  # products by the vendor's GEMM and by ours
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_features_normalised_where_they_are_read(dtype: torch.dtype, seed: int) -> None:
    for name in CASES:
        torch.manual_seed(seed)
        loss, leaves, options = info_nce(CASES[name], normalize=True)
        lengths = 10 ** torch.randn(M)  # far apart; one is 0, and its row gets no gradient
        lengths[3] = 0
        leaves = {k: t.to(dtype) for k, t in leaves.items()}
        leaves["query"] = lengths[:, None].to(dtype) * leaves["query"]
        found, graph = run(loss, leaves, {**options, "memory_budget": 0, "backend": "cpp"})
        assert "GradientsInTheForward" in graph
        assert "Normalize" not in graph
        truth, _ = run(loss, {k: t.double() for k, t in leaves.items()}, {**options, "backend": "reference"})
        for results in (found, truth):  # the gradient of a short row is large
            assert (results["query"][3] == 0).all()
            results["query"] *= lengths[:, None].to(dtype).double()
        assert_close(found, truth, DTYPES[dtype])


def test_normalised_negatives_are_columns(seed: int) -> None:
    torch.manual_seed(seed)
    loss, leaves, options = info_nce({}, normalize=True)
    leaves["negatives"] = 5 * torch.randn(90, D)
    found, graph = run(loss, leaves, {**options, "memory_budget": 0, "backend": "cpp"})
    assert "GradientsInTheForward" in graph
    truth, _ = run(loss, {k: t.double() for k, t in leaves.items()}, {**options, "backend": "reference"})
    assert_close(found, truth, 3e-6)


@pytest.mark.parametrize("ids", [False, True])
def test_siglip(ids: bool, seed: int) -> None:
    torch.manual_seed(seed)
    leaves = {"image_features": torch.randn(M, D) / 6, "text_features": torch.randn(M, D) / 6}
    leaves |= {"logit_scale": torch.tensor(5.0), "logit_bias": torch.tensor(-3.0)}
    options = {"row_ids": torch.arange(M) // 3, "col_ids": torch.arange(M) // 3} if ids else {}
    found, graph = run(fc.siglip_loss, leaves, {**options, "memory_budget": 0, "backend": "cpp"})
    assert "GradientsInTheForward" in graph
    truth, _ = run(fc.siglip_loss, {k: t.double() for k, t in leaves.items()}, {**options, "backend": "reference"})
    assert_close(found, truth, 3e-6)


def test_float16_gradients_survive_a_scaler(seed: int) -> None:
    """Each is below float16's smallest number until it is multiplied by the upstream gradient."""
    torch.manual_seed(seed)
    loss, leaves, options = info_nce({}, memory_budget=0, backend="cpp")
    leaves = {k: t.half() if t.dim() else t for k, t in leaves.items()}
    scaled, _ = run(lambda **a: loss(**a) * 1e-6, leaves, options, factor=2.0**20)
    truth, _ = run(lambda **a: loss(**a) * 1e-6, {k: t.double() for k, t in leaves.items()}, options, factor=2.0**20)
    assert_close(scaled, truth, 2e-3)


PAIR = {"image_features": (M, D), "text_features": (M, D)}
KEPT: dict[str, tuple[Callable[..., Tensor], dict[str, tuple[int, ...]], dict[str, Any]]] = {
    "clip": (fc.clip_loss, PAIR, {}),
    "clip decoupled sum": (fc.clip_loss, PAIR, {"decoupled": True, "reduction": "sum"}),
    "symmetric InfoNCE": (fc.info_nce_loss, {"query": (M, D), "key": (M, D)}, {"symmetric": True, "margin": 0.3}),
    "with negatives": (
        fc.info_nce_loss,
        {"query": (M, D), "key": (M, D), "negatives": (N - M, D)},
        {"symmetric": True},
    ),
    "NT-Xent": (fc.nt_xent_loss, {"z1": (M, D), "z2": (M, D)}, {"normalize": True}),
    "SupCon": (fc.supcon_loss, {"features": (M, D)}, {"normalize": True, "labels": torch.arange(M) ** 2 // 3000}),
    "SupCon sum": (fc.supcon_loss, {"features": (M, D)}, {"reduction": "sum", "labels": torch.arange(M) // 3}),
    "NT-Xent decoupled": (fc.nt_xent_loss, {"z1": (M, D), "z2": (M, D)}, {"normalize": False, "decoupled": True}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KEPT)
def test_columns_and_triangles_where_all_products_are_kept(name: str, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    loss, shapes, options = KEPT[name]
    leaves = {k: F.normalize(torch.randn(shape)).to(dtype) for k, shape in shapes.items()}
    leaves["logit_scale"] = torch.tensor(9.0, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    found, graph = run(loss, leaves, {**options, "memory_budget": 2**30, "backend": "cpp"})
    assert "GradientsInTheForward" in graph
    truth, _ = run(loss, {k: t.double() for k, t in leaves.items()}, {**options, "backend": "reference"})
    assert_close(found, truth, DTYPES[dtype])
    again, graph = run(loss, leaves, {**options, "memory_budget": 0, "backend": "cpp"})
    assert "GradientsInTheForward" not in graph
    assert_close(again, truth, DTYPES[dtype])


def test_only_where_it_saves_something() -> None:
    loss, leaves, options = info_nce({}, backend="cpp")
    for more in ({"reduction": "none"}, {"label_smoothing": 0.1}, {"weight": torch.ones(M)}):
        held = {k: t.requires_grad_() for k, t in leaves.items()}
        node = loss(**held, **options, memory_budget=0, **more).grad_fn
        assert "GradientsInTheForward" not in node.name()
    with torch.no_grad():
        assert loss(**leaves, **options, memory_budget=0).grad_fn is None


def test_a_second_backward_through_a_retained_graph(seed: int) -> None:
    torch.manual_seed(seed)
    loss, leaves, options = info_nce({}, memory_budget=0, backend="cpp")
    held = {k: t.requires_grad_() for k, t in leaves.items()}
    found = loss(**held, **options)
    first = torch.autograd.grad(3 * found, list(held.values()), retain_graph=True)
    second = torch.autograd.grad(3 * found, list(held.values()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(found, list(held.values()))


def test_double_backward_raises() -> None:
    loss, leaves, options = info_nce({}, memory_budget=0, backend="cpp")
    query = leaves["query"].requires_grad_()
    (gradient,) = torch.autograd.grad(loss(**leaves, **options), query, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.sum().backward()


def test_wrong_targets_raise() -> None:
    loss, leaves, options = info_nce({}, memory_budget=0, backend="cpp")
    leaves["query"].requires_grad_()
    with pytest.raises(ValueError, match="targets: got"):
        loss(**leaves, **options, targets=torch.full((M,), N))


def bits(count: int, loss: Callable[..., Tensor], leaves: dict[str, Tensor], options: dict[str, Any]) -> list[Tensor]:
    torch.set_num_threads(count)
    return list(run(loss, leaves, options)[0].values())


@pytest.mark.usefixtures("threads")
def test_the_number_of_threads_changes_no_bit(seed: int) -> None:
    torch.manual_seed(seed)
    problem = info_nce({}, memory_budget=0, backend="cpp")
    first = bits(1, *problem)
    for count in (2, 3, 9):
        assert all(map(torch.equal, first, bits(count, *problem)))


@pytest.mark.usefixtures("threads")
def test_nor_of_rows_so_long_that_few_are_held(seed: int) -> None:
    """The number of rows held at once must not depend on the size of a section, which grows beyond 8 threads."""
    torch.manual_seed(seed)
    leaves = {"query": torch.randn(1000, D), "key": torch.randn(24576, D)}
    problem = fc.info_nce_loss, leaves, {"memory_budget": 0, "backend": "cpp"}
    assert all(map(torch.equal, bits(8, *problem), bits(9, *problem)))
