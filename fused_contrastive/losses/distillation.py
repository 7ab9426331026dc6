"""Distillation: the softmax of our similarities is trained towards a teacher's, and neither matrix is formed."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from fused_contrastive.core import checks, rule_checks
from fused_contrastive.core.observing import observed
from fused_contrastive.core.reduction import REDUCTIONS, Reduction
from fused_contrastive.core.spec import BackendName, compute_dtype
from fused_contrastive.core.unit import unit_rows
from fused_contrastive.distributed.agreement import Group, call_of, collective
from fused_contrastive.distributed.shape import GlobalShape, Shape
from fused_contrastive.losses import terms
from fused_contrastive.ops.own_dots import own_dots
from fused_contrastive.ops.problem import Problem, autocast
from fused_contrastive.ops.row_loss import reduced


@observed
@collective
def distillation_loss(
    x: Tensor,
    y: Tensor,
    logit_scale: float | Tensor | None = None,
    teacher_x: Tensor | None = None,
    teacher_y: Tensor | None = None,
    teacher_scale: float | Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    symmetric: bool = True,
    targets_weight: float = 0.0,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    normalize: bool = False,
    memory_budget: int | Literal["auto"] = "auto",
    backend: BackendName = "auto",
    group: Group = None,
) -> Tensor:
    """Cross-entropy between a teacher's softmax and ours, without the M x N matrix of either.

    With ``S[i, j] = logit_scale * x_i . y_j`` and ``T[i, j] = teacher_scale * teacher_x_i . teacher_y_j``::

        loss_i = -sum over j of softmax(T)[i, j] * log softmax(S)[i, j]

    where the softmax is over the columns. With ``symmetric``, it is the mean of this loss and the same loss of columns
    against rows (open_clip's distillation: Wu et al. 2023, "TinyCLIP", arXiv:2309.12314). ``targets_weight`` w mixes
    the hard targets into the teacher's: ``(1 - w) softmax(T) + w one_hot(i)`` (ALBEF: Li et al. 2021, arXiv:2107.07651,
    with a queue as further columns and ``symmetric=False``). No gradient goes to the teacher.

    Args:
        x: (M, D) float32, float64, bfloat16 or float16; normalise them first, or see ``normalize``.
        y: (N, D), same dtype and device; row i is the partner of x_i. More columns than rows, as with a queue, need
            ``symmetric=False``.
        logit_scale: multiplies the similarities; a number or a 0-d tensor, which gets a gradient.
        teacher_x, teacher_y: (M, G) and (N, G) features of the teacher, of any width and floating dtype.
        teacher_scale: multiplies the teacher's similarities; a number or a 0-d tensor.
        temperature: divides our similarities, instead: 1 / logit_scale.
        symmetric: the mean of both directions; needs M = N.
        targets_weight: in [0, 1], the share of the hard targets.
        weight: (M,) weights of the rows (pairs); the mean is over their sum.
        reduction: "mean", "sum" or "none" ((M,)).
        normalize: L2-normalise all features first, the teacher's too.
        memory_budget, backend, group: see ``contrastive_stats``. Over a group, it is the loss of the whole batch. A
            step costs 3 products of ours, 4 where none are kept, and 2 of the teacher's.

    Returns:
        A scalar, or (M,) with ``reduction="none"``; float32 (float64 for float64 features).

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    call = call_of(group)
    x, y = autocast(x), autocast(y)
    checks.feature_pair("x", x, "y", y, call.spread)
    scale = terms.scale_of(temperature, logit_scale, None, x)
    for name, given in (("symmetric", symmetric), ("normalize", normalize)):
        checks.boolean(name, given)
    checks.share("targets_weight", targets_weight)
    checks.one_of("reduction", reduction, REDUCTIONS)
    if symmetric:
        checks.same_rows("x", x, "y", y)
    elif targets_weight and not call.spread and x.shape[0] > y.shape[0]:
        raise ValueError(f"targets_weight: got it with {x.shape[0]} rows and {y.shape[0]} columns, expected M <= N")
    teacher = rule_checks.features_like(("teacher_x", "teacher_y"), (teacher_x, teacher_y), (x, y))
    if teacher_scale is None:
        raise TypeError("teacher_scale: got None, expected a number or a 0-d tensor")
    factor = checks.scalar_beside("teacher_scale", teacher_scale, x)
    if weight is not None:
        weight = checks.vector("weight", weight, x.shape[0], x, of="one per row", integer=False)
    problem = Problem(x, y, scale, memory_budget=memory_budget, backend=backend, normalize=normalize)
    if normalize:
        teacher = tuple(map(unit_rows, teacher))
        problem.count_copies(teacher[1])
    learn_from(problem, teacher[0], teacher[1], factor)
    options = {
        "symmetric": symmetric, "targets_weight": targets_weight, "reduction": reduction, "normalize": normalize,
        "weight": weight is not None,
    }  # fmt: skip
    shape = problem.agree(call, "distillation_loss", options, weight)
    _, row, col = problem.run(shape, want_col=symmetric, statistic="teacher")
    pos = _partners(problem, shape).to(row.dtype) if targets_weight else 0.0
    losses = [
        part[:, 0] - (1 - targets_weight) * part[:, 1] - targets_weight * pos
        for part in ((row, col) if symmetric else (row,))
    ]
    both = (losses[0] + losses[1]) / 2 if symmetric else losses[0]
    return reduced(both, shape, reduction, weight).to(compute_dtype(x.dtype))


