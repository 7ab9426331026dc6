"""FILIP: the CLIP loss on token-level similarities."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from fused_contrastive.core import checks
from fused_contrastive.core.observing import observed
from fused_contrastive.core.reduction import REDUCTIONS, Reduction
from fused_contrastive.core.spec import BackendName, compute_dtype
from fused_contrastive.distributed.agreement import Group, call_of, collective
from fused_contrastive.distributed.shape import GlobalShape, Shape
from fused_contrastive.losses import terms
from fused_contrastive.ops import dispatch
from fused_contrastive.ops.max_sim import max_sim
from fused_contrastive.ops.problem import autocast
from fused_contrastive.ops.row_loss import cross_entropy

COMPAT = (None, "x_clip")
DIRECTIONS: dict[str, Literal["x", "y", "both"]] = {"image": "x", "text": "y", "both": "both"}


@observed
@collective
def filip_loss(
    image_tokens: Tensor,
    text_tokens: Tensor,
    logit_scale: float | Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    decoupled: bool = False,
    compat: Literal["x_clip"] | None = None,
    direction: Literal["image", "text", "both"] = "both",
    reduction: Reduction = "mean",
    memory_budget: int | Literal["auto"] = "auto",
    backend: BackendName = "auto",
    group: Group = None,
) -> Tensor:
    """The CLIP loss on token-level scores: the mean, over an item's tokens, of each one's best match in the other item.

    With ``s_it`` the scores of images against texts (mean over image tokens of the maximum over text tokens) and
    ``s_ti`` the scores of texts against images, both (N, N) and from one pass over the tokens' products::

        (CE of the rows of logit_scale * s_it + CE of the rows of logit_scale * s_ti) / 2

    (Yao et al. 2021, "FILIP: Fine-grained Interactive Language-Image Pre-Training", arXiv:2111.07783). The N x N scores
    are stored, the products of all tokens, a T * P times larger tensor, are not.

    Args:
        image_tokens: (N, P, D) float32, float64, bfloat16 or float16; normalise them first.
        text_tokens: (N, T, D), same dtype and device; item i is the caption of image i.
        logit_scale: multiplies the scores; a number or a 0-d tensor, which gets a gradient.
        temperature: divides them, instead: 1 / logit_scale.
        image_mask, text_mask: (N, P) and (N, T) bool (or numbers 0 and 1), True for a real token. Default: all are
            real. The scores of an item without a real token are 0.
        decoupled: the positive stays out of both denominators (Yeh et al. 2022).
        compat: "x_clip" for what x-clip 0.14 computes: its image-to-text scores are not transposed, so both softmaxes
            run over images.
        direction: "image" for the loss of images against texts alone, "text" for texts against images alone.
        reduction: "mean", "sum" or "none" ((N,), the mean of a pair's two directions).
        memory_budget, backend: see ``max_sim``.
        group: see ``contrastive_stats``. It is the loss of the whole batch; each process gathers the texts' tokens
            and stores its own rows of the scores.

    Returns:
        A scalar, or (N,) with ``reduction="none"``; float32 (float64 for float64 features).

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    call = call_of(group)
    image_tokens, text_tokens = autocast(image_tokens), autocast(text_tokens)
    checks.token_pair("image_tokens", image_tokens, "text_tokens", text_tokens, call.spread)
    checks.same_rows("image_tokens", image_tokens, "text_tokens", text_tokens)
    logit_scale = terms.scale_of(temperature, logit_scale, None, image_tokens)
    checks.boolean("decoupled", decoupled)
    checks.one_of("compat", compat, COMPAT)
    checks.one_of("direction", direction, tuple(DIRECTIONS))
    checks.one_of("reduction", reduction, REDUCTIONS)
    if image_mask is not None:
        image_mask = checks.mask("image_mask", image_mask, image_tokens.shape[:2], "image_tokens", image_tokens)
    if text_mask is not None:
        text_mask = checks.mask("text_mask", text_mask, text_tokens.shape[:2], "text_tokens", text_tokens)
    checks.memory_budget(memory_budget)
    backend = dispatch.resolve(backend, image_tokens.device, image_tokens.dtype)
    options = {"decoupled": decoupled, "compat": compat, "direction": direction, "reduction": reduction}
    shape = call.agree("filip_loss", image_tokens, text_tokens, options, logit_scale, image_mask, text_mask)
    return loss_of_tokens(
        shape, image_tokens, text_tokens, logit_scale, image_mask, text_mask, decoupled=decoupled, compat=compat,
        direction=direction, reduction=reduction, memory_budget=memory_budget, backend=backend,
    )  # fmt: skip


def loss_of_tokens(
    shape: Shape, image_tokens: Tensor, text_tokens: Tensor, logit_scale: float | Tensor, image_mask: Tensor | None,
    text_mask: Tensor | None, *, decoupled: bool, compat: str | None, direction: str = "both",
    reduction: Reduction = "mean", memory_budget: int | Literal["auto"], backend: BackendName,
) -> Tensor:  # fmt: skip
    """``filip_loss`` for arguments that have been checked and that the processes have agreed on."""
    if isinstance(shape, GlobalShape):
        text_tokens, text_mask = _gathered_tokens(shape, text_tokens, text_mask)
    scores = _scores(
        image_tokens, text_tokens, image_mask, text_mask, reduction="mean", direction=DIRECTIONS[direction],
        memory_budget=memory_budget, backend=backend,
    )  # fmt: skip
    parts = scores if direction == "both" else (scores,)
    losses: list[Tensor] = []
    for name, part in zip(("image", "text") if direction == "both" else (direction,), parts, strict=True):
        pos, row = _dense_stats(shape, logit_scale * part, name == "text" or compat == "x_clip")
        each = cross_entropy(
            pos.double(), row.double(), dtype=torch.float64, decoupled=decoupled, reduction="none", backend=backend
        )
        losses.append(shape.reduce(each, reduction).to(part.dtype))
    return losses[0] if len(losses) == 1 else (losses[0] + losses[1]) / 2


def _scores(image_tokens: Tensor, text_tokens: Tensor, *masks: Tensor | None, **options: Any) -> Any:
    """``max_sim``, which here may be given no images: a process of a group may have none."""
    if image_tokens.shape[0]:
        return max_sim(image_tokens, text_tokens, *masks, **options)
    none = image_tokens.sum(dim=(1, 2))[:, None] + text_tokens.sum(dim=(1, 2))[None]  # (0, N), with its graph
    none = none.to(compute_dtype(none.dtype))
    return (none, none) if options["direction"] == "both" else none


def _gathered_tokens(shape: GlobalShape, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(N, T, D) tokens of all processes and their mask, padded to the longest process's T."""
    n, length, d = tokens.shape
    mask = tokens.new_ones(n, length, dtype=torch.bool) if mask is None else mask
    if shape.tokens > length:
        tokens = torch.cat((tokens, tokens.new_zeros(n, shape.tokens - length, d)), dim=1)
        mask = torch.cat((mask, mask.new_zeros(n, shape.tokens - length)), dim=1)
    return shape.gather_with_gradient(tokens), shape.gather(mask.to(torch.uint8)).bool()


def _dense_stats(shape: Shape, logits: Tensor, by_columns: bool) -> tuple[Tensor, Tensor]:
    """(m, N) logits of this process's rows -> pos and denominators (m,) of its rows, or of its columns."""
    # Indexing by a boolean mask would make the host wait for a GPU to count it.
    own, positives = torch.zeros_like(logits, dtype=torch.bool), _own_columns(shape, logits)
    _own_columns(shape, own).fill_(True)
    pos, rest = terms.nan_where_inf(positives), logits.masked_fill(own, -torch.inf)
    if not by_columns:
        return pos, rest.logsumexp(dim=1)
    return pos, shape.own_cols(shape.merge(rest.logsumexp(dim=0), logits.dtype == torch.float64))


def _own_columns(shape: Shape, matrix: Tensor) -> Tensor:
    """(m, N) of this process's rows -> (m,) a view of their positives."""
    return matrix.diagonal(shape.first_col)[: matrix.shape[0]]


class FilipLoss(nn.Module):
    """``filip_loss`` as a module. It holds no parameters: the model owns the logit scale.

    Raises:
        TypeError, ValueError: at construction, naming the option, what came and what was expected.
    """

    def __init__(
        self,
        *,
        decoupled: bool = False,
        compat: Literal["x_clip"] | None = None,
        reduction: Reduction = "mean",
        memory_budget: int | Literal["auto"] = "auto",
        backend: BackendName = "auto",
        group: Group = None,
    ) -> None:
        super().__init__()
        checks.one_of("compat", compat, COMPAT)
        terms.check_module(reduction, memory_budget, backend, decoupled=decoupled)
        self.decoupled = decoupled
        self.compat: Literal["x_clip"] | None = compat
        self.reduction: Reduction = reduction
        self.memory_budget: int | Literal["auto"] = memory_budget
        self.backend = backend
        self.group = group

    def forward(
        self,
        image_tokens: Tensor,
        text_tokens: Tensor,
        logit_scale: float | Tensor | None = None,
        image_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        *,
        temperature: float | Tensor | None = None,
    ) -> Tensor:
        """(N, P, D), (N, T, D), scalar -> loss; see ``filip_loss``."""
        return filip_loss(
            image_tokens, text_tokens, logit_scale, temperature=temperature, image_mask=image_mask,
            text_mask=text_mask, decoupled=self.decoupled, compat=self.compat, reduction=self.reduction,
            memory_budget=self.memory_budget, backend=self.backend, group=self.group,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"decoupled={self.decoupled}, compat={self.compat!r}, reduction={self.reduction!r}"
