"""``rank`` and ``target_ranks``: the best candidates of each query, and where its own one stands.

Both walk the (M, N) scores in blocks: a vendor GEMM fills one, a backend merges it into what is kept of each row.
Memory is one block and the result, whatever N.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from fused_contrastive.backends.contract import Backend
from fused_contrastive.core import checks
from fused_contrastive.core.modes import is_plain
from fused_contrastive.core.spec import autocast_enabled, compute_dtype
from fused_contrastive.ops import dispatch
from fused_contrastive.ops.schema import library
from fused_contrastive.ops.transforms import register_constant

# Rows and columns of a block, wider where there are fewer rows: 16 MB of float32, on a GPU 64 MB and a few times that
# for the keys by which it sorts.
BLOCK = (2048, 2048)
GPU_BLOCK = (4096, 4096)


class Ranking(NamedTuple):
    """The best k candidates of each query, best first.

    Attributes:
        scores: (M, k).
        indices: (M, k) int64, rows of the candidates.
    """

    scores: Tensor
    indices: Tensor


def rank(
    queries: Tensor,
    candidates: Tensor,
    k: int,
    *,
    scale: float | Tensor | None = None,
    backend: str = "auto",
) -> Ranking:
    """The k candidates with the largest inner product, for each query, without the M x N matrix.

    The same as ::

        scores, indices = (scale * queries @ candidates.T).sort(dim=1, descending=True, stable=True)
        Ranking(scores[:, :k], indices[:, :k])

    but for NaN, which comes last. Equal scores go by the smaller index, on every backend, so that the same scores give
    the same ranking everywhere. Products are rounded as the vendor's GEMM rounds them: two candidates with the same
    features may differ in the last bit where its tiles end.

    Args:
        queries: (M, D) float32, float64, bfloat16 or float16.
        candidates: (N, D), same dtype and device.
        k: how many, from 1 to N.
        scale: multiplies the inner products; a number or a 0-d tensor. A negative one reverses the order.
        backend: see ``contrastive_stats``.

    Returns:
        Ranking(scores (M, k), indices (M, k) int64); scores are float32 (float64 for float64 features). Not
        differentiable. Autocast changes nothing.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        RuntimeError: the backend cannot run here.
    """
    checks.feature_pair("queries", queries, "candidates", candidates)
    checks.count("k", k, candidates.shape[0], "N, the number of candidates")
    if scale is not None:
        scale = checks.scalar("scale", scale)
        if not isinstance(scale, Tensor):
            scale = queries.new_full((), scale, dtype=compute_dtype(queries.dtype))
    chosen = dispatch.resolve(backend, queries.device, queries.dtype)
    run = _rank if is_plain(queries, candidates, scale) else torch.ops.fused_contrastive.rank
    return Ranking(*run(queries, candidates, k, scale, chosen))


def _rank(queries: Tensor, candidates: Tensor, k: int, scale: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    chosen, m = dispatch.BACKENDS[backend], queries.shape[0]
    with plain(queries):
        walk = _Walk(queries, candidates)
        values = queries.new_empty((m, k), dtype=compute_dtype(queries.dtype))
        indices = queries.new_empty((m, k), dtype=torch.int64)
        for rows in walk.rows:
            some = queries[rows]
            for columns in walk.columns:
                scores = walk.scores(some, columns)
                if scale is not None:
                    scores *= scale
                chosen.merge_top_k(scores, columns.start, values[rows], indices[rows])
    return values, indices


def target_ranks(
    queries: Tensor, candidates: Tensor, *, targets: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Where each query's own candidate stands among all N: 0 if it comes first, by the order of ``rank``.

    Counts the candidates ahead of the target: those with a larger inner product, and those with the same one and a
    smaller index. The target's score is read from the block of products that is compared with it, so it is not off by
    a rounding from its own copy or its duplicates. For that a block that holds targets comes first; if the targets of
    2048 consecutive queries, sorted by target, lie in several blocks of candidates, these are computed twice.

    Args:
        queries: (M, D) float32, float64, bfloat16 or float16.
        candidates: (N, D), same dtype and device.
        targets: (M,) int64, the candidate that belongs to each query. Default: query i's is i, which needs M <= N. On
            a GPU they are read once by the host.
        backend: see ``contrastive_stats``.

    Returns:
        (M,) int64, from 0 to N - 1. A target with a NaN score comes after all numbers.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        RuntimeError: the backend cannot run here.
    """
    checks.feature_pair("queries", queries, "candidates", candidates)
    m, n = queries.shape[0], candidates.shape[0]
    if targets is None:
        if m > n:
            raise ValueError(f"targets: got None for M = {m} queries and N = {n} candidates, expected targets as M > N")
    else:
        checks.vector("targets", targets, m, queries, of="one candidate per query", integer=True)
    chosen = dispatch.resolve(backend, queries.device, queries.dtype)
    plainly = is_plain(queries, candidates, targets)
    run = _target_ranks if plainly else torch.ops.fused_contrastive.target_ranks
    found: Tensor = run(queries, candidates, targets, chosen)
    return found