def learn_from(problem: Problem, teacher_x: Tensor, teacher_y: Tensor, teacher_scale: float | Tensor) -> None:
    """Adds a teacher, with features in the compute dtype, to a problem; see ``StatsSpec``."""
    if isinstance(teacher_scale, Tensor):
        teacher_scale = teacher_scale.detach().to(teacher_x.dtype)
    scaled = teacher_x * teacher_scale
    problem.count_copies(scaled)
    problem.spec = problem.spec._replace(row_guide=scaled, col_guide=teacher_y, paired=False)


def _partners(problem: Problem, shape: Shape) -> Tensor:
    """(M,) logits of the pairs (i, i)."""
    x, y = problem.x, problem.y
    if isinstance(shape, GlobalShape) and shape.rows != shape.cols:
        y = shape.gather_with_gradient(y)[shape.columns_of(None, y.device)]
    return problem.spec.scale * own_dots(x, y[: x.shape[0], None]).squeeze(1)


class DistillationLoss(nn.Module):
    """``distillation_loss`` as a module. It holds no parameters; its options are the function's.

    Raises:
        TypeError, ValueError: at construction, naming the option, what came and what was expected.
    """

    def __init__(
        self,
        *,
        symmetric: bool = True,
        targets_weight: float = 0.0,
        reduction: Reduction = "mean",
        normalize: bool = False,
        memory_budget: int | Literal["auto"] = "auto",
        backend: BackendName = "auto",
        group: Group = None,
    ) -> None:
        super().__init__()
        terms.check_module(reduction, memory_budget, backend, symmetric=symmetric, normalize=normalize)
        checks.share("targets_weight", targets_weight)
        self.symmetric = symmetric
        self.targets_weight = targets_weight
        self.reduction: Reduction = reduction
        self.normalize = normalize
        self.memory_budget: int | Literal["auto"] = memory_budget
        self.backend = backend
        self.group = group

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        logit_scale: float | Tensor | None,
        teacher_x: Tensor,
        teacher_y: Tensor,
        teacher_scale: float | Tensor,
        *,
        temperature: float | Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """(M, D), (N, D), scalar, (M, G), (N, G), scalar -> loss; see ``distillation_loss``."""
        return distillation_loss(
            x, y, logit_scale, teacher_x, teacher_y, teacher_scale, temperature=temperature, symmetric=self.symmetric,
            targets_weight=self.targets_weight, weight=weight, reduction=self.reduction, normalize=self.normalize,
            memory_budget=self.memory_budget, backend=self.backend, group=self.group,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"symmetric={self.symmetric}, targets_weight={self.targets_weight}, reduction={self.reduction!r}"
