"""Zero-shot classification, as CLIP does it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_contrastive.core import checks
from fused_contrastive.core.forks import guarded
from fused_contrastive.core.spec import BackendName, compute_dtype
from fused_contrastive.ops.ranking import Ranking, plain, rank
from fused_contrastive.ops.stats import contrastive_stats


@guarded
def zero_shot(
    image_features: Tensor,
    class_text_features: Tensor,
    *,
    k: int = 1,
    scale: float | Tensor | None = None,
    normalize: bool = True,
    probabilities: bool = False,
    backend: BackendName = "auto",
) -> Ranking:
    """The k best classes of each image, by the similarity of the image's features and the classes' text features.

    With P prompts for each class ("a photo of a {}.", "a drawing of a {}.") the class's feature is the mean of their
    normalised features, normalised again (Radford et al. 2021, "Learning Transferable Visual Models From Natural
    Language Supervision", section 3.1.4, and the code they released).

    Args:
        image_features: (M, D) float32, float64, bfloat16 or float16.
        class_text_features: (C, D), or (C, P, D) for P prompts per class; same dtype and device.
        k: how many classes, from 1 to C.
        scale: the model's logit scale; multiplies the scores.
        normalize: divide features by their length, as above. False takes them as they are: prompts are averaged only.
        probabilities: give the softmax over all C classes at the best k, instead of scores. Needs ``scale``.
        backend: see ``contrastive_stats``.

    Returns:
        Ranking(scores (M, k), indices (M, k) int64 of classes); float32 (float64 for float64 features).

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        RuntimeError: the backend cannot run here.
    """
    checks.features("image_features", image_features)
    checks.features_or_several("class_text_features", class_text_features, "C", "P")
    per_class = class_text_features if class_text_features.dim() == 2 else class_text_features[:, 0]
    checks.feature_pair("image_features", image_features, "class_text_features", per_class)
    checks.boolean("normalize", normalize)
    checks.boolean("probabilities", probabilities)
    if probabilities and scale is None:
        raise ValueError("scale: got None, expected the model's logit scale for probabilities=True")
    dtype = compute_dtype(image_features.dtype)
    with plain(image_features):
        images, classes = image_features.to(dtype), class_text_features.to(dtype)
        if normalize:
            images, classes = F.normalize(images, dim=-1), F.normalize(classes, dim=-1)
        if classes.dim() == 3:
            classes = classes.mean(dim=1)
            if normalize:
                classes = F.normalize(classes, dim=-1)
        best = rank(images, classes, k, scale=scale, backend=backend)
        if not probabilities or scale is None:
            return best
        # The normaliser over all classes, without the (M, C) logits: the other classes' denominator plus the best one.
        others = contrastive_stats(
            images, classes, scale, targets=best.indices[:, 0], directions=("row",), backend=backend
        )
        # The best one's score is taken from the ranking: others.pos may be rounded differently, and give more than 1.
        normaliser = torch.logaddexp(best.scores[:, 0].to(others.row.dtype), others.row)
        return Ranking((best.scores - normaliser[:, None]).exp().to(dtype), best.indices)
