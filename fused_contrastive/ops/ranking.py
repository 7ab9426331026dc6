"""``rank`` and ``target_ranks``: the best candidates of each query, and the place of its right answer.

Both walk the (M, N) scores in blocks: a vendor GEMM fills one, a backend merges it into what is kept of each row.
Memory is one block and the result, whatever N.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_contrastive.backends.contract import Backend
from fused_contrastive.core import checks, gumbel
from fused_contrastive.core.forks import guarded
from fused_contrastive.core.modes import is_plain
from fused_contrastive.core.order import ahead
from fused_contrastive.core.spec import BackendName, autocast_enabled, compute_dtype
from fused_contrastive.ops import dispatch, exclusions, operands
from fused_contrastive.ops.exclusions import Exclusions
from fused_contrastive.ops.schema import library
from fused_contrastive.ops.transforms import register_constant

# Rows and columns of a block, which is wider if there are fewer rows: 16 MB of float32. On a GPU it is 64 MB, and the
# keys by which it sorts take a few times as much.
BLOCK = (2048, 2048)
GPU_BLOCK = (4096, 4096)

NOWHERE = torch.iinfo(torch.int64).max  # stands for the column of an answer that is missing, after all real ones


class Ranking(NamedTuple):
    """The best k candidates of each query, best first.

    Attributes:
        scores: (M, k); -inf in places without a candidate.
        indices: (M, k) int64, rows of the candidates; -1 in places without one, which are a row's last.
    """

    scores: Tensor
    indices: Tensor


@guarded
def rank(
    queries: Tensor,
    candidates: Tensor,
    k: int,
    *,
    scale: float | Tensor | None = None,
    targets: Tensor | None = None,
    exclude_ids: tuple[Tensor, Tensor] | None = None,
    max_score: float | None = None,
    absolute_margin: float | None = None,
    relative_margin: float | None = None,
    backend: BackendName = "auto",
) -> Ranking:
    """The k candidates with the largest inner product, for each query, without the M x N matrix.

    The same as ::

        scores, indices = (scale * queries @ candidates.T).sort(dim=1, descending=True, stable=True)
        Ranking(scores[:, :k], indices[:, :k])

    except that NaN comes last. Of equal scores the smaller index comes first, on every backend, so that the same scores
    give the same ranking everywhere. Products are rounded as the vendor's GEMM rounds them: the scores of two
    candidates with the same features may differ in the last bit, at the edges of its tiles.

    To mine hard negatives, ``targets``, ``exclude_ids``, ``max_score`` and the margins leave candidates out (ANCE,
    Xiong et al. 2020, arXiv:2007.00808; NV-Retriever, Moreira et al. 2024, arXiv:2407.15831). If any of these is given,
    candidates with a score of -inf or NaN are left out too, and a row of which fewer than k candidates are left ends
    with indices of -1 and scores of -inf. All limits are of the scores returned, scaled, and a candidate with just that
    score stays.

    Args:
        queries: (M, D) float32, float64, bfloat16 or float16.
        candidates: (N, D), same dtype and device.
        k: how many, from 1 to N.
        scale: multiplies the inner products; a number or a 0-d tensor. A negative one reverses the order.
        targets: (M,) or (M, P) integers, the right answers to each query, with -1 in the places that a row does not
            need; they are left out. Default: none; with a margin, candidate i for query i, which needs M = N.
        exclude_ids: integers of the queries, (M,) or (M, K) with K <= 4, and of the candidates, (N,) or (N, K): a
            candidate is left out if it has the query's integer in any of the K places.
        max_score: candidates with a larger score are left out.
        absolute_margin: candidates that score above the right answer's score minus this are left out; with several
            right answers, the lowest score counts. At a margin of 0 copies of it stay, whatever the rounding; if its
            score is NaN or infinite, all are left out. A query without right answers has no such limit.
        relative_margin: likewise, with this share of the absolute value of the right answer's score.
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
            checks.held("scale", scale, queries)
            scale = queries.new_full((), scale, dtype=compute_dtype(queries.dtype))
    excluded = exclusions.checked(
        queries, candidates, targets, exclude_ids, max_score, absolute_margin, relative_margin
    )  # fmt: skip
    return Ranking(*ranked(queries, candidates, k, scale, excluded, None, backend))


