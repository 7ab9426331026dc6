"""Draws of ``sample_negatives``: their distribution, what is never drawn, and that only the seed decides."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_contrastive as fc
from fused_contrastive import sample_negatives
from fused_contrastive.core import gumbel
from fused_contrastive.ops import ranking

SIX_SIGMA = 6.0  # a statistic beyond it has a probability below 1e-9


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def deviation(counts: Tensor, expected: Tensor) -> float:
    """The chi-square statistic as a normal deviate, by Wilson and Hilferty's cube root."""
    assert (expected > 50).all()
    freedom = len(counts) - 1
    statistic = ((counts.double() - expected).square() / expected).sum().item()
    return float(((statistic / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) * (4.5 * freedom) ** 0.5)


def shares_of_ordered_draws(p: Tensor) -> Tensor:
    """(n * n,) the probability of drawing first a, then b without replacement."""
    return (p[:, None] * p / (1 - p[:, None])).fill_diagonal_(0).flatten()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_a_million_draws_have_the_softmax_s_distribution(backend: str, seed: int) -> None:
    """All rows are the same, so that their draws are draws from one softmax."""
    rows, n = 1_000_000, 12
    few, one = F.normalize(torch.randn(n, 4)), F.normalize(torch.randn(1, 4))
    scale = 1.5  # of unit vectors: every column is drawn a thousand times or more
    excluded = torch.tensor([2, 5])
    ids = torch.full((rows,), 1), torch.isin(torch.arange(n), excluded).long()
    targets = torch.full((rows,), 7)
    drawn = sample_negatives(
        one.expand(rows, 4), few, scale, targets=targets, row_ids=ids[0], col_ids=ids[1], directions=("row",),
        generator=generator(seed), backend=backend,
    ).row  # fmt: skip
    logits = scale * few.double() @ one[0].double()
    logits[[2, 5, 7]] = -torch.inf
    left = logits > -torch.inf
    counts = drawn[:, 0].bincount(minlength=n)
    assert counts[~left].sum() == 0
    assert abs(deviation(counts[left], rows * logits.softmax(dim=0)[left])) < SIX_SIGMA


def test_two_draws_without_replacement(seed: int) -> None:
    """From the columns' direction, in order: the second is from the softmax of what the first has left."""
    rows, n = 200_000, 6
    few, one = torch.randn(n, 4), torch.randn(1, 4)
    drawn = sample_negatives(
        few, one.expand(rows, 4), 0.7, 2, directions=("col",), generator=generator(seed)
    ).col[n:]  # fmt: skip
    p = (0.7 * few.double() @ one[0].double()).softmax(dim=0)
    counts = (drawn[:, 0] * n + drawn[:, 1]).bincount(minlength=n * n)
    expected = (rows - n) * shares_of_ordered_draws(p)
    counted = expected > 50
    assert abs(deviation(counts[counted], expected[counted])) < SIX_SIGMA


def test_draws_are_independent(seed: int) -> None:
    """Of neighbouring rows, of two calls with one generator, and of the two directions."""
    rows, n, drawing = 100_000, 4, generator(seed)
    x, y, targets = torch.zeros(rows, 1), torch.zeros(n + 1, 1), torch.full((rows,), n)
    first, second = (
        sample_negatives(x, y, 1.0, targets=targets, directions=("row",), generator=drawing).row[:, 0]
        for _ in range(2)
    )  # fmt: skip
    for a, b in ((first[:-1], first[1:]), (first, second)):
        expected = torch.full((n * n,), len(a) / n**2, dtype=torch.float64)
        assert abs(deviation((n * a + b).bincount(minlength=n * n), expected)) < SIX_SIGMA
    square = torch.zeros(500, 1)
    found = sample_negatives(square, square, 1.0, generator=drawing)
    assert (found.row == found.col).sum() < 15  # 1 is expected


def test_noise_is_uniform_in_every_bit(seed: int) -> None:
    keys = gumbel.row_keys(torch.tensor(seed), 64)
    for dtype in (torch.float32, torch.float64):
        noise = torch.zeros(64, 4096, dtype=dtype)
        gumbel.add_gumbel(noise, keys, 0)
        uniform = (-noise.double()).exp().neg().exp().flatten()  # exp(-exp(-g))
        cells = (uniform * 256).long().clamp(0, 255).bincount(minlength=256)
        assert abs(deviation(cells, torch.full((256,), len(uniform) / 256, dtype=torch.float64))) < SIX_SIGMA
        assert noise.isfinite().all()
        assert noise.unique().numel() > 0.98 * noise.numel()


def test_splitmix64() -> None:
    """Its published first outputs for the seed 1234567."""
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [key % 2**64 for key in gumbel.row_keys(torch.tensor(1234567), 4).tolist()] == outputs


@pytest.mark.parametrize("shape", [(30, 70, 5), (60, 60, 60), (1, 1, 1), (1, 40, 3)], ids=str)
def test_what_is_never_drawn(backend: str, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Positives, equal ids, NaN and repeats; all that is left is drawn if k is enough, and then -1."""
    for name in ("BLOCK", "GPU_BLOCK"):
        monkeypatch.setattr(ranking, name, (16, 24))
    m, n, k = shape
    x, y = torch.randn(m, 4), torch.randn(n, 4)
    y[n // 2 + 1 :: 9] = torch.nan
    for targets, count in ((None, 0), (torch.randint(n, (m,)), 1), (None, 3)):
        ids = [torch.randint(8, (size, count)) for size in (m, n)] if count else [None, None]
        found = sample_negatives(
            x, y, 3.0, k, targets=targets, row_ids=ids[0], col_ids=ids[1], backend=backend
        )  # fmt: skip
        allowed = ~(x @ y.T).isnan()
        allowed[torch.arange(m), torch.arange(m) if targets is None else targets] = False
        if count:
            allowed &= ~(ids[0][:, None] == ids[1]).any(dim=2)
        for drawn, may in ((found.row, allowed), (found.col, allowed.T)):
            assert drawn.shape == (len(may), k)
            assert drawn.dtype == torch.int64
            for some, of_row in zip(drawn.tolist(), may, strict=True):
                real = [j for j in some if j >= 0]
                assert some == real + [-1] * (k - len(real))
                assert len(real) == len(set(real)) == min(k, int(of_row.sum()))
                assert all(of_row[j] for j in real)


@pytest.mark.usefixtures("threads")
def test_only_the_seed_decides(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks, threads and the other direction do not; products are exact here."""
    x, y = (torch.randint(-3, 4, (size, 5)).float() for size in (50, 90))
    expected = sample_negatives(x, y, 0.5, 3, generator=generator(1), backend=backend)
    for block, elements, threads in (((1, 7), 50, 1), ((16, 24), 1, 3), ((64, 64), 10**6, 2)):
        for name in ("BLOCK", "GPU_BLOCK"):
            monkeypatch.setattr(ranking, name, block)
        monkeypatch.setattr(gumbel, "ELEMENTS", elements)
        torch.set_num_threads(threads)
        found = sample_negatives(x, y, 0.5, 3, generator=generator(1), backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for place, direction in enumerate(("row", "col")):
        alone = sample_negatives(x, y, 0.5, 3, generator=generator(1), directions=(direction,), backend=backend)
        assert torch.equal(alone[place], expected[place])
        assert alone[1 - place] is None
    others = sample_negatives(x, y, 0.5, 3, generator=generator(2), backend=backend)
    assert not torch.equal(others.row, expected.row)
    torch.manual_seed(3)
    by_default = [sample_negatives(x, y, 0.5, 3, backend=backend) for _ in range(2)]
    assert not torch.equal(by_default[0].row, by_default[1].row)
    torch.manual_seed(3)
    assert torch.equal(sample_negatives(x, y, 0.5, 3, backend=backend).row, by_default[0].row)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_and_autocast(backend: str, dtype: torch.dtype) -> None:
    """Exact products give the draws of float32; float64's noise has more bits, but decides alike."""
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the triton backend does not take float64")
    x, y = (torch.randint(-3, 4, (40, 5)).float() for _ in range(2))
    expected = sample_negatives(x, y, 0.5, generator=generator(1), backend=backend)
    found = sample_negatives(x.to(dtype), y.to(dtype), torch.tensor(0.5), generator=generator(1), backend=backend)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        under = sample_negatives(x.requires_grad_(), y, 0.5, generator=generator(1), backend=backend)
    assert all(torch.equal(a, b) for other in (found, under) for a, b in zip(other, expected, strict=True))


def test_certain_draws(backend: str) -> None:
    """At a high scale the softmax has all its weight on the largest logit that is left."""
    x, y = torch.eye(20), torch.eye(20).roll(1, dims=0) + 2 * torch.eye(20)
    found = sample_negatives(x, y, 1000.0, backend=backend)
    assert torch.equal(found.row[:, 0], (torch.arange(20) + 1) % 20)
    assert torch.equal(found.col[:, 0], (torch.arange(20) - 1) % 20)


def test_compiled() -> None:
    x, y, ids = torch.randn(30, 4), torch.randn(40, 4), torch.arange(40) % 9
    torch._dynamo.reset()

    def run() -> Tensor:
        found = sample_negatives(x, y, torch.tensor(2.0), 3, row_ids=ids[:30], col_ids=ids)
        return torch.cat((found.row, found.col))

    torch.manual_seed(1)
    expected = run()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    assert torch.equal(compiled(), expected)


X, Y = torch.randn(4, 3), torch.randn(5, 3)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "k of 0": ({"k": 0}, ValueError, "k: got 0, expected an integer of at least 1"),
    "k a float": ({"k": 1.0}, TypeError, "k: got 1.0, expected an integer of at least 1"),
    "scale": ({"scale": "1"}, TypeError, "scale: got str"),
    "scale large": ({"scale": 1e300}, ValueError, "scale: got 1e+300, expected a number that torch.float32 holds"),
    "generator": ({"generator": 3}, TypeError, "generator: got int, expected a torch.Generator"),
    "direction": ({"directions": ("rows",)}, ValueError, "directions: got 'rows', expected one of 'row', 'col'"),
    "no direction": ({"directions": ()}, ValueError, "directions: got none, expected 'row', 'col' or both"),
    "one ids": ({"row_ids": torch.arange(4)}, ValueError, "row_ids, col_ids: got only one of them"),
    "ids": ({"row_ids": torch.arange(5), "col_ids": torch.arange(5)}, ValueError, "row_ids: got shape (5,), expected"),
    "targets": ({"targets": torch.arange(5)}, ValueError, "targets: got shape (5,), expected an integer tensor of"),
    "beyond": ({"targets": torch.tensor([0, 1, 2, 5])}, ValueError, "targets: got values from 0 to 5, expected 0 to 4"),
    "more rows": ({"x": torch.randn(6, 3)}, ValueError, "targets: got None for M = 6 rows and N = 5 columns, expected"),
    "y": ({"y": Y[:, :2]}, ValueError, "y: got D = 2, expected 3, the D of x"),
    "backend": ({"backend": "gpu"}, ValueError, "backend: got 'gpu'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    options, error, message = BAD[name]
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        fc.sample_negatives(**{"x": X, "y": Y, "scale": 1.0, **options})
