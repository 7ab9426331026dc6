"""open_clip's losses (tested with open_clip_torch 3.3.0)."""

from __future__ import annotations

from functools import wraps
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fused_contrastive.adapters.common import Fused, check_pair, importing, not_covered, scalar
from fused_contrastive.adapters.patching import Patch
from fused_contrastive.core import checks
from fused_contrastive.core.spec import compute_dtype
from fused_contrastive.distributed.batch import GlobalBatch
from fused_contrastive.distributed.shape import LocalShape
from fused_contrastive.losses.clip import clip_loss
from fused_contrastive.losses.distillation import learn_from
from fused_contrastive.losses.info_nce import info_nce_loss
from fused_contrastive.losses.siglip import siglip_loss
from fused_contrastive.ops.own_dots import own_dots
from fused_contrastive.ops.problem import Problem, autocast, log_add
from fused_contrastive.ops.row_loss import cross_entropy
from fused_contrastive.ops.stats import contrastive_stats

with importing("open_clip_torch", tested="3.3.0"):
    from open_clip import loss as library

TEACHER_LOGITS = 1 << 20  # how many of the teacher's logits are held at a time


class ClipLoss(Fused, library.ClipLoss):
    """open_clip's ClipLoss without the logits.

    Constructor and call are open_clip's: (N, D) features, ``logit_scale`` already exponentiated (0-d, or of shape (1,)
    as FSDP2 keeps it). Over processes, ``local_loss`` and ``gather_with_grad`` give the library's value and gradients;
    the scale's gradient is the library's after DDP's mean. The loss is float32 (float64 for float64 features); a
    ``logit_bias`` cancels in the softmax and gets a gradient of 0.

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
        if logit_bias is not None:  # adds 0, so that the bias has a gradient of 0; NaN if the bias is NaN or inf
            checks.scalar("logit_bias", scalar(logit_bias))
            total = total + (scalar(logit_bias) - scalar(logit_bias))
        return {"contrastive_loss": total} if output_dict else total

    def _over_processes(
        self, image_features: Tensor, text_features: Tensor, scale: float | Tensor, options: dict[str, Any]
    ) -> Tensor:
        """What the flags give in open_clip, gradients included; for the whole batch, it takes one block of the logits.

        local_loss  gather_with_grad   value          features' gradient, in units of the whole batch's mean loss
        False       False              whole batch    1: after DDP's mean, 1 / world
        False       True               whole batch    world: after DDP's mean, exact
        True        True               own rows       world: after DDP's mean, exact
        True        False              own rows       of the own features as rows alone
        """
        if self.local_loss and not self.gather_with_grad:
            images, texts = self._gathered(image_features, text_features)
            own = self._own_rows(image_features)
            of_images: Tensor = info_nce_loss(image_features, texts, logit_scale=scale, targets=own, **options)
            of_texts: Tensor = info_nce_loss(text_features, images, logit_scale=scale, targets=own, **options)
            return (of_images + of_texts) / 2
        if self.local_loss:
            losses: Tensor = clip_loss(
                image_features, text_features, scale, reduction="none", group=GlobalBatch(gradients="sum"), **options
            )
            return losses.mean()
        if not self.gather_with_grad and isinstance(scale, Tensor):  # in open_clip each process has all of its gradient
            scale = scale.detach() + self.world_size * (scale - scale.detach())
        group = GlobalBatch(gradients="mean" if self.gather_with_grad else "sum")
        loss: Tensor = clip_loss(image_features, text_features, scale, group=group, **options)
        return loss

    def _gathered(self, image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
        if self.world_size == 1:
            return image_features, text_features
        gathered: tuple[Tensor, Tensor] = library.gather_features(
            image_features, text_features, local_loss=self.local_loss, gather_with_grad=self.gather_with_grad,
            rank=self.rank, world_size=self.world_size,
        )  # fmt: skip
        return gathered

    def _own_rows(self, features: Tensor) -> Tensor | None:
        """The gathered columns of this process's own positives, if only its own rows count; None if all rows do."""
        if self.world_size == 1 or not self.local_loss:
            return None
        return torch.arange(len(features), device=features.device) + len(features) * int(self.rank)


class CoCaLoss(library.CoCaLoss, ClipLoss):
    """open_clip's CoCaLoss: its contrastive term is ours, its caption term the library's."""


