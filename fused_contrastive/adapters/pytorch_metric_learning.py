"""pytorch-metric-learning's NTXentLoss, SupConLoss and CrossBatchMemory (tested with 2.9.0)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fused_contrastive.adapters.common import Fused, check_pair, importing, not_covered, scalar
from fused_contrastive.adapters.patching import Patch
from fused_contrastive.core.spec import compute_dtype
from fused_contrastive.losses.terms import class_sums, pair_logit, rows_at
from fused_contrastive.ops.problem import autocast, log_add
from fused_contrastive.ops.row_loss import cross_entropy
from fused_contrastive.ops.stats import contrastive_stats, self_stats

with importing("pytorch-metric-learning", tested="2.9.0"):
    from pytorch_metric_learning import distances, losses, reducers

PAIRS = 1 << 20  # how many positive pairs are held at a time

_CHOSEN_PAIRS = (
    "chosen pairs, which are no function of labels and not covered, expected None: every pair counts here. They come "
    "from a miner, or from DistributedLossWrapper(efficient=True), which lists the pairs of its own rows: take "
    "efficient=False. For CrossBatchMemory use this module's; for a miner, pytorch_metric_learning's own loss"
)


class _LabelLoss(Fused):
    """A mix-in with what both losses share, labels in place of N x N masks; it stands before the library's class."""

    bypassed: ClassVar[tuple[str, ...]] = ("_compute_loss", "mat_based_loss", "pair_based_loss")
    distance: Any
    temperature: Any

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, ref_emb: Tensor, ref_labels: Tensor
    ) -> Any:
        """The library's hook: returns its dict of losses, for (M, D) embeddings against (N, D) references."""
        ref_labels = labels if ref_labels is None else ref_labels
        own = torch.arange(len(embeddings), device=embeddings.device) if ref_labels is labels else None
        if isinstance(indices_tuple, OwnSlots):
            own = indices_tuple.slots
        elif indices_tuple is not None:
            raise NotImplementedError(f"indices_tuple: got {_CHOSEN_PAIRS}")
        if labels is None:
            raise ValueError("labels: got None, expected a tensor of shape (M,)")
        x, y = self._features(embeddings, ref_emb)
        problem = _Labelled(x, y, *_codes(labels, ref_labels), own)
        positives, negatives = int(problem.positives.sum()), int(problem.negatives.sum())
        if not positives or not negatives or positives + negatives <= 2:
            return self.zero_losses()  # type: ignore[attr-defined]
        return self._loss_dict(problem)

    def _features(self, embeddings: Tensor, ref_emb: Tensor) -> tuple[Tensor, Tensor]:
        if type(self.distance) not in (distances.CosineSimilarity, distances.DotProductSimilarity):
            raise NotImplementedError(
                f"distance: got {type(self.distance).__name__}, which is not covered, expected CosineSimilarity or "
                "DotProductSimilarity: use pytorch_metric_learning's own class"
            )
        if self.distance.power != 1:
            raise NotImplementedError(
                f"distance: got power = {self.distance.power}, which is not covered, expected 1: use "
                "pytorch_metric_learning's own class"
            )
        self.distance.reset_stats()
        self.distance.check_shapes(embeddings, ref_emb)
        check_pair("embeddings", embeddings, "ref_emb", ref_emb)
        x = self.distance.maybe_normalize(embeddings)
        y = x if ref_emb is embeddings else self.distance.maybe_normalize(ref_emb)
        self.distance.set_default_stats(embeddings, ref_emb, x, y)
        x = autocast(x)
        return x, x if ref_emb is embeddings else autocast(y)

    def _loss_dict(self, problem: _Labelled) -> dict[str, Any]:
        raise NotImplementedError


class NTXentLoss(_LabelLoss, losses.NTXentLoss):
    """pytorch-metric-learning's NTXentLoss without the N x N matrix: one term for each positive pair.

    A pair's negatives are the features with another label than its anchor; the kernel excludes the others by label.
    With the library's MeanReducer, its default, the terms are summed as they are made; any other reducer gets the list.
    Constructor, call, reducers, regularisers and ``ref_emb`` are the library's; it works in SelfSupervisedLoss, and in
    the CrossBatchMemory of this module.

    Raises:
        NotImplementedError: a distance other than cosine or dot product, or an ``indices_tuple``.
    """

    def _loss_dict(self, problem: _Labelled) -> dict[str, Any]:
        x, y, codes, ref_codes, own = problem
        scale = 1 / scalar(self.temperature)
        if own is not None and y is x:
            row = self_stats(x, scale, ids=codes, **self._options())
        else:  # any positive will do for a target, since its id excludes it too; a row without one is not read
            one_of = torch.zeros_like(problem.counts).index_put((ref_codes,), torch.arange(len(y), device=y.device))
            stats = contrastive_stats(
                x, y, scale, targets=one_of[codes], row_ids=codes, col_ids=ref_codes, directions=("row",),
                **self._options(),
            )  # fmt: skip
            row = stats.row
        if type(self.reducer) is reducers.MeanReducer and not self.reducer.collect_stats:
            mean = problem.softplus_sum(scale, row) / problem.positives.sum()
            return _loss_info(mean, x, None, "already_reduced")
        anchors, partners, logits = problem.positive_pairs(scale)
        pos = logits.to(row.dtype)
        per_pair = cross_entropy(pos, rows_at(row, anchors), dtype=pos.dtype, reduction="none", backend=self.backend)
        return _loss_info(per_pair, x, (anchors, partners), "pos_pair")