def ranked(
    queries: Tensor, candidates: Tensor, k: int, scale: Tensor | None, excluded: Exclusions, seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``rank`` with its arguments checked; with a seed, () int64, scores have Gumbel noise added to them."""
    chosen = dispatch.resolve(backend, queries.device, queries.dtype)
    plainly = is_plain(queries, candidates, scale, *excluded, seed) and not queries.is_meta
    run = _rank if plainly else torch.ops.fused_contrastive.rank
    return run(queries, candidates, k, scale, *excluded, seed, chosen)


def _rank(queries: Tensor, candidates: Tensor, k: int, scale: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    """``rest``: the fields of Exclusions, the seed, the backend."""
    *fields, seed, backend = rest
    excluded, chosen, m = Exclusions(*fields), dispatch.BACKENDS[backend], queries.shape[0]
    if excluded.targets is not None:
        right = (excluded.targets >= -1) & (excluded.targets < len(candidates))
        checks.all_true("targets", excluded.targets, right, f"0 to {len(candidates) - 1} (N - 1), or -1 for none")
    with plain(queries):
        walk = _Walk(queries, candidates)
        keys = None if seed is None else gumbel.row_keys(seed, m)
        values = queries.new_empty((m, k), dtype=compute_dtype(queries.dtype))
        indices = queries.new_empty((m, k), dtype=torch.int64)
        for rows in walk.rows:
            some, limit = queries[rows], excluded.limit(queries, candidates, scale, rows)
            for columns in walk.columns:
                scores = walk.scores(some, columns)
                if scale is not None:
                    scores *= scale
                excluded.mask(scores, limit, rows, columns)
                if keys is not None:
                    gumbel.add_gumbel(scores, keys[rows], columns.start)
                chosen.merge_top_k(scores, columns.start, values[rows], indices[rows])
        if excluded.any() or seed is not None:
            nothing = ~(values > -torch.inf)
            values.masked_fill_(nothing, -torch.inf)
            indices.masked_fill_(nothing, -1)
    return values, indices


@guarded
def target_ranks(
    queries: Tensor,
    candidates: Tensor,
    *,
    targets: Tensor | None = None,
    exclude_self: bool = False,
    backend: BackendName = "auto",
) -> Tensor:
    """Where each query's right answer stands among all candidates: 0 if it comes first, by the order of ``rank``.

    Counts the candidates ahead of it: those with a larger inner product, and those with the same one and a smaller
    index. If there are several right answers, the best one counts, which is the protocol of retrieval on COCO and
    Flickr30K (Karpathy & Fei-Fei 2015, "Deep Visual-Semantic Alignments for Generating Image Descriptions",
    arXiv:1412.2306). An answer's score is read from the blocks of products that the candidates' scores come from, so
    that rounding cannot put the answer ahead of itself. Therefore the blocks with right answers are
    computed first; if those of 2048 consecutive queries (sorted by first answer) lie in several blocks of candidates,
    these blocks are computed twice.

    Args:
        queries: (M, D) float32, float64, bfloat16 or float16.
        candidates: (N, D), same dtype and device.
        targets: (M,) integers, the candidate that belongs to each query; or (M, P), several for each, with -1 in the
            places that a row does not need. Default: candidate i belongs to query i, which needs M = N. The host reads
            them once, and waits for a GPU.
        exclude_self: queries and candidates are the same set: query i is not compared with candidate i, which is no
            right answer either. Needs M = N and targets.
        backend: see ``contrastive_stats``.

    Returns:
        (M,) int64, from 0 to N - 1. A target with a NaN score comes after all numbers.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        RuntimeError: the backend cannot run here.
    """
    checks.feature_pair("queries", queries, "candidates", candidates)
    checks.boolean("exclude_self", exclude_self)
    _check_self(exclude_self, len(queries), len(candidates))
    targets = _checked_targets(targets, queries, len(candidates), exclude_self)
    chosen = dispatch.resolve(backend, queries.device, queries.dtype)
    plainly = is_plain(queries, candidates, targets) and not queries.is_meta
    run = _target_ranks if plainly else torch.ops.fused_contrastive.target_ranks
    found: Tensor = run(queries, candidates, targets, exclude_self, chosen)
    return found


def _target_ranks(queries: Tensor, candidates: Tensor, targets: Tensor, exclude_self: bool, backend: str) -> Tensor:
    chosen, answers = dispatch.BACKENDS[backend], _answers(targets, len(candidates), exclude_self)
    with plain(queries):
        walk = _Walk(queries, candidates)
        order = answers[:, 0].argsort(stable=True)
        answers = answers[order]
        holding = walk.holding(answers)
        order, answers = order.to(queries.device), answers.to(queries.device)
        counts = torch.zeros_like(order)
        for rows, blocks in zip(walk.rows, holding, strict=True):
            own = order[rows] if exclude_self else None
            counts[rows] = _count(walk, queries[order[rows]], answers[rows], own, blocks, chosen)
        return torch.empty_like(counts).index_copy_(0, order, counts)


library.define(
    "rank(Tensor queries, Tensor candidates, SymInt k, Tensor? scale, Tensor? targets, Tensor? query_ids, "
    "Tensor? candidate_ids, float? max_score, float? absolute_margin, float? relative_margin, Tensor? seed, "
    "str backend) -> (Tensor, Tensor)"
)
library.define(
    "target_ranks(Tensor queries, Tensor candidates, Tensor targets, bool exclude_self, str backend) -> Tensor"
)


def _rank_operator(
    queries: Tensor, candidates: Tensor, k: int, scale: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    """For callers by torch.ops, whose operands nothing has checked."""
    *others, backend = rest
    operands.ranking(queries, candidates, backend)
    checks.count("k", k, candidates.shape[0], "N, the number of candidates")
    if scale is not None:
        checks.scalar("scale", scale)
    operands.excluded(queries, candidates, *others)
    return _rank(queries, candidates, k, scale, *rest)


def _target_ranks_operator(
    queries: Tensor, candidates: Tensor, targets: Tensor, exclude_self: bool, backend: str
) -> Tensor:
    operands.ranking(queries, candidates, backend)
    _check_self(exclude_self, len(queries), len(candidates))
    if targets.dim() != 2:
        raise ValueError(f"targets: got shape {tuple(targets.shape)}, expected two dimensions, (M, P)")
    targets = _checked_targets(targets, queries, len(candidates), exclude_self)
    return _target_ranks(queries, candidates, targets, exclude_self, backend)


library.impl("rank", _rank_operator, "CompositeExplicitAutograd")
library.impl("target_ranks", _target_ranks_operator, "CompositeExplicitAutograd")
register_constant("rank")
register_constant("target_ranks")


@torch.library.register_fake("fused_contrastive::rank", lib=library)
def _fake_rank(queries, candidates, k, *rest):  # type: ignore[no-untyped-def]
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=compute_dtype(queries.dtype)), queries.new_empty(shape, dtype=torch.int64)


@torch.library.register_fake("fused_contrastive::target_ranks", lib=library)
def _fake_target_ranks(queries, candidates, targets, exclude_self, backend):  # type: ignore[no-untyped-def]
    return queries.new_empty(queries.shape[0], dtype=torch.int64)


def _check_self(exclude_self: bool, m: int, n: int) -> None:
    if exclude_self and m != n:
        raise ValueError(f"exclude_self: got True for {m} queries and {n} candidates, expected as many of both")


def _checked_targets(targets: Tensor | None, queries: Tensor, n: int, exclude_self: bool) -> Tensor:
    """(M, P) int64, whose values are not checked here."""
    m = queries.shape[0]
    if targets is None:
        if m != n or exclude_self:
            came = "with exclude_self=True" if exclude_self else f"for {m} queries and {n} candidates"
            raise ValueError(
                f"targets: got None {came}, expected the candidates that belong to each query: "
                f"{exclusions.shape_of_targets(m)}"
            )
        return torch.arange(m, device=queries.device)[:, None]
    return exclusions.checked_targets(targets, queries)


def _answers(targets: Tensor, n: int, exclude_self: bool) -> Tensor:
    """(M, P) right answers, ascending, on the CPU; a row with fewer than P has one of them several times."""
    answers = targets.detach().to("cpu", copy=True)  # a copy, so that the values checked are the values used
    if answers.min() < -1 or answers.max() >= n:
        raise ValueError(
            f"targets: got values from {answers.min()} to {answers.max()}, expected 0 to {n - 1} (N - 1), or -1 for "
            "none"
        )
    right = answers >= 0
    if exclude_self:
        right &= answers != torch.arange(len(answers), device="cpu")[:, None]
    if not (has_one := right.any(dim=1)).all():
        without = " but itself" if exclude_self else ""
        raise ValueError(
            f"targets: got none for query {has_one.int().argmin()}{without}, expected at least one for each"
        )
    one = answers.gather(1, right.int().argmax(dim=1, keepdim=True))
    return answers.where(right, one).sort(dim=1).values


def _count(
    walk: _Walk, queries: Tensor, answers: Tensor, own: Tensor | None, holding: list[slice], backend: Backend
) -> Tensor:
    """(m,) how many candidates stand ahead of the best of the answers (m, P) of m queries (m, D).

    ``holding`` are the blocks of columns with all the answers; the scores of the last one are still there and are
    counted first. ``own`` (m,) are candidates that do not count.
    """
    counts = torch.zeros_like(answers[:, 0])
    target = torch.full_like(counts, NOWHERE)
    score = torch.full_like(counts, torch.nan, dtype=walk.dtype)
    scores = walk.room
    for columns in holding:
        scores = walk.scores(queries, columns)
        found, at = _best(scores, columns.start, answers)
        is_ahead = ahead(found, at, score, target)
        score, target = torch.where(is_ahead, found, score), torch.where(is_ahead, at, target)
    for columns in (holding[-1], *(columns for columns in walk.columns if columns != holding[-1])):
        if columns != holding[-1]:
            scores = walk.scores(queries, columns)
        backend.count_ahead(scores, columns.start, score, target, counts)
        if own is not None:
            counts -= ahead(*_best(scores, columns.start, own[:, None]), score, target).long()
    return counts


def _best(scores: Tensor, first_column: int, answers: Tensor) -> tuple[Tensor, Tensor]:
    """(m,) score and column of the best of the answers (m, P) that lie in a block; NaN and NOWHERE if none does.

    Answers are columns of the whole matrix; the block ``scores`` (m, n) begins at its column ``first_column``.
    """
    place = answers - first_column
    inside = (place >= 0) & (place < scores.shape[1])
    of_answers = scores.gather(1, place.clamp(0, scores.shape[1] - 1))
    is_number = inside & ~of_answers.isnan()
    highest = of_answers.masked_fill(~is_number, -torch.inf).amax(dim=1)
    has_number = is_number.any(dim=1)
    is_best = torch.where(has_number[:, None], is_number & (of_answers == highest[:, None]), inside)
    return highest.masked_fill(~has_number, torch.nan), answers.masked_fill(~is_best, NOWHERE).amin(dim=1)


class _Walk:
    """The score matrix as blocks of rows x columns, and memory for one of them."""

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

    def holding(self, answers: Tensor) -> list[list[slice]]:
        """The blocks of columns that hold some answer, for each block of rows; answers (M, P) on the CPU."""
        ends = torch.tensor([columns.stop for columns in self.columns], device="cpu")
        found = torch.searchsorted(ends, answers, right=True)  # (M, P) index of each answer's block
        return [[self.columns[i] for i in found[rows].unique().tolist()] for rows in self.rows]


def _cuts(size: int, most: int) -> list[slice]:
    """Equal parts of at most ``most``, so that no small remainder is left for the GEMM."""
    parts = -(-size // most)
    at = [size * part // parts for part in range(parts + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(at)]


@contextmanager
def plain(x: Tensor) -> Iterator[None]:
    """Autograd records nothing in this block, and under autocast, products stay in the compute dtype."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False) if autocast_enabled(x.device) else nullcontext():
        yield