class DistillClipLoss(ClipLoss):
    """open_clip's DistillClipLoss: the CLIP loss, and the cross-entropy of the student's softmax with the teacher's.

    With logits S of the student and P the teacher's softmax, a row of the distillation term is ::

        -sum_j P[i, j] log softmax(S)[i, j] = logsumexp(S[i]) - sum_j P[i, j] S[i, j]

    Neither matrix of logits is stored. If the teacher gets no gradient, one pass makes both losses. Otherwise the
    second part, linear in the student's features, goes through the teacher's logits some rows at a time.
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
        check_pair("image_features", image_features, "text_features", text_features)
        check_pair("dist_image_features", dist_image_features, "dist_text_features", dist_text_features)
        for name, features in (
            ("text_features", text_features),
            ("dist_image_features", dist_image_features),
            ("dist_text_features", dist_text_features),
        ):
            checks.same_rows("image_features", image_features, name, features)
        scale = checks.scalar_beside("logit_scale", logit_scale, image_features)
        teacher_scale = checks.scalar_beside("dist_logit_scale", dist_logit_scale, image_features)
        student = autocast(image_features), autocast(text_features)
        teacher = autocast(dist_image_features), autocast(dist_text_features)
        columns, teacher_columns = self._gathered(*student), self._gathered(*teacher)
        own = self._own_rows(image_features)
        options: dict[str, Any] = {"targets": own, **self._options()}
        if own is None:  # one matrix has both directions: images are its rows, texts its columns
            options["directions"] = ["row", "col"]
            blocks = [(columns[0], columns[1], teacher_columns[0], teacher_columns[1])]
        else:
            options["directions"] = ["row"]
            blocks = [(student[a], columns[b], teacher[a], teacher_columns[b]) for a, b in ((0, 1), (1, 0))]
        dtype = compute_dtype(student[0].dtype)
        contrastive, distill = [], []
        for x, y, teacher_x, teacher_y in blocks:
            of_teacher = (teacher_x, teacher_y, teacher_scale)
            learns = any(isinstance(t, Tensor) and t.requires_grad for t in of_teacher)
            if not (learns and torch.is_grad_enabled()):
                losses = self._with_frozen_teacher(x, y, scale, teacher_x, teacher_y, teacher_scale, own)
                contrastive.append(losses[0].to(dtype))
                distill.append(losses[1].to(dtype))
                continue
            pos, *rest = contrastive_stats(x, y, scale, **options)
            denominators = [each for each in rest if each is not None]
            contrastive.append(cross_entropy(pos, *denominators, dtype=dtype, backend=self.backend))
            teacher_pos, *rest = contrastive_stats(teacher_x, teacher_y, teacher_scale, **options)
            teacher_row, teacher_col = (each if each is None else log_add(teacher_pos, each) for each in rest)
            assert teacher_row is not None
            expected = scale * _expected(x, y, teacher_scale, teacher_x, teacher_y, teacher_row, teacher_col)
            normalisers = torch.stack([log_add(pos, each) for each in denominators])
            distill.append((normalisers.mean() - expected / normalisers.numel()).to(dtype))
        contrastive_loss, distill_loss = torch.stack(contrastive).mean(), torch.stack(distill).mean()
        if output_dict:
            return {"contrastive_loss": contrastive_loss, "distill_loss": distill_loss}
        return contrastive_loss, distill_loss

    def _with_frozen_teacher(
        self, x: Tensor, y: Tensor, scale: float | Tensor, teacher_x: Tensor, teacher_y: Tensor,
        teacher_scale: float | Tensor, own: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Both losses of a block from one pass; row i's positive is in column own[i], or i if both directions count."""
        problem = Problem(x, y, scale, **self._options())
        dtype = problem.spec.scale.dtype
        learn_from(problem, teacher_x.detach().to(dtype), teacher_y.detach().to(dtype), teacher_scale)
        shape = LocalShape(len(x), len(y))
        _, row, col = problem.run(shape, want_col=own is None, statistic="teacher")
        parts = torch.cat((row, col)) if own is None else row
        pos = problem.spec.scale * own_dots(x, (y if own is None else y[own])[:, None]).squeeze(1)
        return parts[:, 0].mean() - pos.to(parts.dtype).mean(), (parts[:, 0] - parts[:, 1]).mean()


class SigLipLoss(Fused, library.SigLipLoss):
    """open_clip's SigLipLoss without the logits, with its value and gradients over processes too.

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
        if self.world_size > 1:
            exchange: Any = "ring" if self.dist_impl in ("bidir", "shift") else "gather"
            options["group"] = GlobalBatch(exchange=exchange, gradients="sum")
        bias = None if logit_bias is None else scalar(logit_bias)
        losses = siglip_loss(image_features, text_features, scalar(logit_scale), bias, reduction="none", **options)
        loss = losses.mean()
        return {"contrastive_loss": loss} if output_dict else loss


def _expected(
    x: Tensor, y: Tensor, scale: float | Tensor, teacher_x: Tensor, teacher_y: Tensor, row: Tensor, col: Tensor | None
) -> Tensor:
    """The sum of ``P * (x @ y.T)``: P are the teacher's softmaxes over each row and, with ``col``, over each column.

    (M, D), (N, D), the teacher's scale and features, and its normalisers (M,) and (N,) -> scalar in their dtype. The
    teacher's logits are formed chunk by chunk, and again in the backward. It is for teachers that get gradients.
    """
    dtype = compute_dtype(x.dtype)
    a, b = scale * teacher_x.to(dtype), teacher_y.to(dtype)
    wide_x, wide_y = x.to(dtype), y.to(dtype)
    step = max(1, TEACHER_LOGITS // len(y))
    short_row, short_col = row.to(dtype), None if col is None else col.to(dtype)

    def of_chunk(x: Tensor, a: Tensor, b: Tensor, row: Tensor, col: Tensor | None) -> Tensor:
        logits = a @ b.T
        weights = (logits - row[:, None]).exp()
        if col is not None:
            weights = weights + (logits - col).exp()
        return (x * (weights @ wide_y)).sum(dim=1)

    chunks = [slice(k, k + step) for k in range(0, len(x), step)]
    sums = [checkpoint(of_chunk, wide_x[k], a[k], b, short_row[k], short_col, use_reentrant=False) for k in chunks]
    return torch.cat(sums).to(row.dtype).sum()


ORIGINALS = {getattr(library, cls.__name__): cls for cls in (ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss)}
__getattr__ = not_covered(__name__, library)


def patch_open_clip() -> Patch:
    """Makes open_clip create our losses: in its factory, and so in its training, and wherever they are imported.

    Call it before the loss is created. ``undo()`` of the ``Patch``, or leaving its ``with`` block, takes it back.
    """
    patch = Patch()
    for package in ("open_clip", "open_clip_train"):
        patch.replace_everywhere(package, ORIGINALS)
    return patch