class SupConLoss(_LabelLoss, losses.SupConLoss):
    """pytorch-metric-learning's SupConLoss without the N x N matrices: the positives' sum is closed form.

    Constructor, call, reducers, regularisers and ``ref_emb`` are the library's; it works in SelfSupervisedLoss, and in
    the CrossBatchMemory of this module.

    Raises:
        NotImplementedError: a distance other than cosine or dot product, or an ``indices_tuple``.
    """

    def _loss_dict(self, problem: _Labelled) -> dict[str, Any]:
        x, y, codes, ref_codes, own = problem
        scale = 1 / scalar(self.temperature)
        if own is not None and y is x:
            row = self_stats(x, scale, **self._options())
        else:
            targets = torch.zeros_like(codes) if own is None else own
            stats = contrastive_stats(x, y, scale, targets=targets, directions=("row",), **self._options())
            row = log_add(stats.pos, stats.row) if own is None else stats.row
        wide = y.to(compute_dtype(y.dtype))
        sums = rows_at(class_sums(wide, ref_codes, len(problem.counts)), codes)
        if own is not None:
            sums = sums - wide[own]
        mean = pair_logit(scale, x.to(wide.dtype), sums) / problem.positives.clamp_min(1)
        has = problem.positives > 0
        per_row = row.masked_fill(~has, 0) - mean.masked_fill(~has, 0)
        return _loss_info(per_row, x, torch.arange(len(x), device=x.device), "element")


class OwnSlots(NamedTuple):
    """Stands for an indices_tuple: all pairs count, except an embedding with the reference that is its own copy."""

    slots: Tensor | None  # (M,) the reference that is each embedding's own copy; None: there is none


class CrossBatchMemory(losses.CrossBatchMemory):
    """pytorch-metric-learning's CrossBatchMemory; with a loss of this module, it does not list all pairs.

    Constructor, call, queue and ``enqueue_mask`` are the library's. With a loss of the library, so is all else.

    Raises:
        NotImplementedError: a miner or an ``indices_tuple`` with a loss of this module.
    """

    def __init__(self, loss: Any, *args: Any, **options: Any) -> None:
        super().__init__(loss, *args, **options)
        if isinstance(loss, _LabelLoss) and self.miner is not None:
            raise NotImplementedError(
                f"miner: got {type(self.miner).__name__}, which is not covered, expected None: every pair counts here. "
                "To choose pairs, take pytorch_metric_learning's own loss"
            )

    def create_indices_tuple(
        self, embeddings: Any, labels: Any, E_mem: Any, L_mem: Any, input_indices_tuple: Any,  # noqa: N803
        do_remove_self_comparisons: bool,
    ) -> Any:  # fmt: skip
        """The library's hook, which makes the loss's indices_tuple; a loss of the library gets the library's."""
        if not isinstance(self.loss, _LabelLoss):
            return super().create_indices_tuple(
                embeddings, labels, E_mem, L_mem, input_indices_tuple, do_remove_self_comparisons
            )
        if input_indices_tuple is not None:
            raise NotImplementedError(f"indices_tuple: got {_CHOSEN_PAIRS}")
        return OwnSlots(self.curr_batch_idx if do_remove_self_comparisons else None)


