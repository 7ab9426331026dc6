"""Checks of what the registered operators are called with: ``torch.ops`` is public, and kernels trust sizes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, get_args

import torch
from torch import Tensor

from fused_contrastive.core import checks, forks, group_checks
from fused_contrastive.core.spec import (
    MOST_IDS,
    OF_COLS,
    OF_ROWS,
    OF_TWO_DIMENSIONS,
    EqualIds,
    Forward,
    Statistic,
    StatsSpec,
    Upstream,
)
from fused_contrastive.core.tokens import MaxSimForward, MaxSimUpstream
from fused_contrastive.ops import dispatch


def stats(x: Tensor, y: Tensor, spec: StatsSpec, backend: str) -> None:
    """Raises TypeError or ValueError, naming the operand, unless the problem is one that a backend can take."""
    forks.guard()
    checks.feature_pair("x", x, "y", y, empty=True)
    dispatch.check(backend, x.device, x.dtype)
    m, n = x.shape[0], y.shape[0]
    _vector("scale", spec.scale, (), x)
    if not spec.paired and spec.targets is not None:
        raise ValueError("targets: got a tensor with paired=False, expected None: no pair is a positive")
    _lengths(spec, m, n)
    if spec.paired and spec.targets is None and m > n:
        raise ValueError(f"targets: got None for M = {m} rows and N = {n} columns, expected targets because M > N")
    for size, tensors in ((m, OF_ROWS), (n, OF_COLS)):
        for name, dtype in tensors.items():
            t = getattr(spec, name)
            one_bias = name == "col_bias" and t is not None and t.dim() == 0
            several = t.shape[1:] if name in OF_TWO_DIMENSIONS and t is not None and t.dim() == 2 else ()
            _vector(name, t, () if one_bias else (size, *several), x, dtype)
    _ids(spec)
    _guide(spec)
    checks.one_of("equal_ids", spec.equal_ids, get_args(EqualIds))
    checks.one_of("statistic", spec.statistic, get_args(Statistic))
    if not (spec.want_row or spec.want_col):
        raise ValueError("want_row, want_col: got neither direction, expected at least one")
    if spec.statistic == "softplus" and spec.want_col:
        raise ValueError("want_row, want_col: got statistic='softplus', expected rows alone")
    limited = spec.row_limit is not None or spec.col_limit is not None
    if limited and (spec.upper or spec.statistic == "softplus" or spec.equal_ids in ("apart", "add")):
        raise ValueError(
            "row_limit, col_limit: got one with upper, statistic='softplus' or equal_ids 'apart' or 'add', expected "
            "None"
        )
    if spec.statistic == "teacher" and (
        spec.row_guide is None or spec.paired or spec.row_ids is not None or limited or spec.upper or spec.exclude_self
    ):
        raise ValueError(
            "statistic: got 'teacher' without a guide, or with positives, ids, limits, upper or exclude_self, expected "
            "a guide alone"
        )
    if spec.is_ranked():
        if spec.statistic == "teacher" or spec.equal_ids in ("apart", "add"):
            raise ValueError(
                "row_reference, col_reference: got one with statistic='teacher' or equal_ids 'apart' or 'add', "
                "expected None"
            )
        missing = (spec.want_row and spec.row_reference is None) or (
            (spec.want_col or spec.upper) and spec.col_reference is None
        )
        if missing:
            raise ValueError("row_reference, col_reference: got one of them, expected one for each direction")
    if spec.statistic == "softplus" and spec.equal_ids == "add":
        raise ValueError("equal_ids: got 'add' with statistic='softplus', expected another")
    if spec.upper:
        if m != n:
            raise ValueError(f"upper: got True for M = {m} and N = {n}, expected as many rows as columns")
        parts = spec.equal_ids in ("apart", "add")
        if spec.want_col or spec.col_bias is not None or spec.statistic == "softplus" or parts:
            raise ValueError(
                "upper: got True with columns, a bias, statistic='softplus' or equal_ids 'apart' or 'add', expected "
                "rows alone"
            )
    _kept_rows(spec.kept_rows, m if spec.row_lengths is None else 0)


def stats_saved(
    x: Tensor, y: Tensor, spec: StatsSpec, saved: Forward, upstream: Upstream, needs: Sequence[bool]
) -> None:
    """Raises likewise, unless ``saved`` is what the forward of this problem returned and ``upstream`` its gradients."""
    m, n = x.shape[0], y.shape[0]
    pos, row, col = spec.shapes(m, n)
    _vector("row", saved.row, row, x)
    _vector("col", saved.col, col, x)
    _vector("g_pos", upstream.pos, pos, x)
    _vector("g_row", upstream.row, row, x)  # torch.compile gives zeros for a direction that is not requested
    _vector("g_col", upstream.col, col, x)
    checks.same_device("kept", saved.kept, "x", x)
    if spec.targets is not None:
        checks.target_range(spec.targets, spec.columns_of_rows(n))
    _needs(needs, 4)


def tokens(
    x: Tensor, y: Tensor, masks: Sequence[Tensor | None], both: bool, smooth: float, kept_rows: int, backend: str
) -> None:
    """As ``stats``, for the operands of max_sim; ``masks`` are the masks of x and y."""
    forks.guard()
    checks.token_pair("x", x, "y", y, empty=True, own=True)
    dispatch.check(backend, x.device, x.dtype)
    for name, mask, of in (("x_mask", masks[0], x), ("y_mask", masks[1], y)):
        _vector(name, mask, tuple(of.shape[:-1]), x, torch.bool)
    if smooth != 0:
        checks.divisor("smooth", smooth, x)
    if both and (y.dim() == 4 or smooth != 0):
        raise ValueError("both: got True with y (M, K, P, D) or smooth, expected False")
    if smooth != 0 and kept_rows != 0:
        raise ValueError(f"kept_rows: got {kept_rows} with smooth, expected 0")
    _kept_rows(kept_rows, x.shape[0])


def tokens_saved(
    x: Tensor, y: Tensor, both: bool, kept_rows: int, saved: MaxSimForward, upstream: MaxSimUpstream,
    needs: Sequence[bool],
) -> None:  # fmt: skip
    """Raises unless these are what the forward of max_sim returned, and gradients of it."""
    (m, t, _), (n, p, _) = x.shape, y.shape[-3:]
    _vector("g_x", upstream.x, (m, n), x)
    _vector("g_y", upstream.y, (m, n) if both else (0, 0), x)
    _vector("argmax_x", saved.argmax_x, (kept_rows, n, t), x, saved.argmax_x.dtype)
    _vector("argmax_y", saved.argmax_y, (kept_rows, n, p) if both else (0, 0, 0), x, saved.argmax_y.dtype)
    _needs(needs, 2)


def prefixes(
    x: Tensor, y: Tensor, scale: Tensor, targets: Tensor | None, row_ids: Tensor | None, col_ids: Tensor | None,
    dims: Sequence[int], normalize: bool, want_col: bool, kept_rows: int,
    kept_prefixes: int, backend: str,
) -> None:  # fmt: skip
    """As ``stats``, for the statistics of nested prefixes."""
    spec = StatsSpec(scale, targets, row_ids=row_ids, col_ids=col_ids, want_col=want_col, kept_rows=kept_rows)
    stats(x, y, spec, backend)
    growing = all(a < b for a, b in pairwise((0, *dims)))
    if not dims or not growing or dims[-1] > x.shape[1]:
        raise ValueError(f"dims: got {list(dims)}, expected increasing numbers from 1 to {x.shape[1]}, the D of x")
    if not 0 <= kept_prefixes <= len(dims):
        raise ValueError(f"kept_prefixes: got {kept_prefixes}, expected 0 to {len(dims)}")


def prefixes_saved(
    saved: Forward, upstream: Upstream, needs: Sequence[bool], x: Tensor, y: Tensor, scale: Tensor,
    targets: Tensor | None, row_ids: Tensor | None, col_ids: Tensor | None, dims: Sequence[int], normalize: bool,
    want_col: bool, *_: Any,
) -> None:  # fmt: skip
    """Raises unless these are what the forward of such a problem returned, and gradients of it."""
    row, col = (len(dims), x.shape[0]), (len(dims), y.shape[0] if want_col else 0)
    of_each = {"row": saved.row, "g_pos": upstream.pos, "g_row": upstream.row}
    for name, t in of_each.items():
        _vector(name, t, row, x)
    for name, t in {"col": saved.col, "g_col": upstream.col}.items():
        _vector(name, t, col, x)
    checks.same_device("kept", saved.kept, "x", x)
    if targets is not None:
        checks.target_range(targets, y.shape[0])
    _needs(needs, 3)


def ranking(queries: Tensor, candidates: Tensor, backend: str) -> None:
    """Checks the features and the backend of rank and target_ranks; their callers check the rest."""
    forks.guard()
    checks.feature_pair("queries", queries, "candidates", candidates)
    dispatch.check(backend, queries.device, queries.dtype)


def excluded(
    queries: Tensor, candidates: Tensor, targets: Tensor | None, query_ids: Tensor | None,
    candidate_ids: Tensor | None, max_score: float | None, absolute_margin: float | None,
    relative_margin: float | None, seed: Tensor | None,
) -> None:  # fmt: skip
    """Checks the other operands of rank, but for the values of the targets."""
    m, n = queries.shape[0], candidates.shape[0]
    places = () if targets is None else targets.shape[1:]
    if targets is not None and (len(places) != 1 or places[0] == 0):
        raise ValueError(f"targets: got shape {tuple(targets.shape)}, expected (M, P) with P >= 1")
    _vector("targets", targets, (m, *places), queries, torch.int64)
    if (query_ids is None) != (candidate_ids is None):
        raise ValueError("query_ids, candidate_ids: got only one of them, expected both or neither")
    count = () if query_ids is None else query_ids.shape[1:2]
    _vector("query_ids", query_ids, (m, *count), queries, torch.int64)
    _vector("candidate_ids", candidate_ids, (n, *count), queries, torch.int64)
    margins = {"absolute_margin": absolute_margin, "relative_margin": relative_margin}
    for name, value in {"max_score": max_score, **margins}.items():
        if value is not None:
            checks.held(name, checks.number(name, value), queries)
            if name in margins and targets is None:
                raise ValueError(f"targets: got None with {name}, expected a tensor of shape (M, P)")
    _vector("seed", seed, (), queries, torch.int64)


def _vector(name: str, t: Tensor | None, shape: tuple[int, ...], x: Tensor, dtype: torch.dtype | None = None) -> None:
    """Checks an optional operand; ``dtype`` None means any floating dtype."""
    if t is None:
        return
    if tuple(t.shape) != shape:
        raise ValueError(f"{name}: got shape {tuple(t.shape)}, expected {shape}")
    if t.dtype != dtype if dtype is not None else not t.is_floating_point():
        raise TypeError(f"{name}: got dtype {t.dtype}, expected {dtype or 'a floating dtype'}")
    checks.same_device(name, t, "x", x)


def _ids(spec: StatsSpec) -> None:
    if spec.row_ids is None or spec.col_ids is None:
        if (spec.row_ids is None) != (spec.col_ids is None):
            raise ValueError("row_ids, col_ids: got only one of them, expected both or neither")
        if spec.equal_ids in ("apart", "add"):
            raise ValueError(f"row_ids, col_ids: got None with equal_ids={spec.equal_ids!r}, expected both")
        return
    count = spec.row_ids.shape[1:]
    if spec.col_ids.shape[1:] != count:
        raise ValueError(
            f"col_ids: got shape {tuple(spec.col_ids.shape)}, expected as many ids a column as a row has in row_ids, "
            f"whose shape is {tuple(spec.row_ids.shape)}"
        )
    if len(count) > 0 and not 1 <= count[0] <= MOST_IDS:
        raise ValueError(f"row_ids: got {count[0]} ids a row, expected 1 to {MOST_IDS}")


def _guide(spec: StatsSpec) -> None:
    guide = spec.row_guide, spec.col_guide
    if guide[0] is None or guide[1] is None:
        if guide[0] is not guide[1]:
            raise ValueError("row_guide, col_guide: got only one of them, expected both or neither")
        return
    if guide[0].dim() != 2 or guide[1].dim() != 2 or guide[0].shape[1] != guide[1].shape[1]:
        raise ValueError(
            f"col_guide: got shape {tuple(guide[1].shape)}, expected (N, G) with the G of row_guide, whose shape is "
            f"{tuple(guide[0].shape)}"
        )


def _lengths(spec: StatsSpec, m: int, n: int) -> None:
    """The lengths of the groups, which kernels trust."""
    rows, cols = spec.row_lengths, spec.col_lengths
    if rows is None or cols is None:
        if rows is not cols:
            raise ValueError("row_lengths, col_lengths: got only one of them, expected both or neither")
        return
    group_checks.lengths("row_lengths", rows, m, "the rows of x")
    group_checks.lengths("col_lengths", cols, n, "the rows of y")
    if rows.shape != cols.shape or rows.device.type != "cpu" or cols.device.type != "cpu":
        raise ValueError(
            f"col_lengths: got shape {tuple(cols.shape)} on {cols.device}, expected the shape of row_lengths, "
            f"{tuple(rows.shape)}, both on the CPU"
        )
    if (spec.paired and spec.targets is None and (rows > cols).any()) or (spec.upper and not rows.equal(cols)):
        raise ValueError(
            "row_lengths, col_lengths: got a group with more rows than columns without targets, or one of different "
            "lengths with upper=True"
        )


def _kept_rows(kept_rows: int, rows: int) -> None:
    if not 0 <= kept_rows <= rows:
        raise ValueError(f"kept_rows: got {kept_rows}, expected 0 to {rows}, the rows of x")


def _needs(needs: Sequence[bool], count: int) -> None:
    if len(needs) != count:
        raise ValueError(f"needs: got {len(needs)} values, expected {count}")
