"""NT-Xent, SimCLR's loss: views of a batch against each other, one triangle of their symmetric matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from fused_contrastive.core import checks, group_checks, warn
from fused_contrastive.core.observing import observed
from fused_contrastive.core.reduction import REDUCTIONS, Reduction
from fused_contrastive.core.spec import BackendName, compute_dtype
from fused_contrastive.distributed.agreement import Group, call_of, collective
from fused_contrastive.losses import corrections, terms
from fused_contrastive.ops.groups import Groups, grouped
from fused_contrastive.ops.problem import Problem, autocast, log_add
from fused_contrastive.ops.ranks import Metrics, count_ranks, metrics_of
from fused_contrastive.ops.row_dots import RowMap
from fused_contrastive.ops.row_loss import row_loss

DEFAULT_TEMPERATURE = 0.5


@overload
def nt_xent_loss(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor | None = None,
    *,
    logit_scale: float | Tensor | None = None,
    views: Sequence[Tensor] = (),
    lengths: Tensor | None = None,
    debias: float | Tensor | None = None,
    hardness: float = 0.0,
    decoupled: bool = False,
    reduction: Reduction = "mean",
    metrics: Literal[False] = False,
    normalize: bool | None = None,
    memory_budget: int | Literal["auto"] = "auto",
    backend: BackendName = "auto",
    group: Group = None,
) -> Tensor: ...


@overload
def nt_xent_loss(*args: Any, metrics: Literal[True], **options: Any) -> tuple[Tensor, Metrics]: ...


@overload
def nt_xent_loss(*args: Any, metrics: bool, **options: Any) -> Tensor | tuple[Tensor, Metrics]: ...


@observed  # type: ignore[misc]  # the other overloads leave their options to this signature
@collective
def nt_xent_loss(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor | None = None,
    *,
    logit_scale: float | Tensor | None = None,
    views: Sequence[Tensor] = (),
    lengths: Tensor | None = None,
    debias: float | Tensor | None = None,
    hardness: float = 0.0,
    decoupled: bool = False,
    reduction: Reduction = "mean",
    metrics: bool = False,
    normalize: bool | None = None,
    memory_budget: int | Literal["auto"] = "auto",
    backend: BackendName = "auto",
    group: Group = None,
) -> Tensor | tuple[Tensor, Metrics]:
    """SimCLR's loss of two views of a batch, or of more, without the 2N x 2N matrix.

    All views' V * N features z are compared with each other. For feature i, with p the same sample in another view::

        loss_i = mean over p of -log(exp(z_i . z_p / T) / sum over k != i of exp(z_i . z_k / T))

    (Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations", arXiv:2002.05709; with
    more than two views the mean over the positives of Khosla et al. 2020, arXiv:2004.11362). ``decoupled`` leaves all
    views of the sample out of the denominator (Yeh et al. 2022, "Decoupled Contrastive Learning", arXiv:2110.06848).

    Args:
        z1, z2: (N, D) projections of two views, float32, float64, bfloat16 or float16; row i is sample i in each. Or
            (B, N, D), B groups.
        temperature: divides the similarities, a positive number or a 0-d tensor, which gets a gradient; default 0.5.
        logit_scale: multiplies them, instead: 1 / temperature.
        views: further views, each like z1.
        lengths: (B,) int64, the samples of each of B groups, which are compared with each other alone; or views (B, N,
            D). See ``clip_loss``. The result of "none" and the metrics are then ordered by group and, in each group, by
            view. Not together with debias, hardness and group.
        debias, hardness: correct the sum over the 2N - 2 negatives of two views; see ``clip_loss``.
        decoupled: the DCL form.
        reduction: "mean", "sum" or "none" ((V * N,), view by view), over the V * N features.
        metrics: also return the ranks of the positives among the negatives, which the same pass counts.
        normalize: L2-normalise first, as SimCLR does; rows shorter than 1e-12 get a gradient of zeros. Default: True,
            with a FutureWarning; from the next release on False, as in the other losses.
        memory_budget, backend, group: see ``contrastive_stats``. Over a group, it is the loss of the whole batch; all
            views of a sample are in one process.

    Returns:
        With ``metrics``, the loss and its ``Metrics``; without, the loss: a scalar, or (V * N,) with
        ``reduction="none"``; float32 (float64 for float64 features).

    Warns:
        FutureWarning: once a process, where ``normalize`` is not given.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    if isinstance(views, Tensor) or not isinstance(views, Sequence):
        raise TypeError(f"views: got {type(views).__name__}, expected a sequence of tensors like z1")
    call = call_of(group)
    everything = [autocast(z1), autocast(z2), *map(autocast, views)]
    names = ["z1", "z2", *(f"views[{k}]" for k in range(len(views)))]
    groups, everything = grouped(call, lengths, dict(zip(names, everything, strict=True)))
    for name, view in zip(names[1:], everything[1:], strict=True):
        checks.feature_pair("z1", everything[0], name, view, call.spread)
        checks.same_rows("z1", everything[0], name, view)
    checks.boolean("decoupled", decoupled)
    normalize = _normalize(normalize)
    checks.one_of("reduction", reduction, REDUCTIONS)
    checks.boolean("metrics", metrics)
    scale = terms.scale_of(temperature, logit_scale, DEFAULT_TEMPERATURE, everything[0])

    n, count = everything[0].shape[0], len(everything)
    if metrics and count > 2:
        raise ValueError(f"metrics: got True with {count} views, expected two, of which each is the other's positive")
    corrected = corrections.check(debias, hardness, views=views if count > 2 else None)
    if groups is not None:
        group_checks.refuse(debias=debias, hardness=hardness)
    of_debias = "a tensor" if isinstance(debias, Tensor) else debias
    debias = corrections.checked_debias(debias, everything[0])
    z = torch.cat(everything) if groups is None else _by_group(groups, everything, equal=lengths is None)
    if groups is not None:
        everything, groups = [z], groups.times(count)
        place, length = groups.places(z)
        samples = length // count
    problem = Problem(
        z, z, scale, memory_budget=memory_budget, backend=backend, normalize=normalize, views=everything, groups=groups
    )  # fmt: skip
    del z  # normalising makes it needless
    options: dict[str, Any] = {"views": count, "decoupled": decoupled, "reduction": reduction, "normalize": normalize}
    options["metrics"] = metrics
    options.update(debias=of_debias, hardness=hardness)
    shape = problem.agree(call, "nt_xent_loss", options)
    if count == 2:
        if groups is None:
            other_view = torch.arange(shape.first_row, shape.first_row + 2 * n, device=problem.x.device).roll(n)
        else:
            other_view = (place + samples) % length
        problem.spec = problem.spec._replace(targets=other_view)
        correction = None
        if corrected:
            debias = debias.repeat(2) if debias is not None and debias.dim() else debias
            correction = corrections.correction(problem, shape, debias, hardness, keys=2 * n, both=False, excluded=2)
        if metrics:
            count_ranks(problem, shape, both=True)
        loss = row_loss(problem, shape, reduction, decoupled=decoupled, correction=correction, upper=True)
        return (loss, metrics_of(problem)) if metrics else loss
    problem.unit()
    z, positives = problem.x, []
    for k in range(1, count):
        if groups is None:
            to, back = _other_view(k * n), _other_view(-k * n)
        else:
            to, back = (_rows(place, (place + j * samples) % length) for j in (k, count - k))
        z, logits = terms.own_logits(scale, z, to, back)
        positives.append(logits)
    first = shape.first_row // count
    sample = torch.arange(first, first + n, device=z.device).repeat(count)
    if groups is not None:
        sample = place % samples
    problem.x, problem.y = z, z
    problem.spec = problem.spec._replace(row_ids=sample, col_ids=sample)
    _, row, _ = problem.run(shape, upper=True, want_col=False)  # negatives alone
    stacked = torch.stack(positives).to(row.dtype)  # (V - 1, V * N)
    denominator = row if decoupled else log_add(row, stacked.logsumexp(dim=0))
    return shape.reduce(denominator - stacked.mean(dim=0), reduction).to(compute_dtype(problem.x.dtype))


