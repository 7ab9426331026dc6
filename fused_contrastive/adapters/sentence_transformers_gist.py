"""sentence-transformers' losses with a guide model (tested with 5.3.0 and 6.2.0)."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterable
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fused_contrastive.adapters.common import Fused, check_pair, importing, scalar
from fused_contrastive.core.spec import compute_dtype
from fused_contrastive.distributed.batch import GlobalBatch
from fused_contrastive.losses.terms import pair_logit
from fused_contrastive.ops.limits import highest, similarities
from fused_contrastive.ops.normalize import normalized
from fused_contrastive.ops.problem import autocast, log_add
from fused_contrastive.ops.row_loss import cross_entropy
from fused_contrastive.ops.stats import contrastive_stats

with importing("sentence-transformers", tested="5.3.0 and 6.2.0", least="5.3"):
    from sentence_transformers.util import batch_to_device

    if importlib.util.find_spec("sentence_transformers.sentence_transformer"):
        from sentence_transformers.sentence_transformer import losses
    else:  # older than 5.4, where this name became deprecated
        from sentence_transformers import losses


class _Guided(Fused):
    """A mix-in with the loss of embeddings and the guide's embeddings. It stands before the library's base class."""

    temperature: float | Tensor
    margin_strategy: str
    margin: float
    contrast_anchors: bool
    contrast_positives: bool
    gather_across_devices: bool

    def guided_loss(self, embeddings: list[Tensor], guides: list[Tensor]) -> Tensor:
        """[(B, D) anchors, positives, negatives, ...] and the guide's [(B, G), ...] -> scalar."""
        if len(embeddings) < 2:
            raise ValueError(f"Expected at least 2 embeddings, got {len(embeddings)}")
        for k, column in enumerate(embeddings):
            check_pair("embeddings[0]", embeddings[0], f"embeddings[{k}]", column)
        dtype = compute_dtype(embeddings[0].dtype)
        anchors, *candidates = (normalized(autocast(e), backend=self.backend) for e in embeddings)
        of_anchors, *of_candidates = (normalized(g.detach().to(dtype)) for g in guides)
        documents, of_documents = torch.cat(candidates), torch.cat(of_candidates)
        scale = 1.0 / scalar(self.temperature)
        # A negative is left out if the guide finds it more similar than this.
        absolute, relative = (self.margin if self.margin_strategy == name else 0.0 for name in ("absolute", "relative"))
        most = highest(*similarities(of_anchors, of_candidates[0]), absolute, relative)

        several = self.gather_across_devices and dist.is_available() and dist.is_initialized()
        world, rank = (dist.get_world_size(), dist.get_rank()) if several else (1, 0)
        group = GlobalBatch(exchange="gather", gradients="sum") if world > 1 else None
        own = torch.arange(len(anchors), device=anchors.device)

        def block(x: Tensor, y: Tensor, of_x: Tensor, of_y: Tensor, gathers: bool) -> tuple[Tensor, Tensor]:
            """The logits of each row's own column, and the log-sums over the others that the guide leaves in."""
            first = rank * len(y) if gathers else 0  # the library assumes as many rows in every process
            stats = contrastive_stats(
                x, y, scale, targets=own + first, row_limit=most, guide=(of_x, of_y), directions=("row",),
                group=group if gathers else None, **self._options(),
            )  # fmt: skip
            return stats.pos, stats.row

        pos, rest = block(anchors, documents, of_anchors, of_documents, True)
        parts = []
        if self.contrast_anchors:
            parts.append((anchors, of_anchors, block(anchors, anchors, of_anchors, of_anchors, False)[1]))
        if self.contrast_positives:
            x, of_x = candidates[0], of_candidates[0]
            parts.append((x, of_x, block(x, x, of_x, of_x, True)[1]))
        for x, of_x, row in parts:
            itself = pair_logit(scale, x, x)  # left out by the guide too, unless the positive is as similar
            itself = itself.masked_fill((of_x * of_x).sum(dim=1) > most, -torch.inf).to(row.dtype)
            rest = log_add(rest, log_add(row, itself))
        return cross_entropy(pos, rest, dtype=dtype, backend=self.backend)


class GISTEmbedLoss(_Guided, losses.GISTEmbedLoss):
    """sentence-transformers' GISTEmbedLoss without the matrices of scores, the model's and the guide's.

    Constructor and call are the library's, with all options. The guide's products are formed in the same pass. The
    loss is float32 (float64 for float64 embeddings).
    """

    @wraps(losses.GISTEmbedLoss.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """As the library's: features of anchors, positives and, if there are any, negatives -> scalar."""
        features = list(sentence_features)
        if len(features) not in (2, 3):
            raise ValueError(f"Expected 2 or 3 embeddings, got {len(features)}")
        for_guide = [dict(f) for f in features]  # a model writes into what it gets
        embeddings = _embed(self.model, features)
        with torch.no_grad():
            if self.must_retokenize:
                for_guide = [self._retokenized(f) for f in features]
            guides = _embed(self.guide, for_guide)
        return self.guided_loss(embeddings, guides)

    def _retokenized(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The texts of some features, as the guide's tokenizer has them."""
        ids: Any = features["input_ids"]
        if "cu_seq_lens_q" in features:  # all texts in one row
            flat, ends = ids[0].tolist(), features["cu_seq_lens_q"].tolist()
            ids = [flat[begin:end] for begin, end in itertools.pairwise(ends)]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        tokenize = getattr(self.guide, "preprocess", None) or self.guide.tokenize  # 5.3 has tokenize alone
        moved: dict[str, Tensor] = batch_to_device(tokenize(texts), self.guide.device)
        return moved


def _embed(model: Any, features: list[dict[str, Tensor]]) -> list[Tensor]:
    if importlib.util.find_spec("sentence_transformers.base") is None:
        return [model(each)["sentence_embedding"] for each in features]
    from sentence_transformers.base.losses.merged_forward import embed_columns

    embeddings: list[Tensor] = embed_columns(model, features)
    return embeddings


class CachedGISTEmbedLoss(_Guided, losses.CachedGISTEmbedLoss):
    """sentence-transformers' CachedGISTEmbedLoss (GradCache) without the matrices of scores.

    As in the library, embeddings are made mini-batch by mini-batch. The loss of the whole batch is one call.
    """

    @wraps(losses.CachedGISTEmbedLoss.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)

    def calculate_loss(
        self, reps: list[list[Tensor]], reps_guided: list[list[Tensor]], *, with_backward: bool = False
    ) -> Tensor:
        """The library's hook: the loss of each column's embeddings, which come mini-batch by mini-batch."""
        if len(reps) != len(reps_guided):
            raise ValueError("reps and reps_guided must have the same length")
        loss = self.guided_loss([torch.cat(column) for column in reps], [torch.cat(column) for column in reps_guided])
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss
