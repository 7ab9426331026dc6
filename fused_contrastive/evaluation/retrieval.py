"""Retrieval scores, as Python numbers: on a GPU, the host waits for them.

Both read ``target_ranks``; for more than one score of the same ranking, call that once.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fused_contrastive.core import checks
from fused_contrastive.core.forks import guarded
from fused_contrastive.core.spec import BackendName
from fused_contrastive.ops.ranking import target_ranks


@guarded
def recall_at_k(
    queries: Tensor,
    candidates: Tensor,
    ks: Sequence[int] = (1, 5, 10),
    *,
    targets: Tensor | None = None,
    exclude_self: bool = False,
    backend: BackendName = "auto",
) -> dict[int, float]:
    """The share of queries with a right answer among the first k candidates, for each k.

    ``recall_at_k(images, texts)`` is image-to-text retrieval, ``recall_at_k(texts, images)`` text-to-image. With
    several captions an image, as in COCO and Flickr30K, ``targets`` lists them: (M, P) has the captions of each image,
    or (M,) the image of each caption. The first k are as in ``rank``, so that equal scores are in the order of the
    index: a model that gives everything the same feature has a recall of 1 / N at k = 1, not of 1.

    Args:
        queries: (M, D) float32, float64, bfloat16 or float16.
        candidates: (N, D), same dtype and device.
        ks: integers of at least 1; from k = N on, recall is 1.
        targets: (M,) or (M, P) integers, the right answers to each query; see ``target_ranks``. Default: candidate i
            for query i, which needs M = N.
        exclude_self: queries and candidates are the same set, and no query is its own answer; needs ``targets``.
        backend: see ``contrastive_stats``.

    Returns:
        Recall by k, in the order of ``ks``, as Python numbers: on a GPU the host waits for each.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        RuntimeError: the backend cannot run here.
    """
    checks.counts("ks", ks)
    ranks = target_ranks(queries, candidates, targets=targets, exclude_self=exclude_self, backend=backend)
    return {k: (ranks < k).double().mean().item() for k in ks}


@guarded
def median_rank(
    queries: Tensor,
    candidates: Tensor,
    *,
    targets: Tensor | None = None,
    exclude_self: bool = False,
    backend: BackendName = "auto",
) -> float:
    """The median place of the queries' best right answers, 1 at best; the mean of the two middle ones for an even M.

    Args:
        queries: (M, D) float32, float64, bfloat16 or float16.
        candidates: (N, D), same dtype and device.
        targets: (M,) or (M, P) integers, as in ``recall_at_k``.
        exclude_self: as in ``recall_at_k``.
        backend: see ``contrastive_stats``.

    Returns:
        A Python number: on a GPU the host waits for it.

    Raises:
        TypeError, ValueError, RuntimeError: as ``recall_at_k``.
    """
    ranks = target_ranks(queries, candidates, targets=targets, exclude_self=exclude_self, backend=backend)
    ranks = ranks.sort().values.double()
    middle = ranks[(len(ranks) - 1) // 2] + ranks[len(ranks) // 2]
    return 1 + middle.item() / 2
