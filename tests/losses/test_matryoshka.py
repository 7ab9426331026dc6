"""``dims``: the weighted sum of the losses of nested prefixes, against a loop over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_contrastive as fc

N, D = 70, 40
DIMS, WEIGHTS = (3, 16, 33), (2.0, 0.5, -1.0)


def problem(dtype: torch.dtype = torch.float32, n: int = N) -> list[Tensor]:
    x, y = (F.normalize(torch.randn(n, D, dtype=torch.float64), dim=1).to(dtype) for _ in range(2))
    scale = torch.tensor(7.0, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return [t.requires_grad_() for t in (x, y, scale)]


def clip(x: Tensor, y: Tensor, scale: Tensor, **options: Any) -> Tensor:
    return fc.clip_loss(x, y, scale, **options)


def info_nce(x: Tensor, y: Tensor, scale: Tensor, **options: Any) -> Tensor:
    return fc.info_nce_loss(x, y, logit_scale=scale, **options)


def loop(loss: Callable[..., Tensor], x: Tensor, y: Tensor, scale: Tensor, **options: Any) -> Tensor:
    shared = options.pop("negatives", None)
    losses = []
    for dim, weight in zip(DIMS, WEIGHTS, strict=True):
        own = {} if shared is None else {"negatives": shared[:, :dim]}
        losses.append(weight * loss(x[:, :dim], y[:, :dim], scale, **own, **options))
    return torch.stack(losses).sum(dim=0)


IDS = torch.arange(N) % 11
SHARED = torch.randn(9, D)
CASES: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "clip": (clip, {}),
    "clip normalized": (clip, {"normalize": True}),
    "clip decoupled": (clip, {"decoupled": True, "reduction": "none"}),
    "clip ids": (clip, {"row_ids": IDS, "col_ids": IDS, "normalize": True}),
    "clip weight": (clip, {"weight": torch.rand(N), "normalize": True}),
    "clip recomputed": (clip, {"memory_budget": 0, "normalize": True}),
    "clip some kept": (clip, {"memory_budget": 64 * N * 4}),
    "info_nce": (info_nce, {}),
    "info_nce normalized": (info_nce, {"normalize": True, "reduction": "sum"}),
    "info_nce targets": (info_nce, {"targets": torch.arange(N).flip(0) // 2, "normalize": True}),
    "info_nce negatives": (info_nce, {"negatives": SHARED, "normalize": True}),
    "info_nce symmetric": (info_nce, {"negatives": SHARED, "symmetric": True, "margin": 0.3}),
}


def close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b.double()).norm() <= tolerance * b.double().norm()


@pytest.mark.parametrize("case", CASES)
def test_same_as_a_loop(case: str, backend: str) -> None:
    loss, options = CASES[case]
    inputs = problem()
    value = loss(*inputs, dims=DIMS, dim_weights=WEIGHTS, backend=backend, **options)
    expected = loop(loss, *inputs, backend="reference", **options)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    gradients = (torch.autograd.grad(each.sum(), inputs) for each in (value, expected))
    close(*gradients, tolerance=1e-5)


def test_several_tiles_and_threads_do_not_matter() -> None:
    """More rows than a section, and columns than a group of the C++ backend."""
    inputs = problem(torch.float64, n=1100)
    value = clip(*inputs, dims=DIMS, dim_weights=WEIGHTS, normalize=True, backend="cpp")
    expected = loop(clip, *inputs, normalize=True, backend="reference")
    close((value,), (expected,), 1e-12)
    close(torch.autograd.grad(value, inputs), torch.autograd.grad(expected, inputs), 1e-11)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_gradients_of_some(needed: tuple[int, ...], backend: str) -> None:
    inputs = [t.detach() for t in problem()]
    leaves = [inputs[k].requires_grad_() for k in needed]
    found = torch.autograd.grad(clip(*inputs, dims=DIMS, dim_weights=WEIGHTS, normalize=True, backend=backend), leaves)
    close(found, torch.autograd.grad(loop(clip, *inputs, normalize=True, backend=backend), leaves), 1e-5)


def test_columns_beyond_the_last_prefix_get_no_gradient(backend: str) -> None:
    inputs = problem()
    dx, dy, _ = torch.autograd.grad(clip(*inputs, dims=(4, 30), normalize=True, backend=backend), inputs)
    assert not dx[:, 30:].any()
    assert not dy[:, 30:].any()
    assert dx[:, :30].any(dim=0).all()


def test_a_short_prefix_gets_no_gradient(backend: str) -> None:
    """It counts as zeros, in the loss of its own length alone."""
    inputs = problem()
    inputs[0].data[5, :4] = 0
    loss = clip(*inputs, dims=(4,), normalize=True, backend=backend)
    dx, dy, _ = torch.autograd.grad(loss, inputs)
    assert not dx[5].any()
    assert dy[5].any()
    both = clip(*inputs, dims=(4, D), normalize=True, backend=backend)
    found = torch.autograd.grad(both, inputs)
    whole = torch.autograd.grad(clip(*inputs, normalize=True, backend=backend), inputs)
    torch.testing.assert_close(found[0][5], whole[0][5], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, backend: str) -> None:
    inputs = problem(dtype)
    value = clip(*inputs, dims=DIMS, normalize=True, backend=backend)
    assert value.dtype == torch.float32
    double = [t.detach().double().requires_grad_() for t in inputs]
    expected = clip(*double, dims=DIMS, normalize=True, backend="reference")
    close(torch.autograd.grad(value, inputs), torch.autograd.grad(expected, double), 3e-2)


def test_autocast_casts_the_features() -> None:
    x, y, scale = problem()
    with torch.autocast("cpu", torch.bfloat16):
        value = clip(x, y, scale, dims=DIMS, normalize=True)
    assert torch.equal(value, clip(x.bfloat16(), y.bfloat16(), scale, dims=DIMS, normalize=True))
    assert torch.autograd.grad(value, x)[0].dtype == torch.float32


@pytest.mark.parametrize("case", ["clip normalized", "info_nce symmetric"])
def test_compiled_in_one_graph(case: str) -> None:
    loss, options = CASES[case]
    inputs = problem()

    def step(*leaves: Tensor) -> Tensor:
        return loss(*leaves, dims=DIMS, dim_weights=WEIGHTS, **options)

    value = torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs)
    expected = step(*inputs)
    close((value,), (expected,), 1e-6)
    close(torch.autograd.grad(value, inputs), torch.autograd.grad(expected, inputs), 1e-5)


def test_torch_func_and_double_backward() -> None:
    inputs = problem()
    found = torch.func.grad(lambda x: clip(x, *inputs[1:], dims=DIMS))(inputs[0].detach())
    (expected,) = torch.autograd.grad(clip(*inputs, dims=DIMS), inputs[:1], create_graph=True)
    torch.testing.assert_close(found, expected.detach())
    with pytest.raises(RuntimeError, match="double backward"):
        expected.sum().backward()


def test_modules() -> None:
    x, y, scale = problem()
    for made in (fc.ClipLoss, fc.InfoNCELoss):
        module = made(dims=DIMS, dim_weights=WEIGHTS, normalize=True)
        assert "dims=(3, 16, 33), dim_weights=(2.0, 0.5, -1.0)" in repr(module)
    assert torch.equal(
        fc.ClipLoss(dims=DIMS, normalize=True)(x, y, scale), clip(x, y, scale, dims=DIMS, normalize=True)
    )
    with pytest.raises(ValueError, match=r"^dims: got"):
        fc.InfoNCELoss(dims=(8, 4))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"dims": ()}, r"dims: got \(\), expected increasing integers from 1 on, at least one"),
    ({"dims": (16, 8)}, r"dims: got \(16, 8\), expected increasing"),
    ({"dims": (8, 8)}, r"dims: got \(8, 8\), expected increasing"),
    ({"dims": (0, 8)}, r"dims: got \(0, 8\), expected increasing"),
    ({"dims": (8, 41)}, r"dims: got \(8, 41\), expected at most 40, the D of (image_features|query)"),
    ({"dims": (8, 9.5)}, r"dims: got \(8, 9.5\), expected a sequence of increasing integers"),
    ({"dims": (True, 8)}, r"dims: got \(True, 8\), expected a sequence"),
    ({"dims": 8}, "dims: got 8, expected a sequence"),
    ({"dims": "8"}, "dims: got '8', expected a sequence"),
    ({"dims": torch.tensor([8])}, "dims: got tensor"),
    ({"dims": (8, 40), "dim_weights": (1.0,)}, r"dim_weights: got \(1.0,\), expected 2 numbers"),
    ({"dims": (8, 40), "dim_weights": (1.0, float("nan"))}, "dim_weights: got nan, expected a finite number"),
    ({"dims": (8, 40), "dim_weights": (1.0, "2")}, "dim_weights: got '2', expected a number"),
    ({"dims": (8, 40), "dim_weights": 1.0}, "dim_weights: got 1.0, expected a sequence of 2 numbers"),
    ({"dim_weights": (1.0,)}, r"dim_weights: got \(1.0,\) without dims, expected None"),
]


@pytest.mark.parametrize(("bad", "message"), BAD, ids=str)
@pytest.mark.parametrize("loss", [clip, info_nce])
def test_bad_input(loss: Callable[..., Tensor], bad: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        loss(*problem(), **bad)


REFUSED: dict[str, Any] = {
    "lengths": torch.tensor([N]),
    "absolute_margin": 0.1,
    "relative_margin": 0.1,
    "guide": (torch.randn(N, 3), torch.randn(N, 3)),
    "debias": 0.1,
    "hardness": 0.5,
    "label_smoothing": 0.1,
    "metrics": True,
    "equal_ids": "mean",
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("loss", [clip, info_nce])
def test_refused_by_name(loss: Callable[..., Tensor], name: str) -> None:
    ids = {"row_ids": IDS, "col_ids": IDS} if name == "equal_ids" else {}
    with pytest.raises(NotImplementedError, match=f"^{name}: got it together with dims"):
        loss(*problem(), dims=DIMS, **{name: REFUSED[name]}, **ids)


@pytest.mark.parametrize("name", ["absolute_margin", "relative_margin"])
@pytest.mark.parametrize("loss", [clip, info_nce])
def test_a_margin_of_0_is_one(loss: Callable[..., Tensor], name: str) -> None:
    with pytest.raises(NotImplementedError, match=f"^{name}: got it together with dims"):
        loss(*problem(), dims=DIMS, **{name: 0.0})


def test_features_of_groups_are_refused_by_their_name() -> None:
    with pytest.raises(NotImplementedError, match=r"^image_features: got it together with dims"):
        fc.clip_loss(torch.randn(2, 5, 8), torch.randn(2, 5, 8), 1.0, dims=(4,))


@pytest.mark.parametrize("name", ["absolute_margin", "debias", "hardness", "label_smoothing", "equal_ids"])
@pytest.mark.parametrize("module", [fc.ClipLoss, fc.InfoNCELoss])
def test_modules_refuse_at_construction(module: Any, name: str) -> None:
    with pytest.raises(NotImplementedError, match=f"^{name}: got it together with dims"):
        module(dims=DIMS, **{name: REFUSED[name]})


@pytest.mark.parametrize(("name", "value"), [("negatives", torch.randn(N, 2, D)), ("col_bias", torch.zeros(N))])
def test_refused_by_info_nce(name: str, value: Tensor) -> None:
    with pytest.raises(NotImplementedError, match=f"^{name}: got it together with dims"):
        info_nce(*problem(), dims=DIMS, **{name: value})


OPERANDS: dict[str, Any] = {
    "x": torch.randn(6, 8), "y": torch.randn(6, 8), "scale": torch.tensor(1.0), "targets": None, "row_ids": None,
    "col_ids": None, "dims": [4, 8], "normalize": True, "want_col": True, "kept_rows": 0, "kept_prefixes": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("x", {"x": torch.randn(8)}),
        ("y", {"y": torch.randn(6, 7)}),
        ("scale", {"scale": torch.ones(2)}),
        ("targets", {"targets": torch.full((6,), 9)}),
        ("row_ids, col_ids", {"row_ids": torch.arange(6)}),
        ("dims", {"dims": []}),
        ("dims", {"dims": [4, 9]}),
        ("dims", {"dims": [4, 4]}),
        ("kept_rows", {"kept_rows": 7}),
        ("kept_prefixes", {"kept_prefixes": 3}),
        ("kept_prefixes", {"kept_prefixes": -1}),
    ],
)
def test_bad_operands(name: str, bad: dict[str, Any], backend: str) -> None:
    operator = torch.ops.fused_contrastive.prefixes_forward
    pos, row, col, kept = operator(*OPERANDS.values(), backend)
    with pytest.raises((TypeError, ValueError), match=f"^{name}: "):
        operator(*{**OPERANDS, **bad}.values(), backend)
    backward = torch.ops.fused_contrastive.prefixes_backward
    saved: dict[str, Any] = {"g_pos": pos, "g_row": row, "g_col": col, "row": row, "col": col, "kept": kept}
    backward(*saved.values(), [True] * 3, *OPERANDS.values(), backend)
    for broken in ("g_pos", "g_row", "g_col", "row", "col"):
        with pytest.raises((TypeError, ValueError), match=f"^{broken}: "):
            backward(*{**saved, broken: torch.ones(2, 3)}.values(), [True] * 3, *OPERANDS.values(), backend)
    with pytest.raises(ValueError, match=r"^needs: "):
        backward(*saved.values(), [True], *OPERANDS.values(), backend)


def test_kept_products_that_are_too_few_raise() -> None:
    operator = torch.ops.fused_contrastive
    options = {**OPERANDS, "kept_rows": 6, "kept_prefixes": 1}
    pos, row, col, kept = operator.prefixes_forward(*options.values(), "cpp")
    assert kept.shape == (6, 6)
    with pytest.raises(ValueError, match=r"^kept: "):
        operator.prefixes_backward(pos, row, col, row, col, kept[:3], [True] * 3, *options.values(), "cpp")
