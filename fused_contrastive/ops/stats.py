"""``contrastive_stats``: the public form of the primitive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, Literal, overload

import torch
from torch import Tensor
from typing_extensions import NamedTuple, TypeVar

from fused_contrastive.core import checks, memory
from fused_contrastive.core.spec import BackendName, StatsSpec, autocast_enabled, compute_dtype
from fused_contrastive.distributed.agreement import Call, Group, collective
from fused_contrastive.ops import autograd, dispatch, global_stats
from fused_contrastive.ops.agree import agree

Row = TypeVar("Row", bound=Tensor | None, default=Tensor | None, covariant=True)
Col = TypeVar("Col", bound=Tensor | None, default=Tensor | None, covariant=True)


class ContrastiveStats(NamedTuple, Generic[Row, Col]):
    """Statistics of the similarity matrix; None for a direction that was not asked.

    Attributes:
        pos: (M,) the positives' logits.
        row: (M,) log of the sum of exp over each row's logits that are not excluded.
        col: (N,) likewise over each column's.
    """

    pos: Tensor
    row: Row
    col: Col


# Overloads: if ``directions`` is left out or a tuple of literals, the statistics asked for are not Optional.
@overload
def contrastive_stats(
    x: Tensor, y: Tensor, scale: float | Tensor = 1.0, *, targets: Tensor | None = None, col_bias: Tensor | None = None,
    row_ids: Tensor | None = None, col_ids: Tensor | None = None, exclude_self: bool = False,
    directions: tuple[Literal["row"], Literal["col"]] = ("row", "col"),
    memory_budget: int | Literal["auto"] = "auto", backend: BackendName = "auto", group: Group = None,
) -> ContrastiveStats[Tensor, Tensor]: ...  # fmt: skip


@overload
def contrastive_stats(
    x: Tensor, y: Tensor, scale: float | Tensor = 1.0, *, targets: Tensor | None = None, col_bias: Tensor | None = None,
    row_ids: Tensor | None = None, col_ids: Tensor | None = None, exclude_self: bool = False,
    directions: tuple[Literal["row"]],
    memory_budget: int | Literal["auto"] = "auto", backend: BackendName = "auto", group: Group = None,
) -> ContrastiveStats[Tensor, None]: ...  # fmt: skip


@overload
def contrastive_stats(
    x: Tensor, y: Tensor, scale: float | Tensor = 1.0, *, targets: Tensor | None = None, col_bias: Tensor | None = None,
    row_ids: Tensor | None = None, col_ids: Tensor | None = None, exclude_self: bool = False,
    directions: tuple[Literal["col"]],
    memory_budget: int | Literal["auto"] = "auto", backend: BackendName = "auto", group: Group = None,
) -> ContrastiveStats[None, Tensor]: ...  # fmt: skip


@overload
def contrastive_stats(
    x: Tensor, y: Tensor, scale: float | Tensor = 1.0, *, targets: Tensor | None = None, col_bias: Tensor | None = None,
    row_ids: Tensor | None = None, col_ids: Tensor | None = None, exclude_self: bool = False,
    directions: Sequence[Literal["row", "col"]],
    memory_budget: int | Literal["auto"] = "auto", backend: BackendName = "auto", group: Group = None,
) -> ContrastiveStats: ...  # fmt: skip


@collective
def contrastive_stats(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor = 1.0,
    *,
    targets: Tensor | None = None,
    col_bias: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    exclude_self: bool = False,
    directions: Sequence[Literal["row", "col"]] = ("row", "col"),
    memory_budget: int | Literal["auto"] = "auto",
    backend: BackendName = "auto",
    group: Group = None,
) -> ContrastiveStats[Any, Any]:
    """Positives and masked denominators of a similarity matrix that is never stored, in one fused pass.

    With logits ``S[i, j] = scale * x[i] . y[j] + col_bias[j]`` and the positive of row i in column t(i)::

        pos[i] = S[i, t(i)]                         NaN where that is +inf, as softmax has it
        row[i] = log sum over j of exp S[i, j]      the positive and all excluded pairs left out
        col[j] = log sum over i of exp S[i, j]      likewise

    The contrastive losses are vector arithmetic on these: InfoNCE (van den Oord et al. 2018, CLIP: Radford et al.
    2021) is the mean of ``softplus(row - pos)``, decoupled contrastive learning (Yeh et al. 2022) of ``row - pos``.
    Differentiable once in x, y, scale and col_bias.

    Args:
        x: (M, D) row features, float32, float64, bfloat16 or float16. Not normalised here.
        y: (N, D) column features, same dtype and device.
        scale: multiplies the products (an inverse temperature); a number or a 0-d tensor, which gets a gradient. Of
            every function here, a tensor scale, temperature or bias that is on the CPU while the features are on a GPU
            is copied there at every call, for which the host waits; while a CUDA graph is captured, it raises.
        targets: (M,) integers, the column of each row's positive. Default: t(i) = i, which needs M <= N.
        col_bias: (N,) added to each column's logits, with a gradient; -inf marks a column as empty.
        row_ids, col_ids: (M,) and (N,) integers; pairs with equal ids (false negatives, duplicates) are excluded.
        exclude_self: exclude S[i, i], for x is y.
        directions: which of "row" and "col" to compute.
        memory_budget: bytes to keep for the backward: 0 recomputes all products (4 matrix products for forward and
            backward), enough for M * N of them (4 bytes each; on a GPU 2 for half-precision features) saves one
            product, anything between saves a part of it. "auto" is on a CPU a fifth of them, or 12 MB where that is
            more (of bfloat16 features 4 MB, less the larger M is, and soon nothing), and at most a sixteenth of the
            machine's memory; on a GPU a sixty-fourth of its memory, of half-precision features with D < 160 nothing.
        backend: "cpp" (CPU), "triton" (NVIDIA and AMD GPUs; not float64), "reference" (plain torch, any device), or
            "auto": "cpp" for CPU tensors ("reference", after a warning, where the extension was not built), "triton"
            for GPU tensors but "reference" for float64 ones, elsewhere "reference".
        group: a ``torch.distributed`` process group or a ``GlobalBatch``: x and y are this process's rows and columns
            of a problem spread over the group (any number of them, 0 included), ``targets`` count the columns of all
            processes, bias and ids are its own, and so are the results. Gradients are those of the sum of what all
            processes make of their results. What one process refuses, all of them do.

    Returns:
        ContrastiveStats(pos (M,), row (M,), col (N,)) in float64 (float32 on devices without it), whatever the
        features: they are differences of large logarithms waiting to happen. Where nothing is left in a row, row is
        -inf.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or value.
        RuntimeError: the backend cannot run here; a second derivative is asked; the scale is on another device than the
            features while a CUDA graph is captured; or another process of the group has refused its input.

    Under autocast, float32 features are cast to autocast's dtype as for a matmul; the products accumulate in float32.
    """
    rows, cols = checks.directions(directions)
    checks.boolean("exclude_self", exclude_self)
    problem = Problem(x, y, scale, targets, col_bias, row_ids, col_ids, memory_budget, backend, group=group)
    pos, row, col = problem.run(exclude_self=exclude_self, rows=rows, cols=cols)
    return ContrastiveStats(pos, row if rows else None, col if cols else None)


class SigmoidStats(NamedTuple):
    """Statistics of pairwise logistic losses.

    Attributes:
        pos: (M,) the positives' logits.
        row: (M,) sum of softplus over each row's other logits.
    """

    pos: Tensor
    row: Tensor


@collective
def sigmoid_stats(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor = 1.0,
    *,
    targets: Tensor | None = None,
    col_bias: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    memory_budget: int | Literal["auto"] = "auto",
    backend: BackendName = "auto",
    group: Group = None,
) -> SigmoidStats:
    """Sums of the pairwise logistic loss over a similarity matrix that is never stored, in one fused pass.

    With logits S and positives t(i) as in ``contrastive_stats``, and softplus(s) = log(1 + exp(s))::

        pos[i] = S[i, t(i)]
        row[i] = sum over j != t(i) of softplus(S[i, j]), or of softplus(-S[i, j]) where row_ids[i] == col_ids[j]

    so that the loss of Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", is the sum of
    ``row + softplus(-pos)``. Differentiable once in x, y, scale and col_bias. Excluding a column: ``col_bias`` -inf.

    Arguments are those of ``contrastive_stats``: x (M, D), y (N, D) and so on, but for ``exclude_self`` and
    ``directions``; and pairs with equal ids are positives here: their logits change sign.

    Returns:
        SigmoidStats(pos (M,), row (M,)) in float64 (float32 on devices without it).

    Raises:
        TypeError, ValueError, RuntimeError: as ``contrastive_stats``.
    """
    problem = Problem(x, y, scale, targets, col_bias, row_ids, col_ids, memory_budget, backend, group=group)
    pos, row, _ = problem.run(cols=False, equal_ids="negate", reduction="softplus")
    return SigmoidStats(pos, row)


@collective
def self_stats(
    x: Tensor,
    scale: float | Tensor = 1.0,
    *,
    ids: Tensor | None = None,
    equal_ids: Literal["exclude", "only"] = "exclude",
    memory_budget: int | Literal["auto"] = "auto",
    backend: BackendName = "auto",
    group: Group = None,
) -> Tensor:
    """Denominators of a set of features against itself: of the symmetric matrix, only one triangle is computed.

    With ``S[i, j] = scale * x[i] . x[j]``::

        row[i] = log sum over j != i of exp S[i, j], where ids[i] != ids[j]

    or, with ``equal_ids="only"``, where ``ids[i] == ids[j]``. Half the products of ``contrastive_stats(x, x)``: forward
    and backward cost 2 (kept products: 1.5) in units of the full N x N x D product. Differentiable once in x and scale.

    Args:
        x: (N, D) float32, float64, bfloat16 or float16. Not normalised here.
        scale: multiplies the products; a number or a 0-d tensor, which gets a gradient.
        ids: (N,) integers, which pairs are excluded (or kept). Default: only self-pairs are excluded.
        equal_ids: "exclude" or "only".
        memory_budget, backend, group: see ``contrastive_stats``; enough to keep N * N products saves half a product.
            Over a group the whole block of a process's rows is computed.

    Returns:
        (N,) in float64 (float32 on devices without it); -inf where no pair is left.

    Raises:
        TypeError, ValueError, RuntimeError: as ``contrastive_stats``.
    """
    checks.one_of("equal_ids", equal_ids, ("exclude", "only"))
    if ids is None and equal_ids == "only":
        raise ValueError("ids: got None with equal_ids='only', expected an integer tensor of shape (N,)")
    problem = Problem(x, x, scale, None, None, ids, ids, memory_budget, backend, ("ids", "ids"), group)
    if group is not None:  # a row's positive, always excluded, is itself
        return problem.run(cols=False, equal_ids=equal_ids)[1]
    _, row, col = problem.run(upper=True, equal_ids=equal_ids)
    return log_add(row, col)


class Problem:
    """Checked input of one of the above, in the form that the operator takes."""

    def __init__(
        self, x: Tensor, y: Tensor, scale: float | Tensor, targets: Tensor | None, col_bias: Tensor | None,
        row_ids: Tensor | None, col_ids: Tensor | None, memory_budget: int | str, backend: str,
        ids_name: tuple[str, str] = ("row_ids", "col_ids"), group: Group = None,
    ) -> None:  # fmt: skip
        same = y is x
        x = autocast(x)
        y = x if same else autocast(y)
        checks.feature_pair("x", x, "y", y, empty=group is not None)
        m, n, dtype = x.shape[0], y.shape[0], compute_dtype(x.dtype)
        checks.memory_budget(memory_budget)
        if targets is not None:
            targets = checks.vector("targets", targets, m, x, of="one column index per row", integer=True)
        elif m > n and group is None:
            raise ValueError(f"targets: got None for M = {m} rows and N = {n} columns, expected targets because M > N")
        if col_bias is not None:
            col_bias = checks.vector("col_bias", col_bias, n, x, of="one per column", integer=False).to(dtype)
        if (row_ids is None) != (col_ids is None):
            raise ValueError("row_ids, col_ids: got only one of them, expected both or neither")
        if row_ids is not None:
            row_ids = checks.vector(ids_name[0], row_ids, m, x, of="one per row", integer=True)
            col_ids = checks.vector(ids_name[1], col_ids, n, x, of="one per column", integer=True)
        self.x, self.y = x, y
        self.spec = StatsSpec(_scale(scale, x, dtype), targets, col_bias, row_ids, col_ids)
        self.memory_budget, self.backend = memory_budget, dispatch.resolve(backend, x.device, x.dtype)
        self.group = group

    def run(self, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        """pos, row and col; ``options`` are fields of the StatsSpec."""
        if self.group is not None:
            if options.get("exclude_self"):
                raise NotImplementedError("exclude_self: got True with a group, which is not covered: use self_stats")
            return self._run_globally(options)
        differentiable = self.is_differentiable()
        most = memory.TRIANGLE if options.get("upper") else None
        spec = self.spec._replace(kept_rows=self.rows_to_keep(most) if differentiable else 0, **options)
        pos, row, col, _ = autograd.stats_forward(self.x, self.y, *spec, self.backend, differentiable=differentiable)
        return pos, row, col

    def is_differentiable(self) -> bool:
        scale, bias = self.spec.scale, self.spec.col_bias
        return torch.is_grad_enabled() and (
            self.x.requires_grad
            or self.y.requires_grad
            or scale.requires_grad
            or (bias is not None and bias.requires_grad)
        )

    def rows_to_keep(self, most: memory.Most | None = None) -> int:
        """How many rows' products the budget lets the forward keep."""
        kept = dispatch.BACKENDS[self.backend].kept
        return memory.products_to_keep(self.x, self.y.shape[0], kept, self.memory_budget, most)

    def _run_globally(self, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        spec = self.spec._replace(**options)
        said = {
            "col_bias": "given" if spec.col_bias is not None else None,
            "ids": "given" if spec.row_ids is not None else None,
            **options,
        }
        made_here = isinstance(self.group, Call) and self.group.agreed is None
        agreed = agree(
            self.group, "contrastive_stats", self.x, self.y, said, spec.scale, spec.col_bias, targets=spec.targets,
            memory_budget=self.memory_budget, backend=self.backend,
        )  # fmt: skip
        assert agreed is not None
        if made_here or spec.targets is None:  # else the loss that agreed made columns of its targets
            spec = spec._replace(targets=agreed.columns_of(spec.targets, self.x.device))
        problem = global_stats.Problem(agreed, spec, self.memory_budget, self.backend)
        return global_stats.global_stats(self.x, self.y, problem)


def log_add(a: Tensor, b: Tensor) -> Tensor:
    """log(exp(a) + exp(b)), elementwise; -inf with zero gradients (not NaN) where both are -inf."""
    empty = (a == -torch.inf) & (b == -torch.inf)
    return torch.logaddexp(a.masked_fill(empty, 0), b.masked_fill(empty, 0)).masked_fill(empty, -torch.inf)


def autocast(features: Tensor) -> Tensor:
    """What autocast does to the operands of a matmul."""
    if not isinstance(features, Tensor) or not autocast_enabled(features.device):
        return features
    casts = features.is_floating_point() and features.dtype != torch.float64
    return features.to(torch.get_autocast_dtype(features.device.type)) if casts else features


def _scale(scale: float | Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    scale = checks.scalar_beside("scale", scale, x)
    return scale.to(dtype) if isinstance(scale, Tensor) else x.new_full((), scale, dtype=dtype)
