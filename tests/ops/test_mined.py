"""Hard negatives: what ``rank`` leaves out, on every backend, against the definition on the whole matrix in float64."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fused_contrastive import Ranking, rank
from fused_contrastive.ops import exclusions, ranking


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BLOCK", "GPU_BLOCK"):
        monkeypatch.setattr(ranking, name, (16, 24))
    monkeypatch.setattr(exclusions, "ELEMENTS", 100)  # a few rows of a block


def whole(rows: int) -> Tensor:
    """Small integers: products are exact in every dtype, and many are equal."""
    return torch.randint(-3, 4, (rows, 5)).float()


def mined(
    scores: Tensor, k: int, *, targets: Tensor | None = None, exclude_ids: Any = None, max_score: float = torch.inf,
    absolute_margin: float | None = None, relative_margin: float | None = None,
) -> Ranking:  # fmt: skip
    """By the definition, candidate by candidate: score descending, equal scores by the smaller index."""
    found = []
    for i, row in enumerate(scores.tolist()):
        right = [] if targets is None else [j for j in targets[i].reshape(-1).tolist() if j >= 0]
        limits = [max_score]
        for j in right:
            limits += [] if absolute_margin is None else [row[j] - absolute_margin]
            limits += [] if relative_margin is None else [row[j] - relative_margin * abs(row[j])]
        left = []
        for j, score in enumerate(row):
            related = exclude_ids is not None and bool((exclude_ids[0][i] == exclude_ids[1][j]).any())
            if j not in right and not related and -torch.inf < score <= min(limits):
                left.append((-score, j))
        found.append([(-score, j) for score, j in sorted(left)[:k]] + [(-torch.inf, -1)] * (k - len(left)))
    values, indices = torch.tensor(found, dtype=torch.float64).unbind(dim=2)
    return Ranking(values, indices.long())


def assert_same(found: Ranking, expected: Ranking) -> None:
    assert torch.equal(found.scores.double().cpu(), expected.scores.cpu())
    assert torch.equal(found.indices.cpu(), expected.indices.cpu())


def answers(m: int, n: int, most: int) -> Tensor:
    """(m, most) with -1 in random places; some rows have none."""
    return torch.where(torch.rand(m, most) < 0.5, torch.randint(n, (m, most)), -1)


RULES: dict[str, dict[str, Any]] = {
    "answers": {"targets": True},
    "max_score": {"max_score": 4.0},
    "absolute": {"targets": True, "absolute_margin": 2.0},
    "above the answer": {"targets": True, "absolute_margin": -3.0},
    "relative": {"targets": True, "relative_margin": 0.25},
    "both margins": {"targets": True, "absolute_margin": 1.0, "relative_margin": 0.5},
    "zero": {"targets": True, "absolute_margin": 0.0},
    "ids": {"exclude_ids": 1},
    "several ids": {"exclude_ids": 3},
    "all": {"targets": True, "exclude_ids": 2, "max_score": 9.0, "absolute_margin": 0.0, "relative_margin": 0.125},
}


def drawn(rule: str, m: int, n: int, most: int) -> dict[str, Any]:
    options = dict(RULES[rule])
    if "targets" in options:
        options["targets"] = answers(m, n, most)
    if (count := options.get("exclude_ids")) is not None:
        options["exclude_ids"] = tuple(torch.randint(6, (size, count)) for size in (m, n))
    return options


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(40, 70, 9), (20, 50, 50), (1, 1, 1)], ids=str)
def test_what_is_left_out(backend: str, rule: str, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    queries, candidates = whole(m), whole(n)
    options = drawn(rule, m, n, 3)
    expected = mined(queries.double() @ candidates.double().T, k, **options)
    assert_same(rank(queries, candidates, k, backend=backend, **options), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(backend: str, dtype: torch.dtype) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the triton backend does not take float64")
    queries, candidates, options = whole(20), whole(50), drawn("all", 20, 50, 2)
    expected = mined(queries.double() @ candidates.double().T, 30, **options)
    found = rank(queries.to(dtype), candidates.to(dtype), 30, backend=backend, **options)
    assert found.scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_same(found, expected)


@settings(max_examples=60)
@given(
    m=st.integers(1, 20), n=st.integers(1, 60), most=st.integers(1, 4), rule=st.sampled_from(sorted(RULES)),
    scale=st.sampled_from([None, 2.0, -0.5]), name=st.sampled_from(["reference", "cpp"]), data=st.data(),
    seed=st.integers(0, 2**32),
)  # fmt: skip
def test_any_shape(m, n, most, rule, scale, name, data, seed) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(seed)
    queries, candidates, options = whole(m), whole(n), drawn(rule, m, n, most)
    candidates[torch.rand(n) < 0.1] = torch.nan
    k = data.draw(st.integers(1, n))
    scores = (1.0 if scale is None else scale) * (queries.double() @ candidates.double().T)
    if "absolute_margin" in options or "relative_margin" in options:  # NaN as an answer is a test of its own
        options["targets"][candidates[options["targets"]].isnan().any(dim=2)] = -1
    assert_same(rank(queries, candidates, k, scale=scale, backend=name, **options), mined(scores, k, **options))


def test_candidates_without_a_number(backend: str) -> None:
    """NaN and -inf are left out with any rule; an answer whose score is NaN or infinite leaves nothing."""
    queries, candidates = torch.ones(4, 1), torch.arange(30.0)[:, None]
    candidates[3], candidates[4], candidates[5] = torch.nan, -torch.inf, torch.inf
    targets = torch.tensor([29, 3, 4, 5])
    plain = rank(queries, candidates, 30, backend=backend).indices[0]
    assert plain.tolist() == [5, *range(29, 5, -1), 2, 1, 0, 4, 3]
    without = rank(queries, candidates, 30, max_score=torch.finfo(torch.float32).max, backend=backend).indices[0]
    assert without.tolist() == [*range(29, 5, -1), 2, 1, 0, -1, -1, -1]
    for margin in ({"absolute_margin": 1.0}, {"relative_margin": 0.1}):
        found = rank(queries, candidates, 2, targets=targets, backend=backend, **margin)
        assert found.indices.tolist() == [[28, 27] if "absolute_margin" in margin else [26, 25], *[[-1, -1]] * 3]
        assert (found.scores[1:] == -torch.inf).all()


def test_an_answer_s_copies_at_a_margin_of_zero(backend: str) -> None:
    """They stay, though a block's products and the answer's own may be rounded differently, and so with bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        x, y = (F.normalize(torch.randn(30, 37), dim=1).to(dtype) for _ in range(2))
        copies = y.repeat(3, 1)
        targets = torch.arange(30)
        found = rank(x, copies, 90, targets=targets, absolute_margin=0.0, backend=backend).indices
        for copy in (30, 60):
            assert (found == targets[:, None] + copy).any(dim=1).all()
        assert not (found == targets[:, None]).any()


