"""What a call of a loss compares: for each row, which columns are its positives and its negatives, from its arguments.

``monitor`` measures a sample of the rows by it. Limits on negatives (margins, guides) are not applied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_contrastive.core.hints import NEAR
from fused_contrastive.core.spec import compute_dtype, statistics_dtype
from fused_contrastive.core.unit import LEAST_NORM
from fused_contrastive.evaluation.diagnosis import uniformity_exponents
from fused_contrastive.losses import info_nce, nt_xent, supcon, terms
from fused_contrastive.ops.ranking import plain

ROWS = 128  # at most so many rows are measured in each direction,
PAIRS = 1 << 20  # and at most so many pairs, but at least one row
HARDEST = 10  # how many negatives count as hardest, as in ``diagnose``
EQUAL = 1e-4  # squared distance of unit vectors below which a loss cannot tell them apart
# Options that change the least loss, or the loss of equal logits; and losses that have other targets.
CHANGING = ("absolute_margin", "relative_margin", "guide", "debias", "hardness", "margin", "decoupled", "dims")
OTHER_TARGETS = ("distillation_loss", "x_clip_loss")
NAMES = {  # of two sets of features; the first of several views
    "clip_loss": ("image_features", "text_features"),
    "distillation_loss": ("x", "y"),
    "info_nce_loss": ("query", "key"),
    "siglip_loss": ("image_features", "text_features"),
    "x_clip_loss": ("text_latents", "image_latents"),
}
SYMMETRIC = ("clip_loss", "x_clip_loss")
DEFAULT_TEMPERATURES = {
    "info_nce_loss": info_nce.DEFAULT_TEMPERATURE,
    "nt_xent_loss": nt_xent.DEFAULT_TEMPERATURE,
    "supcon_loss": supcon.DEFAULT_TEMPERATURE,
}


class Direction(NamedTuple):
    """Rows that a loss compares with columns. Only a row that has a positive counts."""

    rows: Tensor  # (M, D)
    columns: Tensor  # (N, D)
    targets: Tensor | None = None  # (M,) a positive of each row
    row_ids: Tensor | None = None  # (M,) or (M, K), where a pair with equal ids is related
    col_ids: Tensor | None = None  # (N,) or (N, K)
    related_positive: bool = False  # related pairs are positives; otherwise they are left out
    against_itself: bool = False  # the columns are the rows
    bias: Tensor | float = 0.0  # (N,) or (), added to the logits
    own: Tensor | None = None  # (M, K, D) further negatives of each row
    own_mask: Tensor | None = None  # (M, K)

    def pairs(self, picked: Tensor) -> tuple[Tensor, Tensor]:
        """(R, N) bool: the positives and the negatives of the rows ``picked``, (R,)."""
        columns = torch.arange(len(self.columns), device=picked.device)
        positive = torch.zeros(len(picked), len(columns), dtype=torch.bool, device=picked.device)
        if self.targets is not None:
            positive = self.targets[picked, None] == columns
        left_out = picked[:, None] == columns if self.against_itself else torch.zeros_like(positive)
        if self.row_ids is not None and self.col_ids is not None:
            of_rows, of_cols = (ids.reshape(len(ids), -1) for ids in (self.row_ids[picked], self.col_ids))
            related = (of_rows[:, None] == of_cols).any(dim=2)
            if self.related_positive:
                positive = positive | related
            else:
                left_out = left_out | related
        negative = ~(positive | left_out)
        return (positive & ~left_out if self.against_itself else positive), negative


class Call(NamedTuple):
    """A call of a loss, as its arguments describe it."""

    features: dict[str, Tensor]  # (rows, D) by the arguments' names
    directions: list[Direction]
    scale: float | Tensor
    normalize: bool
    sigmoid: bool  # each pair has a loss of its own: SigLIP
    usual: bool  # the loss that ``_equal_logits`` is about
    processes: int  # each of which has as many columns


def described(name: str, given: Mapping[str, Any], processes: int) -> Call | None:
    """The call of the loss ``name`` with the arguments ``given``, or None where it is not measured.

    Calls with tokens, without rows, with groups of rows, or with positives in other processes are not measured.
    """
    if _has_groups(name, given):
        return None
    if name == "nt_xent_loss":
        views = [given["z1"], given["z2"], *given["views"]]
        sample = torch.arange(len(views[0]), device=views[0].device).repeat(len(views))
        features = {"z1, z2": torch.cat(views)}
        directions = [_within(features["z1, z2"], sample)]
    elif name == "supcon_loss":
        z = given["features"]
        features = {"features": z.flatten(0, -2)}
        directions = [
            _within(features["features"], given["labels"].repeat_interleave(z.shape[1] if z.dim() == 3 else 1))
        ]
    elif name in NAMES and not given.get("use_all_token_embeds", False):
        features = {key: given[key] if given[key].dim() == 2 else given[key][0] for key in NAMES[name]}
        if (dims := given.get("dims")) is not None:  # columns after the last are not used
            features = {key: z[:, : dims[-1]] for key, z in features.items()}
        x, y = features.values()
        directions = _between(given, x, y, given.get("symmetric", name in SYMMETRIC))
    else:
        return None
    if not all(len(d.rows) and len(d.columns) for d in directions):
        return None
    if processes > 1 and (given.get("targets") is not None or len({len(each) for each in features.values()}) > 1):
        return None
    default = DEFAULT_TEMPERATURES.get(name)
    changed = [key for key in CHANGING if isinstance(given.get(key), Tensor) or given.get(key)]
    return Call(
        features,
        directions,
        terms.scale_of(given["temperature"], given["logit_scale"], default, directions[0].rows),
        normalize=given.get("normalize", False) is not False,  # None is True for nt_xent_loss
        sigmoid=name == "siglip_loss",
        usual=not changed and name not in OTHER_TARGETS,
        processes=processes,
    )


def _has_groups(name: str, given: Mapping[str, Any]) -> bool:
    """Whether the rows are cut into groups, each a problem of its own: by lengths, or by one more dimension."""
    if name == "supcon_loss":
        return given["lengths"] is not None or given["features"].dim() > 3
    first = next((given[key] for key in ("image_features", "query", "z1") if key in given), None)
    return given.get("lengths") is not None or (first is not None and first.dim() > 2)


def _within(z: Tensor, ids: Tensor) -> Direction:
    return Direction(z, z, row_ids=ids, col_ids=ids, related_positive=True, against_itself=True)


def _between(given: Mapping[str, Any], x: Tensor, y: Tensor, both: bool) -> list[Direction]:
    """x against y, and where ``both``, y against x."""
    keys, targets = len(y), given.get("targets")
    negatives: Tensor | None = given.get("negatives")
    ids = given.get("row_ids"), given.get("col_ids")
    related_positive = ids[0] is not None and given.get("equal_ids") != "exclude"  # SigLIP has no such option
    if targets is None and (len(x) == keys or not related_positive):
        targets = torch.arange(len(x), device=x.device)
    own = negatives if negatives is not None and negatives.dim() == 3 else None
    columns = y if own is not None or negatives is None else torch.cat((y, negatives))
    bias = given.get("col_bias", given.get("logit_bias"))
    forth = Direction(
        x, columns, targets, *ids, related_positive,
        bias=bias.to(x.device) if isinstance(bias, Tensor) else bias or 0.0,
        own=own, own_mask=given.get("negatives_mask"),
    )  # fmt: skip
    if not both:
        return [forth]
    of_keys = None if ids[1] is None else ids[1][:keys]
    targets = None if targets is None else torch.arange(keys, device=x.device)
    return [forth, Direction(y, x, targets, of_keys, ids[0], related_positive)]


def measured(call: Call, loss: Tensor, check: int) -> dict[str, dict[str, float]]:
    """Numbers of each argument by its name, and under "" those of the call, with one wait for the device.

    Rows are counted everywhere; all else is of one block of rows in each direction, another one at the next ``check``.
    """
    x = call.directions[0].rows
    found: dict[tuple[str, str], Tensor] = {}
    with plain(x):
        for name, features in call.features.items():
            for key, value in _rows(features).items():
                found[name, key] = value
        of_directions = [_direction(call, direction, check) for direction in call.directions]
        for key in of_directions[0]:
            found["", key] = torch.stack([each[key] for each in of_directions]).mean()
        dtype = statistics_dtype(x.device)
        scale = call.scale if isinstance(call.scale, Tensor) else x.new_full((), call.scale, dtype=dtype)
        found |= {("", "scale"): scale, ("", "loss"): loss.mean()}
        numbers = torch.stack([value.detach().to(dtype) for value in found.values()]).tolist()
    result: dict[str, dict[str, float]] = {}
    for (name, key), number in zip(found, numbers, strict=True):
        result.setdefault(name, {})[key] = number
    return result


def _rows(features: Tensor) -> dict[str, Tensor]:
    norms = torch.linalg.vector_norm(features.to(compute_dtype(features.dtype)), dim=1)
    zero = norms < LEAST_NORM
    mean = F.normalize(features.to(norms.dtype), dim=1).mean(dim=0)
    return {
        "nan_rows": (~norms.isfinite()).sum(),
        "zero_rows": zero.sum(),
        "spread": 1 - mean.square().sum(),  # the mean of 1 - cosine over all pairs
        "off_norm": (norms - 1).abs().masked_fill(zero, 0).amax() > NEAR,
    }


def _direction(call: Call, direction: Direction, check: int) -> dict[str, Tensor]:
    """Means over a block of the rows."""
    rows, columns = (t.to(compute_dtype(t.dtype)) for t in (direction.rows, direction.columns))
    count = min(ROWS, len(rows), max(1, PAIRS // len(columns)))
    picked = torch.arange(check * count, (check + 1) * count, device=rows.device) % len(rows)
    positive, negative = direction.pairs(picked)
    has_positive, some = positive.any(dim=1), positive.to(torch.uint8).argmax(dim=1)  # (R,), the first one
    unit_rows, unit_columns = F.normalize(rows[picked], dim=1), F.normalize(columns, dim=1)
    rows, columns = (unit_rows, unit_columns) if call.normalize else (rows[picked], columns)
    logits = call.scale * (rows @ columns.T) + direction.bias
    pos = logits.masked_fill(~positive, -torch.inf).amax(dim=1)
    negative &= logits != -torch.inf  # a column whose bias is -inf is an empty slot
    exponents = uniformity_exponents(unit_columns[some], unit_columns).masked_fill_(~negative, -torch.inf)
    equal = (exponents > -2 * EQUAL).sum(dim=1)  # negatives that equal the positive
    equal *= unit_columns[some].any(dim=1)  # rows of zeros have a warning of their own
    rest = logits.masked_fill_(~negative, -torch.inf)
    if direction.own is not None:
        own = direction.own[picked].to(rows.dtype)
        own = F.normalize(own, dim=2) if call.normalize else own
        of_own = call.scale * (own @ rows[:, :, None]).squeeze(2)  # (R, K)
        if direction.own_mask is not None:
            of_own = of_own.masked_fill(~direction.own_mask[picked].bool(), -torch.inf)
        rest = torch.cat((rest, of_own), dim=1)
    weights = F.logsigmoid(rest) if call.sigmoid else rest
    hardest = weights.topk(min(HARDEST, weights.shape[1]), dim=1, sorted=False).values
    nearest = rest.amax(dim=1)
    valid = has_positive & (nearest > -torch.inf)
    shares = (hardest.logsumexp(dim=1) - weights.logsumexp(dim=1)).exp()
    choices = call.processes * ((rest > -torch.inf).sum(dim=1) + positive.sum(dim=1))
    floors = _equal_logits(1 + equal, call.sigmoid) * (positive.sum(dim=1) == 1)
    distances = (unit_rows - unit_columns[some]).square().sum(dim=1)
    dtype = statistics_dtype(rows.device)

    def mean(values: Tensor) -> Tensor:
        return torch.where(valid, values.to(dtype), 0).sum() / valid.sum()

    return {
        "top1": mean(pos > nearest),
        "hardest_share": mean(shares),
        "alignment": mean(distances),
        "uniformity": (mean(exponents.exp_().sum(dim=1)) / mean(negative.sum(dim=1))).log(),
        "duplicates": mean(equal > 0),
        "duplicates_floor": mean(floors) * call.usual,
        "equal_logits": mean(_equal_logits(choices, call.sigmoid)),
    }


def _equal_logits(choices: Tensor, sigmoid: bool) -> Tensor:
    """The least loss of a row whose positive has the same logit as all others of ``choices`` columns.

    log m for a softmax over m of them; m log m - (m - 1) log(m - 1) for m sigmoids.
    """
    m = choices.to(statistics_dtype(choices.device))
    return torch.xlogy(m, m) - torch.xlogy(m - 1, m - 1) if sigmoid else m.log()
