"""The registered operators are public through torch.ops: a bad operand raises an error that names it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fused_contrastive.core.spec import StatsSpec

N, D = 6, 8
OPS = torch.ops.fused_contrastive


def features(*shape: int) -> Tensor:
    return torch.randn(*shape)


def ints(size: int) -> Tensor:
    return torch.arange(size)


STATS: dict[str, Any] = dict(
    x=features(N, D), y=features(N, D), **StatsSpec(scale=torch.tensor(1.0))._asdict()
)  # fmt: skip
SAVED: dict[str, Any] = dict(
    g_pos=torch.ones(N), g_row=torch.ones(N), g_col=torch.ones(N), row=torch.ones(N).double(),
    col=torch.ones(N).double(), kept=features(0, N), needs=[True] * 4,
)  # fmt: skip
TOKENS: dict[str, Any] = dict(
    x=features(3, 4, D), y=features(2, 5, D), x_mask=None, y_mask=None, both=True, smooth=0.0, kept_rows=0
)
SAVED_TOKENS: dict[str, Any] = dict(
    g_x=torch.ones(3, 2), g_y=torch.ones(3, 2), argmax_x=torch.zeros(0, 2, 4, dtype=torch.uint8),
    argmax_y=torch.zeros(0, 2, 5, dtype=torch.uint8), needs=[True, True],
)  # fmt: skip

# Bad operands, by the name that the error has.
BAD_STATS: list[tuple[str, dict[str, Any]]] = [
    ("x", dict(x=features(D))),
    ("x", dict(x=ints(N * D).view(N, D))),
    ("y", dict(y=features(N, 3000))),
    ("y", dict(y=features(N, 1))),
    ("y", dict(y=features(N))),
    ("y", dict(y=features(N, D).double())),
    ("scale", dict(scale=torch.ones(3))),
    ("scale", dict(scale=torch.tensor(1))),
    ("targets", dict(x=features(5000, D))),
    ("targets", dict(targets=ints(1))),
    ("targets", dict(targets=ints(N).int())),
    ("targets", dict(targets=ints(N) + 10**12)),
    ("col_bias", dict(col_bias=torch.zeros(1))),
    ("row_ids", dict(row_ids=ints(1), col_ids=ints(N))),
    ("col_ids", dict(row_ids=ints(N), col_ids=ints(1))),
    ("col_ids", dict(row_ids=ints(N), col_ids=ints(N).float())),
    ("row_ids, col_ids", dict(row_ids=ints(N))),
    ("want_row, want_col", dict(want_row=False, want_col=False)),
    ("want_row, want_col", dict(statistic="softplus")),
    ("want_row, want_col", dict(statistic="softplus", want_row=False)),
    ("upper", dict(upper=True, want_col=False, y=features(3000, D))),
    ("upper", dict(upper=True)),
    ("equal_ids", dict(equal_ids="nope")),
    ("statistic", dict(statistic="nope")),
    ("kept_rows", dict(kept_rows=100_000)),
    ("kept_rows", dict(kept_rows=-5)),
    ("backend", dict(backend="nope")),
    ("backend", dict(backend="auto")),
    ("row_ids", dict(row_ids=ints(6 * N).view(N, 6), col_ids=ints(6 * N).view(N, 6))),
    ("row_ids", dict(row_ids=torch.zeros(N, 0).long(), col_ids=torch.zeros(N, 0).long())),
    ("col_ids", dict(row_ids=ints(2 * N).view(N, 2), col_ids=ints(N))),
    ("row_ids, col_ids", dict(equal_ids="apart", paired=False)),
    ("targets", dict(targets=ints(N), paired=False)),
    ("row_limit", dict(row_limit=torch.ones(2))),
    ("col_limit", dict(col_limit=ints(N))),
    ("row_limit, col_limit", dict(row_limit=torch.ones(N), upper=True, want_col=False)),
    ("row_guide, col_guide", dict(row_guide=features(N, 2))),
    ("col_guide", dict(row_guide=features(N, 2), col_guide=features(N, 3))),
    ("row_guide", dict(row_guide=features(2, 2), col_guide=features(N, 2))),
    ("statistic", dict(statistic="teacher")),
]
BAD_SAVED: list[tuple[str, dict[str, Any]]] = [
    ("row", dict(row=torch.ones(1).double())),
    ("col", dict(col=torch.ones(0).double())),
    ("g_pos", dict(g_pos=torch.ones(1))),
    ("g_row", dict(g_row=torch.ones(()))),
    ("g_col", dict(g_col=torch.ones(N, 1))),
    ("targets", dict(targets=ints(N) - 10**12)),
    ("needs", dict(needs=[True])),
]
BAD_TOKENS: list[tuple[str, dict[str, Any]]] = [
    ("x", dict(x=features(3, D))),
    ("x", dict(x=features(3, 0, D))),
    ("y", dict(y=features(2, 5, D + 1))),
    ("y", dict(y=features(2, 5, D).bfloat16())),
    ("x_mask", dict(x_mask=torch.ones(1, 1, dtype=torch.bool))),
    ("y_mask", dict(y_mask=torch.ones(2, 5))),
    ("y", dict(y=features(2, 2, 5, D), both=False)),
    ("both", dict(y=features(3, 2, 5, D))),
    ("both", dict(smooth=0.1)),
    ("smooth", dict(smooth=-0.1, both=False)),
    ("smooth", dict(smooth=float("nan"), both=False)),
    ("kept_rows", dict(smooth=0.1, both=False, kept_rows=1)),
    ("kept_rows", dict(kept_rows=4)),
    ("backend", dict(backend="nope")),
]
BAD_SAVED_TOKENS: list[tuple[str, dict[str, Any]]] = [
    ("g_x", dict(g_x=torch.ones(1, 1))),
    ("g_y", dict(g_y=torch.ones(2, 3))),
    ("argmax_x", dict(argmax_x=torch.zeros(3, 2, 4, dtype=torch.uint8))),
    ("argmax_x", dict(kept_rows=3)),
    ("needs", dict(needs=[True])),
]


def refused(operator: Any, good: dict[str, Any], name: str, bad: dict[str, Any], backend: str) -> None:
    operator(*{**good, "backend": backend}.values())
    with pytest.raises((TypeError, ValueError), match=f"^{name}: "):
        operator(*{**good, "backend": backend, **bad}.values())


on_cpu = pytest.mark.parametrize("backend", ["reference", "cpp"], indirect=True)


@pytest.mark.parametrize(("name", "bad"), BAD_STATS)
@on_cpu
def test_stats_forward(name: str, bad: dict[str, Any], backend: str) -> None:
    refused(OPS.stats_forward, STATS, name, bad, backend)


@pytest.mark.parametrize(("name", "bad"), BAD_STATS + BAD_SAVED)
@on_cpu
def test_stats_backward(name: str, bad: dict[str, Any], backend: str) -> None:
    refused(OPS.stats_backward, {**SAVED, **STATS}, name, bad, backend)


@pytest.mark.parametrize(("name", "bad"), BAD_TOKENS)
@on_cpu
def test_max_sim_forward(name: str, bad: dict[str, Any], backend: str) -> None:
    refused(OPS.max_sim_forward, TOKENS, name, bad, backend)


@pytest.mark.parametrize(("name", "bad"), BAD_TOKENS[:-2] + BAD_SAVED_TOKENS)
@on_cpu
def test_max_sim_backward(name: str, bad: dict[str, Any], backend: str) -> None:
    refused(OPS.max_sim_backward, {**SAVED_TOKENS, **TOKENS}, name, bad, backend)


def test_what_only_the_kernels_read_is_checked_there() -> None:
    """The backend checks the products and argmaxima that its forward kept, because only it knows their form."""
    stats = {**SAVED, **STATS, "kept_rows": N, "backend": "cpp"}
    for kept in (features(0, N), features(N, 1), features(N, N).double()):
        with pytest.raises((TypeError, ValueError), match=r"^kept: "):
            OPS.stats_backward(*{**stats, "kept": kept}.values())
    tokens = {**SAVED_TOKENS, **TOKENS, "kept_rows": 3, "backend": "cpp"}
    tokens["argmax_y"] = torch.zeros(3, 2, 5, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"^argmaxima: "):
        OPS.max_sim_backward(*{**tokens, "argmax_x": torch.zeros(3, 2, 4, dtype=torch.int64)}.values())
    with pytest.raises(IndexError, match="argmax"):
        OPS.max_sim_backward(*{**tokens, "argmax_x": torch.full((3, 2, 4), 200, dtype=torch.uint8)}.values())


NO_RULES = (None,) * 7  # the fields of Exclusions, and the seed


@pytest.mark.parametrize("arguments", [
    ("rank", features(N, D), features(N, D + 1), 2, None, *NO_RULES),
    ("rank", features(N, D), features(N, D), 0, None, *NO_RULES),
    ("rank", features(N, D), features(N, D), N + 1, None, *NO_RULES),
    ("rank", features(N, D), features(N, D), 2, None, ints(N), *NO_RULES[1:]),
    ("rank", features(N, D), features(N, D), 2, None, ints(N)[:, None] - 2, *NO_RULES[1:]),
    ("rank", features(N, D), features(N, D), 2, None, None, ints(N), *NO_RULES[2:]),
    ("rank", features(N, D), features(N, D), 2, None, None, ints(N), ints(N + 1), *NO_RULES[3:]),
    ("rank", features(N, D), features(N, D), 2, None, None, None, None, float("nan"), None, None, None),
    ("rank", features(N, D), features(N, D), 2, None, None, None, None, None, 0.5, None, None),
    ("rank", features(N, D), features(N, D), 2, None, *NO_RULES[1:], ints(1)),
    ("target_ranks", features(N, D), features(N, D), ints(N), False),
    ("target_ranks", features(N, D), features(N, D), ints(1)[:, None], False),
    ("target_ranks", features(N, D), features(N, D), ints(N)[:, None] + 10**12, False),
    ("target_ranks", features(N, D), features(2, D), ints(N)[:, None] % 2, True),
])  # fmt: skip
@on_cpu
def test_rankings(arguments: tuple[Any, ...], backend: str) -> None:
    name, *operands = arguments
    with pytest.raises(
        (TypeError, ValueError),
        match=r"^(queries|candidates|k|targets|exclude_self|query_ids|candidate_ids|max_score|seed)[:,] ",
    ):
        getattr(OPS, name)(*operands, backend)