def test_a_margin_pairs_by_index(backend: str) -> None:
    queries, candidates = whole(30), whole(30)
    own = torch.arange(30)
    expected = rank(queries, candidates, 30, targets=own, relative_margin=0.25, backend=backend)
    assert_same(rank(queries, candidates, 30, relative_margin=0.25, backend=backend), expected)
    assert (expected.indices[:, -1] == -1).all()
    itself = rank(queries, queries, 29, exclude_ids=(own, own), backend=backend).indices
    assert torch.equal(itself.sort(dim=1).values, torch.stack([own[own != i] for i in range(30)]))


def test_strided_operands_of_any_integer_dtype(backend: str) -> None:
    queries, candidates = whole(20), whole(50)
    options = drawn("all", 20, 50, 2)
    expected = rank(queries, candidates, 30, backend=backend, **options)
    ids = tuple(t.T.contiguous().T.to(torch.uint8) for t in options["exclude_ids"])
    targets = options["targets"].repeat_interleave(2, dim=0)[::2].to(torch.int16)
    assert_same(rank(queries, candidates, 30, backend=backend, **{**options, "targets": targets, "exclude_ids": ids}),
                Ranking(expected.scores.double(), expected.indices))  # fmt: skip


def test_compiled() -> None:
    queries, candidates = whole(20), whole(50)
    torch._dynamo.reset()
    run = torch.compile(rank, fullgraph=True, backend="aot_eager")
    for rule in ("answers", "all"):
        options = drawn(rule, 20, 50, 2)
        assert_same(
            run(queries, candidates, 9, **options), mined(queries.double() @ candidates.double().T, 9, **options)
        )


X, Y = torch.randn(4, 3), torch.randn(5, 3)
IDS = torch.arange(4), torch.arange(5)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "max_score": ({"max_score": "1"}, TypeError, "max_score: got '1', expected a number"),
    "max_score NaN": ({"max_score": torch.nan}, ValueError, "max_score: got nan, expected a finite number"),
    "max_score large": ({"max_score": 1e300}, ValueError, "max_score: got 1e+300, expected a number that torch"),
    "margin": ({"absolute_margin": torch.ones(1)}, TypeError, "absolute_margin: got tensor([1.]), expected a number"),
    "margin infinite": ({"relative_margin": torch.inf}, ValueError, "relative_margin: got inf, expected a finite"),
    "whose positive": (
        {"relative_margin": 0.1}, ValueError,
        "targets: got None with a margin for 4 queries and 5 candidates, expected each query's right answers: an integ",
    ),
    "targets a list": ({"targets": [1]}, TypeError, "targets: got list, expected an integer tensor of shape (4,) or"),
    "targets short": ({"targets": torch.arange(3)}, ValueError, "targets: got shape (3,), expected an integer tensor"),
    "no places": ({"targets": torch.zeros(4, 0).long()}, ValueError, "targets: got shape (4, 0), expected an integer"),
    "beyond": ({"targets": torch.tensor([0, 1, 5, 2])}, ValueError, "targets: got values from 0 to 5, expected 0 to 4"),
    "below": ({"targets": torch.tensor([0, 1, -2, 2])}, ValueError, "targets: got values from -2 to 2, expected 0 to"),
    "one ids": ({"exclude_ids": IDS[0]}, TypeError, "exclude_ids: got Tensor, expected a tuple of two, the ids"),
    "three ids": ({"exclude_ids": (*IDS, IDS[0])}, TypeError, "exclude_ids: got 3 values, expected a tuple of two"),
    "ids swapped": ({"exclude_ids": IDS[::-1]}, ValueError, "exclude_ids[0]: got shape (5,), expected an integer"),
    "ids None": ({"exclude_ids": (IDS[0], None)}, TypeError, "exclude_ids[1]: got NoneType, expected an integer"),
    "ids float": ({"exclude_ids": (IDS[0], Y[:, 0])}, TypeError, "exclude_ids[1]: got dtype torch.float32, expected"),
    "ids unequal": (
        {"exclude_ids": (IDS[0][:, None].expand(4, 2), IDS[1])}, ValueError,
        "exclude_ids[1]: got 1 ids a column, expected 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    options, error, message = BAD[name]
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        rank(X, Y, 2, **options)
