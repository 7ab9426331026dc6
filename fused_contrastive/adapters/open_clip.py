"""open_clip's losses (open_clip_torch 3.3)."""

from __future__ import annotations

from functools import wraps
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from open_clip import loss as library
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fused_contrastive.adapters.common import Fused, scalar
from fused_contrastive.adapters.patching import Patch
from fused_contrastive.core import checks
from fused_contrastive.core.spec import compute_dtype
from fused_contrastive.distributed.batch import GlobalBatch
from fused_contrastive.losses.clip import clip_loss
from fused_contrastive.losses.info_nce import info_nce_loss
from fused_contrastive.losses.siglip import siglip_loss
from fused_contrastive.losses.terms import pair_logit
from fused_contrastive.ops.cross_entropy import cross_entropy
from fused_contrastive.ops.stats import autocast, contrastive_stats, log_add

TEACHER_LOGITS = 1 << 24  # of the teacher's logits, this many at a time where torch has no streaming attention kernel


class ClipLoss(Fused, library.ClipLoss):
    """open_clip's ClipLoss without the logits.

    Constructor and call as there: (N, D) features, ``logit_scale`` already exponentiated (0-d, or of shape (1,) as
    FSDP2 keeps it). Over processes, ``local_loss`` and ``gather_with_grad`` give value and gradients as there, of the
    scale after DDP's mean. The loss is float32 (float64) whatever the features; a ``logit_bias`` cancels in the softmax
    and gets a gradient of 0.

    Raises:
        NotImplementedError: ``use_horovod``.
    """

    bypassed: ClassVar[tuple[str, ...]] = ("get_logits", "get_ground_truth")

    @wraps(library.ClipLoss.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if getattr(self, "use_horovod", False):  # gone after 3.3
            raise NotImplementedError("use_horovod: got True, which is not covered: use torch.distributed")

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """(N, D), (N, D), scalar -> the mean of both directions' cross-entropies."""
        scale, options = scalar(logit_scale), self._options()
        if self.world_size > 1:
            total = self._over_processes(image_features, text_features, scale, options)
        else:
            total = clip_loss(image_features, text_features, scale, **options)
        if logit_bias is not None:  # 0, with its gradient; NaN where it is NaN or inf
            checks.scalar("logit_bias", scalar(logit_bias))
            total = total + (scalar(logit_bias) - scalar(logit_bias))
        return {"contrastive_loss": total} if output_dict else total

    def _over_processes(
        self, image_features: Tensor, text_features: Tensor, scale: float | Tensor, options: dict[str, Any]
    ) -> Tensor:
        """What each flag means there, gradients included, with one block of the logits where it means the whole batch.

        local_loss  gather_with_grad   value          features' gradient, in units of the whole batch's mean loss
        False       False              whole batch    1: after DDP's mean, 1 / world
        False       True               whole batch    world: after DDP's mean, exact
        True        True               own rows       world: after DDP's mean, exact
        True        False              own rows       of the own features as rows alone
        """
        if self.local_loss and not self.gather_with_grad:
            images, texts = self._gathered(image_features, text_features)
            own = self._own_rows(image_features)
            return (
                info_nce_loss(image_features, texts, logit_scale=scale, targets=own, **options)
                + info_nce_loss(text_features, images, logit_scale=scale, targets=own, **options)
            ) / 2
        if self.local_loss:
            losses = clip_loss(
                image_features, text_features, scale, reduction="none", group=GlobalBatch(gradients="sum"), **options
            )
            return losses.mean()
        if not self.gather_with_grad and isinstance(scale, Tensor):  # every process has the whole of its gradient there
            scale = scale.detach() + self.world_size * (scale - scale.detach())
        group = GlobalBatch(gradients="mean" if self.gather_with_grad else "sum")
        return clip_loss(image_features, text_features, scale, group=group, **options)

    def _gathered(self, image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
        if self.world_size == 1:
            return image_features, text_features
        gathered: tuple[Tensor, Tensor] = library.gather_features(
            image_features, text_features, local_loss=self.local_loss, gather_with_grad=self.gather_with_grad,
            rank=self.rank, world_size=self.world_size,
        )  # fmt: skip
        return gathered

    def _own_rows(self, features: Tensor) -> Tensor | None:
        """Which gathered columns are this process's own positives, where only its own rows count; None: all rows do."""
        if self.world_size == 1 or not self.local_loss:
            return None
        return torch.arange(len(features), device=features.device) + len(features) * int(self.rank)


class CoCaLoss(library.CoCaLoss, ClipLoss):
    """open_clip's CoCaLoss: its contrastive term is ours, its caption term the library's."""


class DistillClipLoss(ClipLoss):
    """open_clip's DistillClipLoss: the CLIP loss, and the cross-entropy of the student's softmax with the teacher's.

    With logits S of the student and P the teacher's softmax, a row of the distillation term is ::

        -sum_j P[i, j] log softmax(S)[i, j] = logsumexp(S[i]) - scale * x_i . (P y)_i

    whose first part is our row statistic and whose second is attention, with the teacher's features as queries and keys
    and the student's as values: torch's ``scaled_dot_product_attention``. Neither matrix of logits is stored.
    """

    bypassed: ClassVar[tuple[str, ...]] = ("get_logits", "get_ground_truth", "dist_loss")

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: float | Tensor,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """(N, D) features and scale of the student, then of the teacher -> contrastive and distillation loss."""
        student = autocast(image_features), autocast(text_features)
        teacher = autocast(dist_image_features), autocast(dist_text_features)
        columns, teacher_columns = self._gathered(*student), self._gathered(*teacher)
        own = self._own_rows(image_features)
        rows, teacher_rows = (columns, teacher_columns) if own is None else (student, teacher)
        scale, teacher_scale = scalar(logit_scale), scalar(dist_logit_scale)
        dtype = compute_dtype(student[0].dtype)
        contrastive, distill = [], []
        for a, b in ((0, 1), (1, 0)):  # images against texts, texts against images
            x, y = rows[a], columns[b]
            pos, row, _ = contrastive_stats(
                x, y, scale, targets=own, directions=["row"], memory_budget=self.memory_budget, backend=self.backend
            )
            assert row is not None
            contrastive.append(cross_entropy(pos, row, dtype=dtype, backend=self.backend))
            expected = pair_logit(
                scale, x, _attention(teacher_scale * teacher_rows[a].to(dtype), teacher_columns[b], y)
            )
            distill.append((log_add(pos, row) - expected).mean().to(dtype))
        contrastive_loss, distill_loss = sum(contrastive) / 2, sum(distill) / 2
        assert isinstance(contrastive_loss, Tensor)
        assert isinstance(distill_loss, Tensor)
        if output_dict:
            return {"contrastive_loss": contrastive_loss, "distill_loss": distill_loss}
        return contrastive_loss, distill_loss


class SigLipLoss(Fused, library.SigLipLoss):
    """open_clip's SigLipLoss without the logits; over processes, value and gradients as there.

    ``dist_impl`` "bidir" and "shift" pass the texts round, "reduce" and "gather" gather them.
    """

    bypassed: ClassVar[tuple[str, ...]] = ("get_logits", "get_ground_truth", "_loss")

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """(N, D), (N, D), scalars -> the sum over all pairs with this process's images, per image."""
        options = self._options()
        if self.world_size > 1:  # neighbours' exchange passes texts round, the others gather
            exchange: Any = "ring" if self.dist_impl in ("bidir", "shift") else "gather"
            options["group"] = GlobalBatch(exchange=exchange, gradients="sum")
        bias = None if logit_bias is None else scalar(logit_bias)
        losses = siglip_loss(image_features, text_features, scalar(logit_scale), bias, reduction="none", **options)
        loss = losses.mean()
        return {"contrastive_loss": loss} if output_dict else loss


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(M, D), (N, D), (N, D') -> softmax(query key^T) value, a chunk of queries at a time.

    Chunks are recomputed in the backward, so that nothing M x N is kept where torch's kernel for this device, dtype
    and D does not stream.
    """
    rows = max(1, TEACHER_LOGITS // len(key))
    dtype = compute_dtype(value.dtype)
    key, value = key.to(dtype)[None], value.to(dtype)[None]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=1.0)[0]

    chunks = [checkpoint(attend, q[None], key, value, use_reentrant=False) for q in query.to(dtype).split(rows)]
    return torch.cat(chunks)


ORIGINALS = {getattr(library, cls.__name__): cls for cls in (ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss)}


def patch_open_clip() -> Patch:
    """Makes open_clip create our losses: its factory, and so its training entry point, and all that imports them.

    Call it before the loss is created. Returns a ``Patch``, which ``undo()`` or leaving a ``with`` block takes back.
    """
    patch = Patch()
    for package in ("open_clip", "open_clip_train"):
        patch.replace_everywhere(package, ORIGINALS)
    return patch
