"""``sample_negatives``: negatives drawn from the softmax of the logits, which are never stored whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import NamedTuple

from fused_contrastive.core import checks
from fused_contrastive.core.forks import guarded
from fused_contrastive.core.spec import BackendName, compute_dtype
from fused_contrastive.ops.exclusions import Exclusions
from fused_contrastive.ops.problem import checked_pair_of_ids, checked_targets
from fused_contrastive.ops.ranking import ranked


class SampledNegatives(NamedTuple):
    """Negatives drawn in each direction, in the order drawn; None for a direction that was not requested.

    Attributes:
        row: (M, k) int64, for each row of x the rows of y that were drawn; -1 where no more were left.
        col: (N, k) int64, for each row of y the rows of x that were drawn; likewise.
    """

    row: Tensor | None
    col: Tensor | None


@guarded
def sample_negatives(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    k: int = 1,
    *,
    targets: Tensor | None = None,
    generator: torch.Generator | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    directions: Sequence[Literal["row", "col"]] = ("row", "col"),
    backend: BackendName = "auto",
) -> SampledNegatives:
    """Draws k negatives for each row and column, the harder the likelier, without the M x N matrix.

    With logits ``S[i, j] = scale * x[i] . y[j]``, row i gets a column j with the probability that the softmax of its
    logits gives it, its positive and related columns left out; k > 1 draws without replacement: each draw is from the
    softmax of what is left. Columns get rows by the softmax along the columns. These are the hard negatives of
    image-text matching in ALBEF (Li et al. 2021, arXiv:2107.07651) and BLIP (Li et al. 2022, arXiv:2201.12086).

    Gumbel noise is added to the logits block by block, and the k largest are kept (Kool et al. 2019, arXiv:1903.06059).
    The noise is a function of a seed, the row and the column, whatever the blocks and the number of threads. A
    direction's draws do not depend on whether the other is requested. Not differentiable.

    Args:
        x: (M, D) float32, float64, bfloat16 or float16. Not normalised here.
        y: (N, D), same dtype and device.
        scale: multiplies the products (an inverse temperature); a number or a 0-d tensor.
        k: how many, at least 1.
        targets: (M,) integers, the column of each row's positive. Default: t(i) = i, which needs M <= N.
        generator: draws the seeds, two integers a call. Default: torch's own of the device of x.
        row_ids, col_ids: (M,) and (N,) integers, or (M, K) and (N, K) with K <= 4; pairs with equal ids, in any of the
            K places, are never drawn.
        directions: which of "row" and "col" to draw.
        backend: see ``contrastive_stats``.

    Returns:
        SampledNegatives(row (M, k), col (N, k)) int64. Where fewer than k are left, the last places are -1. Logits that
        are -inf or NaN are never drawn. Autocast changes nothing.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        RuntimeError: the backend cannot run here.
    """
    checks.feature_pair("x", x, "y", y)
    want = checks.directions(directions)
    scale = checks.scalar_beside("scale", scale, x)
    if not isinstance(scale, Tensor):
        scale = x.new_full((), scale, dtype=compute_dtype(x.dtype))
    checks.at_least_1("k", k)
    targets = checked_targets(targets, x, y, False)
    ids = checked_pair_of_ids(row_ids, col_ids, x, y)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: got {type(generator).__name__}, expected a torch.Generator")
    if targets is not None:  # pairs of a row and its target have an equal id
        checks.target_range(targets, len(y))
        ids = _with(ids[0], targets), _with(ids[1], torch.arange(len(y), device=x.device))
    device = x.device if generator is None else generator.device
    seeds = torch.randint(2**63 - 1, (2,), generator=generator, device=device).to(x.device)
    found: list[Tensor | None] = []
    for wanted, seed, queries, candidates, own in zip(want, seeds, (x, y), (y, x), (ids, ids[::-1]), strict=True):
        if not wanted:
            found.append(None)
            continue
        positives = None if targets is not None else _diagonal(len(queries), len(candidates), x.device)
        drawn = ranked(
            queries, candidates, min(k, len(candidates)), scale, Exclusions(positives, *own), seed, backend
        )[1]  # fmt: skip
        found.append(F.pad(drawn, (0, k - drawn.shape[1]), value=-1))
    return SampledNegatives(*found)


def _with(ids: Tensor | None, more: Tensor) -> Tensor:
    """Ids, (M,) or (M, K), with one more place."""
    return more if ids is None else torch.cat((ids.view(len(more), -1), more[:, None]), dim=1)


def _diagonal(m: int, n: int, device: torch.device) -> Tensor:
    """(m, 1) the column on each row's diagonal, -1 for rows that have none."""
    own = torch.arange(m, device=device)[:, None]
    return own.masked_fill(own >= n, -1)