class _Labelled(NamedTuple):
    """Rows against references, whose labels decide which pairs are positives."""

    x: Tensor  # (M, D)
    y: Tensor  # (N, D)
    codes: Tensor  # (M,) the rows' labels, as numbers below M + N
    ref_codes: Tensor  # (N,) the references' labels, likewise
    own: Tensor | None  # (M,) the reference that is the row itself, and so is not a positive

    @property
    def counts(self) -> Tensor:
        """(M + N,) how many references have each code."""
        counts = torch.zeros(len(self.x) + len(self.y), dtype=torch.long, device=self.x.device)
        return counts.index_add_(0, self.ref_codes, torch.ones_like(self.ref_codes))

    @property
    def positives(self) -> Tensor:
        """(M,) how many positives each row has."""
        return self.counts[self.codes] - (0 if self.own is None else 1)

    @property
    def negatives(self) -> Tensor:
        return len(self.y) - self.counts[self.codes]

    def blocks(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Rows (G, m), references (G, n) and the features of both, for G labels at a time with equal m and equal n.

        One label's pairs are a block of S. Features are sorted by label once, so they are not gathered pair by pair.
        """
        counts, own_counts = self.counts, torch.zeros_like(self.counts)
        own_counts.index_add_(0, self.codes, torch.ones_like(self.codes))
        sizes = torch.stack((own_counts, counts), dim=1)
        kinds, kind_of, labels = torch.unique(sizes, dim=0, return_inverse=True, return_counts=True)
        place = kind_of.argsort(stable=True).argsort()  # each label's place in the order of kinds
        order, ref_order = (place[codes].argsort(stable=True) for codes in (self.codes, self.ref_codes))
        m, n, groups = (t.tolist() for t in (*kinds.unbind(1), labels))
        dtype = compute_dtype(self.x.dtype)
        per_row, per_ref = ([g * each for g, each in zip(groups, size, strict=True)] for size in (m, n))
        parts = zip(
            order.split(per_row), ref_order.split(per_ref), self.x.to(dtype)[order].split(per_row),
            self.y.to(dtype)[ref_order].split(per_ref), groups, strict=True,
        )  # fmt: skip
        for rows, references, x, y, g in parts:
            if len(rows) and len(references):
                yield rows.view(g, -1), references.view(g, -1), x.unflatten(0, (g, -1)), y.unflatten(0, (g, -1))

    def softplus_sum(self, scale: float | Tensor, row: Tensor) -> Tensor:
        """The sum of softplus(row - logit) over all positive pairs, some of them at a time.

        The backward computes their logits again, so that no more than ``PAIRS`` are held, for 4 products a pair.
        """
        total = row.new_zeros(())
        for rows, references, x, y in self.blocks():
            g, m, n = *rows.shape, references.shape[1]
            of_labels, of_rows = max(1, PAIRS // (m * n)), max(1, PAIRS // n)
            for labels in (slice(k, k + of_labels) for k in range(0, g, of_labels)):
                for some in (slice(k, k + of_rows) for k in range(0, m, of_rows)):
                    chosen = rows[labels, some]
                    own = None if self.own is None else self.own[chosen]
                    denominators = rows_at(row, chosen.flatten()).view_as(chosen)
                    total = total + checkpoint(
                        _softplus_sum, x[labels, some], y[labels], scale, denominators, own, references[labels],
                        use_reentrant=False,
                    )  # fmt: skip
        return total

    def positive_pairs(self, scale: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(P,) rows, their positives and the pairs' logits, in the order of ``torch.where`` of the library's mask."""
        logits, pairs = [], []
        for rows, references, x, y in self.blocks():
            logits.append((scale * (x @ y.mT)).flatten())
            pairs.append((rows[:, :, None] * len(self.y) + references[:, None]).flatten())  # in the order of the mask
        places, order = torch.cat(pairs).sort()
        rows, partners, of_pairs = places // len(self.y), places % len(self.y), torch.cat(logits)[order]
        if self.own is None:
            return rows, partners, of_pairs
        others = partners != self.own[rows]
        return rows[others], partners[others], of_pairs[others]


def _softplus_sum(
    x: Tensor, y: Tensor, scale: float | Tensor, row: Tensor, own: Tensor | None, references: Tensor
) -> Tensor:
    """(G, m, D), (G, n, D), scalar, (G, m) -> scalar; pairs of a row and its ``own`` (G, m) reference do not count."""
    margins = row.to(x.dtype)[..., None] - scale * (x @ y.mT)
    if own is not None:
        margins = margins.masked_fill(own[..., None] == references[:, None], -torch.inf)
    return F.softplus(margins, threshold=50).sum(dim=-1).to(row.dtype).sum()


def _codes(labels: Tensor, ref_labels: Tensor) -> tuple[Tensor, Tensor]:
    """Labels of any integer type -> numbers below M + N, the same for equal labels."""
    _, codes = torch.unique(torch.cat((labels, ref_labels.to(labels.device))), return_inverse=True)
    return codes[: len(labels)], codes[len(labels) :]


def _loss_info(values: Tensor, x: Tensor, indices: Any, kind: str) -> dict[str, Any]:
    return {"loss": {"losses": values.to(compute_dtype(x.dtype)), "indices": indices, "reduction_type": kind}}


ORIGINALS = {getattr(losses, cls.__name__): cls for cls in (NTXentLoss, SupConLoss, CrossBatchMemory)}

__getattr__ = not_covered(__name__, losses)


def patch_pytorch_metric_learning() -> Patch:
    """Makes ``pytorch_metric_learning.losses`` hold the classes of this module.

    Call it before the losses are created. ``undo()`` of the ``Patch``, or leaving its ``with`` block, takes it back.
    """
    patch = Patch()
    patch.replace_everywhere("pytorch_metric_learning", ORIGINALS)
    return patch
