"""Late interaction with items of x's own, and with smooth maxima: against float64, by hand, and as torch sees it."""

from __future__ import annotations

import math
import random

import pytest
import torch
from token_problems import INF, NAN, check, on_device, ours, random_case, with_gradients
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fused_contrastive import max_sim

SMOOTH = (None, 0.05, 1.0, 20.0)


@pytest.fixture(autouse=True)
def python_seed(seed: int) -> None:
    random.seed(seed)


# (M, K, T, P, D). 1: a single token or item; 33, 17: one past a tile of the interpreter; 40: items longer than a tile
SHAPES = [(1, 1, 1, 1, 1), (3, 2, 1, 7, 5), (2, 3, 7, 1, 3), (4, 2, 12, 17, 16), (2, 2, 33, 9, 20), (2, 3, 40, 40, 8)]


@pytest.mark.thinned(everywhere=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("direction", ["x", "y", "both"])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("smooth", SMOOTH, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(
    shape: tuple[int, ...],
    smooth: float | None,
    own: bool,
    direction: str,
    masked: bool,
    dtype: torch.dtype,
    backend: str,
) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the triton backend does not take float64")
    if not own and smooth is None:
        pytest.skip("in test_max_sim.py")
    case = random_case(*shape, dtype, masked, repeated=random.random() < 0.3, own=own)
    budget = random.choice(["auto", 0, shape[1] * max(shape[2:4])])
    check(case, random.choice(["sum", "mean"]), direction, backend, budget, smooth)


@pytest.mark.every_level
@pytest.mark.parametrize("seed_offset", range(20))
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_random_problems(seed_offset: int, backend: str, seed: int) -> None:
    random.seed(seed + seed_offset)
    torch.manual_seed(seed + seed_offset)
    shape = [random.randint(1, limit) for limit in (9, 9, 70, 70, 40)]
    dtype, own = random.choice([torch.float32, torch.float64]), random.random() < 0.7
    smooth = random.choice(SMOOTH) if own else random.choice(SMOOTH[1:])
    case = random_case(*shape, dtype, random.random() < 0.6, random.random() < 0.3, own=own)
    reduction, direction = random.choice(["sum", "mean"]), random.choice(["x", "y", "both"])
    check(case, reduction, direction, backend, random.choice(["auto", 0, 2 * shape[1] * shape[2]]), smooth)


@pytest.mark.every_level
def test_by_hand(backend: str) -> None:
    x = torch.tensor([[1.0, -2.0], [3.0, 0.5]])[..., None].requires_grad_()
    y = torch.tensor([[[3.0, 4.0, -1.0], [0.5, 0.0, 0.25]], [[1.0, 1.0, 2.0], [-1.0, -2.0, -3.0]]])[..., None]
    y.requires_grad_()
    scores = max_sim(x, y, direction="both", backend=backend)
    # x's items alone with their own: 4 + 2, 0.5 + 0; 6 + 1, -3 - 0.5
    assert scores.x.tolist() == [[6.0, 0.5], [7.0, -3.5]]
    # y: 3 + 4 + 2, 0.5 + 0 + 0.25; 3 + 3 + 6, -0.5 - 1 - 1.5
    assert scores.y.tolist() == [[9.0, 0.75], [12.0, -3.0]]
    scores.x.sum().backward()
    assert x.grad[..., 0].tolist() == [[4.5, -1.0], [1.0, 1.0]]
    assert y.grad[..., 0].tolist() == [[[0.0, 1.0, -2.0], [1.0, -2.0, 0.0]], [[0.0, 0.0, 3.5], [3.5, 0.0, 0.0]]]


@pytest.mark.every_level
def test_smooth_by_hand(backend: str) -> None:
    """Two products, 1 and 3, at tau = 2: 2 log(e^0.5 + e^1.5), with weights 1 / (1 + e) and e / (1 + e)."""
    x, y = torch.tensor([[[1.0]]]).requires_grad_(), torch.tensor([[[1.0], [3.0]]]).requires_grad_()
    score = max_sim(x, y, smooth=2.0, backend=backend)
    score.sum().backward()
    assert score.item() == pytest.approx(2 * math.log(math.exp(0.5) + math.exp(1.5)), rel=1e-6)
    assert y.grad[0, :, 0].tolist() == pytest.approx([1 / (1 + math.e), math.e / (1 + math.e)], rel=1e-6)
    assert x.grad.item() == pytest.approx((1 + 3 * math.e) / (1 + math.e), rel=1e-6)


def test_a_small_tau_is_the_maximum(backend: str) -> None:
    case = on_device(random_case(3, 2, 5, 6, 8, torch.float32, masked=True, repeated=False, own=True))
    hard, soft = (with_gradients(ours(case, "sum", "x", backend, smooth=tau), case) for tau in (None, 1e-5))
    for a, b in zip(soft, hard, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("smooth", SMOOTH[:2], ids=str)
def test_items_of_x_s_own_are_the_diagonal_of_all_pairs(smooth: float | None, backend: str) -> None:
    case = on_device(random_case(3, 2, 5, 6, 8, torch.float32, masked=True, repeated=False, own=True))
    pairs = case._replace(y=case.y.flatten(0, 1), y_mask=case.y_mask.flatten(0, 1))
    (own,), (every,) = ours(case, "mean", "x", backend, smooth=smooth), ours(pairs, "mean", "x", backend, smooth=smooth)
    expected = torch.stack([every[m, 2 * m : 2 * m + 2] for m in range(3)])
    torch.testing.assert_close(own, expected)
    found, wanted = (torch.autograd.grad((s * case.weights[0]).sum(), (case.x, case.y)) for s in (own, expected))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("smooth", SMOOTH[:2], ids=str)
@pytest.mark.parametrize("own", [False, True])
def test_items_without_tokens_score_zero(own: bool, smooth: float | None, backend: str) -> None:
    x, y = torch.full((2, 3, 2), -1.0), torch.full((2, 2, 4, 2), 1.0)
    x[0], y[1, 0] = NAN, INF  # padding does not count
    x_mask, y_mask = torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 2, 4, dtype=torch.bool)
    x_mask[0], y_mask[1, 0] = False, False
    if not own:
        y, y_mask = y[1], y_mask[1]
    x.requires_grad_()
    y.requires_grad_()
    for score in max_sim(x, y, x_mask, y_mask, smooth=smooth, direction="both", backend=backend):
        assert score[0].tolist() == [0.0, 0.0]
        assert score[1, 0] == 0
        assert score[1, 1] < 0
        for gradient in torch.autograd.grad(score.sum(), (x, y), retain_graph=True):
            assert gradient.isfinite().all()


@pytest.mark.every_level
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter
@pytest.mark.parametrize("smooth", SMOOTH[:2], ids=str)
def test_nan_and_inf_propagate(smooth: float | None, backend: str) -> None:
    x, y = torch.ones(3, 20, 2), torch.ones(3, 2, 20, 2)
    x[0, 18, 0], y[1, 1, 19, 1], x[2, 3, 0] = NAN, INF, -INF
    scores = max_sim(x, y, smooth=smooth, backend=backend)
    assert scores[0].isnan().all()
    assert scores[1, 0].isfinite()
    assert scores[1, 1] == INF if smooth is None else scores[1, 1].isnan()
    assert (scores[2] == -INF).all()  # all products of one token are -inf


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("smooth", SMOOTH[:2], ids=str)
@pytest.mark.parametrize("own", [False, True])
def test_deterministic_whatever_the_threads(own: bool, smooth: float | None) -> None:
    case = random_case(5, 6, 40, 49, 16, torch.float32, masked=True, repeated=True, own=own)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(with_gradients(ours(case, "mean", "x", "cpp", 0, smooth), case))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("smooth", SMOOTH[:2], ids=str)
def test_strided_inputs(smooth: float | None, backend: str) -> None:
    x, y = torch.randn(4, 5, 3).transpose(0, 2), torch.randn(3, 6, 2, 4).transpose(1, 2)
    mask = torch.tensor([[[True, False] * 3, [False, True] * 3]] * 3)
    leaves = [t.detach().requires_grad_() for t in (x, y)]
    score = max_sim(*leaves, None, mask, smooth=smooth, backend=backend)
    packed = [t.detach().contiguous().requires_grad_() for t in (x, y)]
    expected = max_sim(*packed, None, mask, smooth=smooth, backend=backend)
    torch.testing.assert_close(score, expected)
    g = torch.randn(2, 3).T
    for u, v in zip(torch.autograd.grad(score, leaves, g), torch.autograd.grad(expected, packed, g), strict=True):
        torch.testing.assert_close(u, v)


@pytest.mark.parametrize("smooth", SMOOTH[:3], ids=str)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_gradcheck(own: bool, smooth: float | None, backend: str) -> None:
    case = random_case(3, 2, 4, 5, 3, torch.float64, masked=True, repeated=False, own=own)
    x, y = (t.detach().nan_to_num(0).requires_grad_() for t in (case.x, case.y))

    def scores(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return ours(case._replace(x=x, y=y), "mean", "both", backend, 0, smooth)

    assert torch.autograd.gradcheck(scores, (x, y))


@pytest.mark.parametrize("smooth", [0.0, 0.5])
def test_opcheck(smooth: float, backend: str) -> None:
    x, y = torch.randn(3, 4, 2, requires_grad=True), torch.randn(3, 2, 3, 2, requires_grad=True)
    masks = (None, torch.rand(3, 2, 3) < 0.7)
    problem = (*masks, False, smooth, 0 if smooth else 2, backend)
    torch.library.opcheck(torch.ops.fused_contrastive.max_sim_forward, (x, y, *problem))
    _, _, *argmaxima = torch.ops.fused_contrastive.max_sim_forward(x.detach(), y.detach(), *problem)
    arguments = (torch.randn(3, 2), None, *argmaxima, [True, False], x.detach(), y.detach(), *problem)
    torch.library.opcheck(torch.ops.fused_contrastive.max_sim_backward, arguments)


@pytest.mark.parametrize(("direction", "smooth"), [("x", None), ("both", None), ("both", 0.5)])
def test_compile_fullgraph_matches_eager_mode(direction: str, smooth: float | None, backend: str) -> None:
    torch._dynamo.reset()
    case = on_device(random_case(3, 2, 5, 6, 8, torch.float32, masked=True, repeated=False, own=True))

    def scores(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return ours(case._replace(x=x, y=y), "mean", direction, backend, smooth=smooth)

    compiled = torch.compile(scores, fullgraph=True, backend="aot_eager")
    results, expected = (with_gradients(f(case.x, case.y), case) for f in (compiled, scores))
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, backend: str) -> None:
    x, y = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 4, 5, 8, requires_grad=True)
    with torch.autocast(x.device.type, dtype=dtype):
        scores = max_sim(x, y, smooth=0.1, backend=backend)
    scores.sum().backward()
    assert scores.dtype == x.grad.dtype == y.grad.dtype == torch.float32
    torch.testing.assert_close(scores, max_sim(x.to(dtype), y.to(dtype), smooth=0.1, backend=backend))


def test_what_is_kept_and_what_is_multiplied(backend: str) -> None:
    """Own items alone; one byte for each maximum, nothing for smooth ones."""
    x, y = torch.randn(3, 4, 8, requires_grad=True), torch.randn(3, 2, 5, 8, requires_grad=True)
    op = torch.ops.fused_contrastive.max_sim_forward
    assert [tuple(t.shape) for t in op(x, y, None, None, False, 0.0, 2, backend)[2:]] == [(2, 2, 4), (0, 0, 0)]
    products, maxima = 2 * 3 * 2 * 4 * 5 * 8, 2 * 3 * 2 * 4 * 8
    for smooth, backward in ((None, 2 * maxima), (0.1, 3 * products)):
        with FlopCounterMode(display=False) as counter:
            scores = max_sim(x, y, smooth=smooth, backend=backend)
            assert counter.get_total_flops() == products
            scores.sum().backward()
        assert counter.get_total_flops() == products + backward


BAD = {
    "rows": ({"y_tokens": torch.ones(3, 2, 5, 8)}, "y_tokens: got 3 rows, expected 2, as many as x_tokens"),
    "D": ({"y_tokens": torch.ones(2, 2, 5, 7)}, "y_tokens: got D = 7, expected 8, the D of x_tokens"),
    "empty": ({"y_tokens": torch.ones(2, 0, 5, 8)}, r"y_tokens: got an empty batch of shape \(2, 0, 5, 8\)"),
    "mask": ({"y_mask": torch.ones(2, 5)}, r"y_mask: got shape \(2, 5\), expected a bool tensor of shape \(2, 2, 5\)"),
    "tau of 0": ({"smooth": 0}, "smooth: got 0, expected a number from 2.9e-39 to 3.4e"),
    "negative tau": ({"smooth": -1.0}, "smooth: got -1.0, expected"),
    "tau's inverse": ({"smooth": 1e-45}, "smooth: got 1e-45, expected"),
    "infinite tau": ({"smooth": INF}, "smooth: got inf, expected a finite number"),
    "tau, a flag": ({"smooth": True}, "smooth: got True, expected a number"),
    "tau, a string": ({"smooth": "1"}, "smooth: got '1', expected a number"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    changes, message = BAD[name]
    arguments = {"x_tokens": torch.ones(2, 3, 8), "y_tokens": torch.ones(2, 2, 5, 8), **changes}
    with pytest.raises((TypeError, ValueError), match=message):
        max_sim(**arguments)
