"""The symmetric image-text contrastive loss of CLIP."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from fused_contrastive.core import checks
from fused_contrastive.core.observing import observed
from fused_contrastive.core.reduction import REDUCTIONS, Reduction
from fused_contrastive.core.spec import BackendName
from fused_contrastive.distributed.agreement import Group, call_of, collective
from fused_contrastive.losses import terms
from fused_contrastive.ops.problem import Problem, autocast
from fused_contrastive.ops.row_loss import row_loss


@observed
@collective
def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    decoupled: bool = False,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    memory_budget: int | Literal["auto"] = "auto",
    backend: BackendName = "auto",
    group: Group = None,
) -> Tensor:
    """The CLIP loss, without the N x N matrix.

    Same value and gradients as ::

        logits = logit_scale * image_features @ text_features.T
        labels = torch.arange(len(logits))
        (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    (Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", arXiv:2103.00020).
    With ``decoupled=True`` the positive is left out of both denominators (Yeh et al. 2022, "Decoupled Contrastive
    Learning", arXiv:2110.06848); with a single pair that denominator is empty and the loss -inf.

    Args:
        image_features: (N, D) float32, float64, bfloat16 or float16; normalise them first as CLIP does.
        text_features: (N, D), same dtype and device; row i is the caption of image i.
        logit_scale: multiplies the similarities (CLIP's learned temperature, already exponentiated); a number or a
            0-d tensor, which gets a gradient.
        temperature: divides them, instead: 1 / logit_scale.
        decoupled: the DCL form.
        label_smoothing: in [0, 1), as in ``F.cross_entropy``: this share of the target is spread over all N.
        reduction: "mean", "sum" (over the N pairs) or "none" ((N,), the mean of a pair's two directions).
        memory_budget, backend, group: see ``contrastive_stats``. Over a group, it is the loss of the whole batch.

    Returns:
        A scalar, or (N,) with ``reduction="none"``; float32 (float64 for float64 features), under autocast too.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    call = call_of(group)
    image_features, text_features = autocast(image_features), autocast(text_features)
    checks.feature_pair("image_features", image_features, "text_features", text_features, call.spread)
    checks.same_rows("image_features", image_features, "text_features", text_features)
    logit_scale = terms.scale_of(temperature, logit_scale, None, image_features)
    checks.boolean("decoupled", decoupled)
    checks.one_of("reduction", reduction, REDUCTIONS)
    checks.unit_interval("label_smoothing", label_smoothing)
    problem = Problem(image_features, text_features, logit_scale, memory_budget=memory_budget, backend=backend)
    options = {"decoupled": decoupled, "label_smoothing": label_smoothing, "reduction": reduction}
    shape = problem.agree(call, "clip_loss", options)
    smoothing = None
    if label_smoothing:
        of_images = terms.mean_logit(logit_scale, image_features, text_features, shape)
        of_texts = terms.mean_logit(logit_scale, text_features, image_features, shape)
        smoothing = label_smoothing, (of_images + of_texts) / 2
    return row_loss(problem, shape, reduction, decoupled=decoupled, smoothing=smoothing, want_col=True)


class ClipLoss(nn.Module):
    """``clip_loss`` as a module. It holds no parameters: the model owns the logit scale.

    Raises:
        TypeError, ValueError: at construction, naming the option, what came and what was expected.
    """

    def __init__(
        self,
        *,
        decoupled: bool = False,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        memory_budget: int | Literal["auto"] = "auto",
        backend: BackendName = "auto",
        group: Group = None,
    ) -> None:
        super().__init__()
        terms.check_module(reduction, memory_budget, backend, decoupled=decoupled)
        checks.unit_interval("label_smoothing", label_smoothing)
        self.decoupled = decoupled
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.memory_budget = memory_budget
        self.backend = backend
        self.group = group

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor | None = None,
        *,
        temperature: float | Tensor | None = None,
    ) -> Tensor:
        """(N, D), (N, D), scalar -> loss; see ``clip_loss``."""
        return clip_loss(
            image_features,
            text_features,
            logit_scale,
            temperature=temperature,
            decoupled=self.decoupled,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
            memory_budget=self.memory_budget,
            backend=self.backend,
            group=self.group,
        )

    def extra_repr(self) -> str:
        return (
            f"decoupled={self.decoupled}, label_smoothing={self.label_smoothing}, reduction={self.reduction!r}, "
            f"memory_budget={self.memory_budget!r}, backend={self.backend!r}"
        )
