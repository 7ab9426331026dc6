"""lightly's contrastive losses (tested with 1.6.0)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_contrastive.adapters.common import Fused, check_pair, importing, not_covered
from fused_contrastive.adapters.patching import Patch
from fused_contrastive.core import checks
from fused_contrastive.core.spec import compute_dtype
from fused_contrastive.distributed.batch import GlobalBatch
from fused_contrastive.losses.terms import pair_logit
from fused_contrastive.ops.normalize import normalized
from fused_contrastive.ops.problem import autocast
from fused_contrastive.ops.row_loss import cross_entropy
from fused_contrastive.ops.stats import contrastive_stats, self_stats

with importing("lightly", tested="1.6.0"):
    from lightly import loss as library
    from lightly.loss import dcl_loss, ntx_ent_loss
    from lightly.utils import dist


class NTXentLoss(Fused, ntx_ent_loss.NTXentLoss):
    """lightly's NTXentLoss without the logits: SimCLR's, or MoCo's if there is a memory bank.

    Constructor, call and memory bank are lightly's, ``gather_distributed`` included: out0, out1 of shape (N, D), which
    are normalised here. The loss is float32 (float64 for float64 features).
    """

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """(N, D), (N, D) -> scalar."""
        _check_views(out0, out1)
        out0, out1 = normalized(out0, backend=self.backend), normalized(out1, backend=self.backend)
        out1, bank = self.memory_bank.forward(
            out1, update=out0.requires_grad
        )  # before autocast, so that the bank's features are not rounded
        out0, out1 = autocast(out0), autocast(out1)
        if bank is not None:
            pos, row = self._against_bank(out0, out1, bank.T.to(out0))
        else:
            gathers = self.gather_distributed and dist.world_size() > 1
            pos, row = _both_views(out0, out1, 1 / self.temperature, gathers, self._options())
        return cross_entropy(pos, row, dtype=compute_dtype(out0.dtype), backend=self.backend)

    def _against_bank(self, query: Tensor, key: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
        """pos and row, (N,): the positive is a key of the batch, but only the bank's columns are negatives, by ids."""
        n = len(query)
        col_ids = torch.ones(n + len(bank), dtype=torch.long, device=query.device).index_fill_(
            0, torch.arange(n, device=query.device), 0
        )
        stats = contrastive_stats(
            query, torch.cat((key, bank)), 1 / self.temperature, row_ids=torch.zeros_like(col_ids[:n]),
            col_ids=col_ids, directions=("row",), **self._options(),
        )  # fmt: skip
        return stats.pos, stats.row


class DCLLoss(Fused, dcl_loss.DCLLoss):
    """lightly's DCLLoss without the logits: the other view is not in the denominator.

    Constructor and call are lightly's, ``weight_fn`` included: out0, out1 of shape (N, D), which are normalised here.
    """

    bypassed: ClassVar[tuple[str, ...]] = ("_loss",)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """(N, D), (N, D) -> scalar."""
        _check_views(out0, out1)
        if self.weight_fn:  # it may use the features too, and ``normalized`` writes to a gradient in place
            out0, out1 = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
        else:
            out0, out1 = normalized(out0, backend=self.backend), normalized(out1, backend=self.backend)
        gathers = self.gather_distributed and dist.world_size() > 1
        pos, row = _both_views(autocast(out0), autocast(out1), 1 / self.temperature, gathers, self._options())
        if self.weight_fn:
            weights = [self.weight_fn(out0, out1), self.weight_fn(out1, out0)]
            pos = torch.cat([each * weight for each, weight in zip(pos.chunk(2), weights, strict=True)])
        return (row - pos).mean().to(compute_dtype(out0.dtype))


class DCLWLoss(dcl_loss.DCLWLoss, DCLLoss):
    """lightly's DCLWLoss: DCLLoss weighted by negative von Mises-Fisher weights of the positives."""


def _check_views(out0: Tensor, out1: Tensor) -> None:
    check_pair("out0", out0, "out1", out1)
    checks.same_rows("out0", out0, "out1", out1)


def _both_views(
    out0: Tensor, out1: Tensor, scale: float, gathers: bool, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """pos and row (2N,): each feature of both views against all others, but its own positive, which is in pos."""
    n, group = len(out0), GlobalBatch(exchange="gather", gradients="sum") if gathers else None
    first = dist.rank() * n if gathers else 0  # the library assumes as many rows in every process
    sample = torch.arange(first, first + n, device=out0.device).repeat(2)
    row = self_stats(torch.cat((out0, out1)), scale, ids=sample, group=group, **options)
    return pair_logit(scale, out0, out1).to(row.dtype).repeat(2), row


ORIGINALS = {ntx_ent_loss.NTXentLoss: NTXentLoss, dcl_loss.DCLLoss: DCLLoss, dcl_loss.DCLWLoss: DCLWLoss}
__getattr__ = not_covered(__name__, library)


def patch_lightly() -> Patch:
    """Makes ``lightly.loss`` hold the classes of this module.

    Call it before the losses are created. ``undo()`` of the ``Patch``, or leaving its ``with`` block, takes it back.
    """
    patch = Patch()
    patch.replace_everywhere("lightly", ORIGINALS)
    return patch