def _other_view(rows: int) -> RowMap:
    """The map that puts in each row the feature ``rows`` further on: the same sample's in another view."""
    return lambda part: part.roll(-rows, dims=0)


def _rows(place: Tensor, other: Tensor) -> RowMap:
    """The map that puts in each row the feature at another place of its group."""
    index = torch.arange(len(place), device=place.device) + other - place
    return lambda part: part.index_select(0, index)


def _by_group(groups: Groups, views: list[Tensor], equal: bool) -> Tensor:
    """(V * N, D) the rows of the views (N, D), group by group, and view by view in each; ``equal``: are the groups?"""
    if equal:
        return torch.cat([view.unflatten(0, (groups.rows.shape[0], -1)) for view in views], dim=1).flatten(0, 1)
    z, count = torch.cat(views), len(views)
    place, length = groups.times(count).places(z)
    samples = length // count
    first_sample = (torch.arange(z.shape[0], device=z.device) - place) // count
    return terms.rows_at(z, place // samples * views[0].shape[0] + first_sample + place % samples)


def _normalize(given: bool | None) -> bool:
    if given is None:
        warn.once(
            "nt_xent normalize",
            "nt_xent_loss: normalize is not given; it is True now, and will be False in the next release, as in the "
            "other losses: pass normalize=True, or False for features that are of norm 1 already.",
            FutureWarning,
        )
        return True
    checks.boolean("normalize", given)
    return given


class NTXentLoss(nn.Module):
    """``nt_xent_loss`` as a module. It holds no parameters; its options are the function's.

    Raises:
        TypeError, ValueError: at construction, naming the option, what came and what was expected.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        *,
        debias: float | Tensor | None = None,
        hardness: float = 0.0,
        decoupled: bool = False,
        reduction: Reduction = "mean",
        normalize: bool | None = None,
        memory_budget: int | Literal["auto"] = "auto",
        backend: BackendName = "auto",
        group: Group = None,
    ) -> None:
        super().__init__()
        terms.scale_of(temperature, None, DEFAULT_TEMPERATURE)
        normalize = _normalize(normalize)
        terms.check_module(reduction, memory_budget, backend, decoupled=decoupled)
        corrections.check(debias, hardness)
        self.debias = debias
        self.hardness = hardness
        self.temperature = temperature
        self.decoupled = decoupled
        self.reduction: Reduction = reduction
        self.normalize = normalize
        self.memory_budget: int | Literal["auto"] = memory_budget
        self.backend = backend
        self.group = group

    def forward(
        self, z1: Tensor, z2: Tensor, *views: Tensor, logit_scale: float | Tensor | None = None,
        lengths: Tensor | None = None, metrics: bool = False,
    ) -> Tensor | tuple[Tensor, Metrics]:  # fmt: skip
        """(N, D) for each view -> loss; a ``logit_scale`` given here replaces the temperature. See ``nt_xent_loss``."""
        return nt_xent_loss(
            z1, z2, self.temperature if logit_scale is None else None, logit_scale=logit_scale, views=views,
            lengths=lengths, metrics=metrics, debias=self.debias, hardness=self.hardness, decoupled=self.decoupled,
            reduction=self.reduction, normalize=self.normalize,
            memory_budget=self.memory_budget, backend=self.backend, group=self.group,
        )  # fmt: skip

    def extra_repr(self) -> str:
        corrected = f"debias={self.debias}, hardness={self.hardness}, "
        return f"temperature={self.temperature}, {corrected}decoupled={self.decoupled}, reduction={self.reduction!r}"
