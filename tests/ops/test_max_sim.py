"""Late interaction: by hand, against a float64 einsum, and as torch sees it."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from token_problems import INF, NAN, check, on_device, ours, random_case, with_gradients
from torch import Tensor

from fused_contrastive import MaxSimScores, max_sim
from fused_contrastive.core.memory import rows_to_keep


@pytest.fixture(autouse=True)
def python_seed(seed: int) -> None:
    random.seed(seed)


# 1: a single token or item; 33, 17: one past a tile of the interpreter; 40: items of x longer than a tile; 5, 3: odd D
SHAPES = [(1, 1, 1, 1, 1), (3, 2, 1, 7, 5), (2, 3, 7, 1, 3), (5, 2, 12, 17, 16), (2, 2, 33, 9, 20), (2, 3, 40, 40, 8)]


@pytest.mark.thinned
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("direction", ["x", "y", "both"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(
    shape: tuple[int, ...], direction: str, masked: bool, dtype: torch.dtype, backend: str
) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the triton backend does not take float64")
    case = random_case(*shape, dtype, masked, repeated=random.random() < 0.3)
    budget = random.choice(["auto", 0, shape[1] * max(shape[2:4])])
    check(case, random.choice(["sum", "mean"]), direction, backend, budget)


@pytest.mark.every_level
@pytest.mark.parametrize("seed_offset", range(20))
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_random_problems(seed_offset: int, backend: str, seed: int) -> None:
    random.seed(seed + seed_offset)
    torch.manual_seed(seed + seed_offset)
    shape = [random.randint(1, limit) for limit in (9, 9, 40, 70, 40)]
    case = random_case(*shape, torch.float64, random.random() < 0.6, random.random() < 0.3)
    reduction, direction = random.choice(["sum", "mean"]), random.choice(["x", "y", "both"])
    check(case, reduction, direction, backend, random.choice(["auto", 0, 2 * shape[1] * sum(shape[2:4])]))


@pytest.mark.every_level
@pytest.mark.parametrize("lengths", [(1500, 5), (3, 2100), (1030, 1100)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_items_longer_than_a_block_of_the_cpp_backend(lengths: tuple[int, int], masked: bool) -> None:
    case = random_case(2, 2, *lengths, 6, torch.float32, masked, repeated=True)
    for budget in ("auto", 0):
        check(case, "sum", "both", "cpp", budget)


def tokens(values: list[list[float]]) -> Tensor:
    """Tokens with D = 1."""
    return torch.tensor(values)[..., None].requires_grad_()


@pytest.mark.every_level
def test_by_hand(backend: str) -> None:
    x, y = tokens([[1.0, -2.0]]), tokens([[3.0, 4.0, -1.0], [0.5, 0.0, 0.25]])
    # x_0 = 1 has its maxima at 4 and 0.5, x_1 = -2 at -1 and 0
    scores = max_sim(x, y, direction="both", backend=backend)
    assert isinstance(scores, MaxSimScores)
    assert scores.x.tolist() == [[6.0, 0.5]]
    # y: max(3, -6) + max(4, -8) + max(-1, 2); max(0.5, -1) + max(0, 0) + max(0.25, -0.5)
    assert scores.y.tolist() == [[9.0, 0.75]]
    scores.x.sum().backward(retain_graph=True)
    assert x.grad[0, :, 0].tolist() == [4.5, -1.0]
    assert y.grad[..., 0].tolist() == [[0.0, 1.0, -2.0], [1.0, -2.0, 0.0]]
    x.grad = y.grad = None
    scores.y.sum().backward()
    assert x.grad[0, :, 0].tolist() == [3.0 + 4.0 + 0.5 + 0.0 + 0.25, -1.0]  # in the tie at 0, x_0 is the first
    assert y.grad[..., 0].tolist() == [[1.0, 1.0, -2.0], [1.0, 1.0, 1.0]]
    assert max_sim(x, y, reduction="mean", backend=backend).tolist() == [[3.0, 0.25]]
    assert max_sim(x, y, reduction="mean", direction="y", backend=backend).tolist() == [[3.0, 0.25]]


@pytest.mark.every_level
def test_the_first_of_equal_tokens_gets_the_gradient(backend: str) -> None:
    x, y = tokens([[1.0]]), tokens([[2.0, 5.0, 5.0, 5.0]])
    mask = torch.tensor([[True, False, True, True]])
    max_sim(x, y, None, mask, backend=backend).sum().backward()
    assert y.grad[0, :, 0].tolist() == [0.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_items_without_tokens_score_zero(reduction: str, backend: str) -> None:
    x, y = torch.full((2, 3, 2), -1.0), torch.full((3, 4, 2), 1.0)
    x[0], y[1] = NAN, INF  # padding does not count
    x.requires_grad_()
    y.requires_grad_()
    x_mask, y_mask = torch.ones(2, 3, dtype=torch.bool), torch.ones(3, 4, dtype=torch.bool)
    x_mask[0], y_mask[1] = False, False
    for score in max_sim(x, y, x_mask, y_mask, reduction=reduction, direction="both", backend=backend):
        expected = torch.full((2, 3), score[1, 0].item())
        expected[0], expected[:, 1] = 0, 0
        assert score[1, 0] < 0
        assert torch.equal(score, expected)
        dx, dy = torch.autograd.grad(score.sum(), (x, y), retain_graph=True)
        assert dx[0].abs().max() == 0
        assert dy[1].abs().max() == 0
        assert dx.isfinite().all()
        assert dy.isfinite().all()


@pytest.mark.every_level
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter
def test_nan_and_inf_propagate(backend: str) -> None:
    x, y = torch.ones(3, 20, 2), torch.ones(2, 20, 2)
    x[0, 18, 0], y[1, 19, 1], x[2, 3, 0] = NAN, INF, -INF
    for scores in max_sim(x, y, direction="both", backend=backend):
        assert scores[0].isnan().all()
        assert scores[1, 0] == 40
        assert scores[1, 1] == INF
    scores = max_sim(x, y, backend=backend)
    assert scores[2, 0] == -INF  # all products of one token are -inf
    assert scores[2, 1].isnan()  # -inf + inf


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_token_with_nothing_but_minus_infinity_has_a_maximum(backend: str) -> None:
    """Its maximum is the first real token, not one of the padding."""
    x, y = tokens([[-INF, 1.0]]), tokens([[7.0, 2.0, 3.0]])
    mask = torch.tensor([[False, True, True]])
    max_sim(x, y, None, mask, backend=backend).sum().backward()
    assert x.grad[0, :, 0].tolist() == [2.0, 3.0]
    assert y.grad[0, 0, 0] == 0


@pytest.mark.parametrize("direction", ["x", "y", "both"])
def test_memory_budgets_give_the_same(direction: str, backend: str) -> None:
    case = on_device(random_case(3, 2, 4, 6, 8, torch.float32, masked=True, repeated=False))
    results = [
        with_gradients(ours(case, "sum", direction, backend, budget), case)
        for budget in ("auto", 0, 2 * 6 * 2, 2 * 10 * 2)
    ]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_what_is_kept_is_one_byte_for_each_of_the_tokens(backend: str) -> None:
    x, y = torch.randn(3, 4, 2, requires_grad=True), torch.randn(2, 256, 2)
    op = torch.ops.fused_contrastive.max_sim_forward
    _, _, argmax_x, argmax_y = op(x, y, None, None, True, 0.0, 2, backend)
    assert argmax_x.shape == (2, 2, 4)
    assert argmax_x.dtype == torch.uint8
    assert argmax_y.shape == (2, 2, 256)
    _, _, argmax_x, argmax_y = op(x, torch.cat([y, y[:, :1]], dim=1), None, None, False, 0.0, 2, backend)
    assert argmax_x.dtype == torch.int16
    assert argmax_y.numel() == 0
    assert rows_to_keep(8, ((64, 2 * 4), torch.uint8), 3 * 8 + 1, x.device) == 3


def test_indices_beyond_a_byte(backend: str) -> None:
    """300 tokens: the last one is the maximum."""
    x, y = torch.ones(2, 1, 1, requires_grad=True), torch.zeros(1, 300, 1)
    y[0, 299] = 1
    y.requires_grad_()
    max_sim(x, y, backend=backend).sum().backward()
    assert y.grad[0, :, 0].nonzero().tolist() == [[299]]


@pytest.mark.usefixtures("threads")
def test_deterministic_whatever_the_threads() -> None:
    case = random_case(20, 30, 32, 49, 16, torch.float32, masked=True, repeated=True)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(with_gradients(ours(case, "mean", "both", "cpp", 0), case))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_deterministic(backend: str) -> None:
    case = on_device(random_case(4, 5, 6, 7, 8, torch.float32, masked=True, repeated=True))
    first, second = (with_gradients(ours(case, "sum", "both", backend), case) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def strided(t: Tensor) -> Iterator[Tensor]:
    yield t.transpose(0, 2).contiguous().transpose(0, 2)
    yield torch.cat([t, t], dim=2)[:, :, : t.shape[2]]
    yield torch.stack([t, t], dim=1)[:, 1]
    yield t[:1].expand(t.shape[0], -1, -1)


def test_strided_inputs(backend: str) -> None:
    x, y = torch.randn(3, 5, 4), torch.randn(2, 6, 4)
    mask = torch.tensor([[True, False] * 3, [False, True] * 3])
    for a, b in zip(strided(x), strided(y), strict=True):
        a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        masks = (None, mask.T.contiguous().T)
        score = max_sim(a, b, *masks, backend=backend)
        expected = max_sim(a.contiguous(), b.contiguous(), *masks, backend=backend)
        torch.testing.assert_close(score, expected)
        g = torch.randn(2, 3).T  # not contiguous either
        for u, v in zip(torch.autograd.grad(score, (a, b), g), torch.autograd.grad(expected, (a, b), g), strict=True):
            torch.testing.assert_close(u, v)


@pytest.mark.parametrize("budget", [0, "auto"])
@pytest.mark.parametrize("direction", ["x", "y", "both"])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_gradcheck(direction: str, budget: object, backend: str) -> None:
    case = random_case(3, 2, 4, 5, 3, torch.float64, masked=True, repeated=False)
    x, y = (t.detach().nan_to_num(0).requires_grad_() for t in (case.x, case.y))

    def scores(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return ours(case._replace(x=x, y=y), "mean", direction, backend, budget)

    assert torch.autograd.gradcheck(scores, (x, y))


@pytest.mark.thinned(everywhere=True)
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, both: bool, backend: str) -> None:
    x, y = torch.randn(3, 4, 2, dtype=dtype, requires_grad=True), torch.randn(2, 3, 2, dtype=dtype, requires_grad=True)
    masks = (None, torch.tensor([[True, True, False], [False, True, True]]))
    torch.library.opcheck(torch.ops.fused_contrastive.max_sim_forward, (x, y, *masks, both, 0.0, 2, backend))
    detached = (x.detach(), y.detach(), *masks, both, 0.0, 2, backend)
    _, _, *argmaxima = torch.ops.fused_contrastive.max_sim_forward(*detached)
    g = torch.randn(3, 2)
    arguments = (g, g if both else None, *argmaxima, [True, both], *detached)
    torch.library.opcheck(torch.ops.fused_contrastive.max_sim_backward, arguments)


@pytest.mark.parametrize("direction", ["y", "both"])
def test_compile_fullgraph_matches_eager_mode(direction: str, backend: str) -> None:
    torch._dynamo.reset()
    case = on_device(random_case(3, 4, 5, 6, 8, torch.float32, masked=True, repeated=False))

    def scores(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return ours(case._replace(x=x, y=y), "mean", direction, backend)

    compiled = torch.compile(scores, fullgraph=True, backend="aot_eager")
    results, expected = (with_gradients(f(case.x, case.y), case) for f in (compiled, scores))
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("through_operator", [False, True])
def test_double_backward_raises(through_operator: bool, backend: str) -> None:
    x, y = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4)
    if through_operator:
        x = x.detach().as_subclass(type("Subclass", (torch.Tensor,), {})).requires_grad_()
    (gradient,) = torch.autograd.grad(max_sim(x, y, backend=backend).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, backend: str) -> None:
    x, y = torch.randn(2, 3, 8, requires_grad=True), torch.randn(4, 5, 8, requires_grad=True)
    with torch.autocast(x.device.type, dtype=dtype):
        scores = max_sim(x, y, backend=backend)
    scores.sum().backward()
    assert scores.dtype == torch.float32
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(scores, max_sim(x.to(dtype), y.to(dtype), backend=backend))


def test_only_the_gradient_that_is_asked(backend: str) -> None:
    x, y = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4)
    max_sim(x, y, backend=backend).sum().backward()
    assert x.grad is not None
    max_sim(y, x, backend=backend)[0].sum().backward()
    assert max_sim(y, y, backend=backend).grad_fn is None