def _target_ranks(queries: Tensor, candidates: Tensor, targets: Tensor | None, backend: str) -> Tensor:
    if targets is not None:
        checks.target_range(targets, candidates.shape[0])
    chosen, m = dispatch.BACKENDS[backend], queries.shape[0]
    with plain(queries):
        walk = _Walk(queries, candidates)
        everyone = torch.arange(m, device=queries.device)
        order = everyone if targets is None else targets.argsort(stable=True)
        own = everyone if targets is None else targets[order]
        counts = torch.zeros_like(own)
        on_host = torch.arange(m, device="cpu") if targets is None else own.cpu()
        for rows, holding in zip(walk.rows, walk.holding(on_host), strict=True):
            _count(walk, queries[order[rows]], own[rows], holding, chosen, counts[rows])
        return torch.empty_like(counts).index_copy_(0, order, counts)


library.define("rank(Tensor queries, Tensor candidates, SymInt k, Tensor? scale, str backend) -> (Tensor, Tensor)")
library.define("target_ranks(Tensor queries, Tensor candidates, Tensor? targets, str backend) -> Tensor")
library.impl("rank", _rank, "CompositeExplicitAutograd")
library.impl("target_ranks", _target_ranks, "CompositeExplicitAutograd")
register_constant("rank")
register_constant("target_ranks")


@torch.library.register_fake("fused_contrastive::rank", lib=library)
def _fake_rank(queries, candidates, k, scale, backend):  # type: ignore[no-untyped-def]
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=compute_dtype(queries.dtype)), queries.new_empty(shape, dtype=torch.int64)


@torch.library.register_fake("fused_contrastive::target_ranks", lib=library)
def _fake_target_ranks(queries, candidates, targets, backend):  # type: ignore[no-untyped-def]
    return queries.new_empty(queries.shape[0], dtype=torch.int64)


def _count(
    walk: _Walk, queries: Tensor, targets: Tensor, holding: list[slice], backend: Backend, counts: Tensor
) -> None:
    """Adds to ``counts`` (m,) the candidates ahead of the targets (m,) of m queries (m, D).

    ``holding`` are the blocks of columns with all the targets. The last of them is still there to be counted.
    """
    scores = own = walk.room
    for columns in holding:
        scores = walk.scores(queries, columns)
        place = targets - columns.start
        score = scores.gather(1, place.clamp(0, scores.shape[1] - 1)[:, None]).squeeze(1)
        own = torch.where((place >= 0) & (place < scores.shape[1]), score, own[: len(score)])
    backend.count_ahead(scores, holding[-1].start, own, targets, counts)
    for columns in walk.columns:
        if columns != holding[-1]:
            backend.count_ahead(walk.scores(queries, columns), columns.start, own, targets, counts)


class _Walk:
    """The score matrix as blocks of rows x columns, and room for one of them."""

    def __init__(self, queries: Tensor, candidates: Tensor) -> None:
        m, n = queries.shape[0], candidates.shape[0]
        height, width = BLOCK if queries.device.type == "cpu" else GPU_BLOCK
        self.rows = _cuts(m, height)
        tallest = max(rows.stop - rows.start for rows in self.rows)
        self.columns = _cuts(n, height * width // tallest)
        widest = max(columns.stop - columns.start for columns in self.columns)
        self.candidates = candidates
        self.dtype = compute_dtype(queries.dtype)
        self.room = queries.new_empty(tallest * widest, dtype=self.dtype)

    def scores(self, queries: Tensor, columns: slice) -> Tensor:
        """(m, D) queries -> (m, n) inner products with some candidates, valid until the next call."""
        some = self.candidates[columns]
        out = self.room[: len(queries) * len(some)].view(len(queries), len(some))
        if queries.device.type == "cuda" and queries.dtype != self.dtype:
            return torch.mm(queries, some.T, out_dtype=self.dtype, out=out)
        return torch.mm(queries.to(self.dtype), some.T.to(self.dtype), out=out)

    def holding(self, targets: Tensor) -> list[list[slice]]:
        """The blocks of columns that hold some target, for each block of rows; targets (M,) on the CPU."""
        ends = torch.tensor([columns.stop for columns in self.columns], device="cpu")
        found = torch.searchsorted(ends, targets, right=True)  # (M,) numbers of blocks
        return [[self.columns[i] for i in found[rows].unique().tolist()] for rows in self.rows]


def _cuts(size: int, most: int) -> list[slice]:
    """Equal parts of at most ``most``, so that no small remainder is left for the GEMM."""
    parts = -(-size // most)
    at = [size * part // parts for part in range(parts + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(at)]


@contextmanager
def plain(x: Tensor) -> Iterator[None]:
    """Nothing is recorded, and products stay in the compute dtype under autocast."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False) if autocast_enabled(x.device) else nullcontext():
        yield
