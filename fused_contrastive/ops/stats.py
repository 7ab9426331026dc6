"""``contrastive_stats``, ``sigmoid_stats`` and ``self_stats``: the public forms of the primitive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, Literal, overload

from torch import Tensor
from typing_extensions import NamedTuple, TypeVar

from fused_contrastive.core import checks, rule_checks
from fused_contrastive.core.spec import BackendName
from fused_contrastive.distributed.agreement import Alone, Call, Group, call_of, collective
from fused_contrastive.ops.groups import grouped
from fused_contrastive.ops.problem import (
    Problem,
    autocast,
    checked_bias,
    checked_ids,
    checked_limit,
    checked_pair_of_ids,
    checked_targets,
)

Row = TypeVar("Row", bound=Tensor | None, default=Tensor | None, covariant=True)
Col = TypeVar("Col", bound=Tensor | None, default=Tensor | None, covariant=True)


class ContrastiveStats(NamedTuple, Generic[Row, Col]):
    """Statistics of the similarity matrix; None for a direction that was not requested.

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
    x: Tensor, y: Tensor, scale: float | Tensor = 1.0, *, lengths: Tensor | None = None, targets: Tensor | None = None,
    col_bias: Tensor | None = None, row_ids: Tensor | None = None, col_ids: Tensor | None = None,
    row_limit: Tensor | None = None, col_limit: Tensor | None = None, guide: tuple[Tensor, Tensor] | None = None,
    exclude_self: bool = False,
    directions: tuple[Literal["row"], Literal["col"]] = ("row", "col"),
    memory_budget: int | Literal["auto"] = "auto", backend: BackendName = "auto", group: Group = None,
) -> ContrastiveStats[Tensor, Tensor]: ...  # fmt: skip


@overload
def contrastive_stats(
    x: Tensor, y: Tensor, scale: float | Tensor = 1.0, *, lengths: Tensor | None = None, targets: Tensor | None = None,
    col_bias: Tensor | None = None, row_ids: Tensor | None = None, col_ids: Tensor | None = None,
    row_limit: Tensor | None = None, col_limit: Tensor | None = None, guide: tuple[Tensor, Tensor] | None = None,
    exclude_self: bool = False,
    directions: tuple[Literal["row"]],
    memory_budget: int | Literal["auto"] = "auto", backend: BackendName = "auto", group: Group = None,
) -> ContrastiveStats[Tensor, None]: ...  # fmt: skip


@overload
def contrastive_stats(
    x: Tensor, y: Tensor, scale: float | Tensor = 1.0, *, lengths: Tensor | None = None, targets: Tensor | None = None,
    col_bias: Tensor | None = None, row_ids: Tensor | None = None, col_ids: Tensor | None = None,
    row_limit: Tensor | None = None, col_limit: Tensor | None = None, guide: tuple[Tensor, Tensor] | None = None,
    exclude_self: bool = False,
    directions: tuple[Literal["col"]],
    memory_budget: int | Literal["auto"] = "auto", backend: BackendName = "auto", group: Group = None,
) -> ContrastiveStats[None, Tensor]: ...  # fmt: skip


@overload
def contrastive_stats(
    x: Tensor, y: Tensor, scale: float | Tensor = 1.0, *, lengths: Tensor | None = None, targets: Tensor | None = None,
    col_bias: Tensor | None = None, row_ids: Tensor | None = None, col_ids: Tensor | None = None,
    row_limit: Tensor | None = None, col_limit: Tensor | None = None, guide: tuple[Tensor, Tensor] | None = None,
    exclude_self: bool = False,
    directions: Sequence[Literal["row", "col"]],
    memory_budget: int | Literal["auto"] = "auto", backend: BackendName = "auto", group: Group = None,
) -> ContrastiveStats: ...  # fmt: skip


@collective
def contrastive_stats(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor = 1.0,
    *,
    lengths: Tensor | None = None,
    targets: Tensor | None = None,
    col_bias: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    row_limit: Tensor | None = None,
    col_limit: Tensor | None = None,
    guide: tuple[Tensor, Tensor] | None = None,
    exclude_self: bool = False,
    directions: Sequence[Literal["row", "col"]] = ("row", "col"),
    memory_budget: int | Literal["auto"] = "auto",
    backend: BackendName = "auto",
    group: Group = None,
) -> ContrastiveStats[Any, Any]:
    """Positives and masked denominators of a similarity matrix that is never stored, in one fused pass.

    With logits ``S[i, j] = scale * x[i] . y[j] + col_bias[j]`` and the positive of row i in column t(i)::

        pos[i] = S[i, t(i)]                         NaN where that is +inf, as in softmax
        row[i] = log sum over j of exp S[i, j]      the positive and all excluded pairs left out
        col[j] = log sum over i of exp S[i, j]      likewise

    The contrastive losses are vector arithmetic on these: InfoNCE (van den Oord et al. 2018, CLIP: Radford et al.
    2021) is the mean of ``softplus(row - pos)``; decoupled contrastive learning (Yeh et al. 2022) is the mean of
    ``row - pos``. Differentiable once in x, y, scale and col_bias.

    Args:
        x: (M, D) row features, float32, float64, bfloat16 or float16. Not normalised here.
        y: (N, D) column features, same dtype and device.
        scale: multiplies the products (an inverse temperature); a number or a 0-d tensor, which gets a gradient. In
            every function of this package, a tensor scale, temperature or bias on the CPU is copied to the features'
            GPU at every call, and the host waits for that; while a CUDA graph is captured, it raises.
        lengths: (B,) int64, at least 0, the rows of each of B groups, which follow each other in x and in y. S is then
            a problem of its own for each group; no pair of two groups is computed. Features (B, M, D) and (B, N, D) are
            groups too. The results, and all other arguments, are those of all groups in their order, B * M rows and
            B * N columns. ``targets`` and ids count within a group: no target lies, and no ids agree, in another
            group. Gradients of the scale are summed over the groups, for which the forward keeps no products. Not
            together with group. Lengths on a GPU are copied to the host, which waits for them.
        targets: (M,) integers, the column of each row's positive. Default: t(i) = i, which needs M <= N.
        col_bias: (N,) added to each column's logits, with a gradient; -inf marks a column as empty.
        row_ids, col_ids: (M,) and (N,) integers, or (M, K) and (N, K) with K <= 4; pairs with equal ids, in any of the
            K places, are excluded (false negatives, duplicates).
        row_limit, col_limit: (M,) and (N,), without gradient. Pairs with ``scale * x[i] . y[j] > row_limit[i]`` are
            excluded from row i's sum, and those above ``col_limit[j]`` from column j's; the bias is not compared.
        guide: features of another model, (M, G) and (N, G), without gradient. Their products, without a scale, are
            compared with the limits in place of ``scale * x[i] . y[j]``.
        exclude_self: exclude S[i, i], for x is y.
        directions: which of "row" and "col" to compute.
        memory_budget: bytes of products to keep for the backward. With 0 it computes all of them again: 4 matrix
            products for forward and backward. Room for all M * N (4 bytes each; 2 for half-precision features on a GPU)
            saves one of the 4, and less room saves a part of it. "auto" keeps up to 64 MB on a CPU, and on a GPU up to
            a sixty-fourth of its memory, but nothing for half-precision features with D < 160.
        backend: "cpp" (CPU), "triton" (NVIDIA and AMD GPUs; not float64), "reference" (plain torch, any device), or
            "auto": "cpp" for CPU tensors ("reference", after a warning, where the extension was not built), "triton"
            for GPU tensors but "reference" for float64 ones, elsewhere "reference".
        group: a ``torch.distributed`` process group or a ``GlobalBatch``: x and y are this process's rows and columns
            of a problem spread over the group (any number of them, 0 included), ``targets`` count the columns of all
            processes, bias and ids are its own, and so are the results. Gradients are of the sum of the losses that all
            processes make of their results. If one process refuses its input, all of them raise.

    Returns:
        ContrastiveStats(pos (M,), row (M,), col (N,)) in float64 (float32 on devices without it), whatever the
        features' dtype, because a loss subtracts these large numbers from each other. Where all pairs of a row are
        excluded, row is -inf.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or value.
        RuntimeError: the backend cannot run here; a second derivative is needed; the scale is on another device than
            the features while a CUDA graph is captured; or another process of the group has refused its input.

    Under autocast, float32 features are cast to autocast's dtype as for a matmul; the products accumulate in float32.
    """
    want_row, want_col = checks.directions(directions)
    checks.boolean("exclude_self", exclude_self)
    call = call_of(group)
    if call.spread and exclude_self:
        raise NotImplementedError("exclude_self: got True with a group, which is not covered: use self_stats")
    asked = {"exclude_self": exclude_self, "want_row": want_row, "want_col": want_col}
    for name, limit, wanted in (("row_limit", row_limit, want_row), ("col_limit", col_limit, want_col)):
        if limit is not None and not wanted:
            raise ValueError(f"{name}: got a tensor with directions={directions!r}, expected None: nothing uses it")
    problem = _checked(call, x, y, scale, lengths, targets, col_bias, row_ids, col_ids, memory_budget, backend)
    if guide is not None and row_limit is None and col_limit is None:
        raise ValueError("guide: got features without row_limit and col_limit, expected a limit to compare them with")
    row_guide, col_guide = (None, None) if guide is None else rule_checks.guide(guide, (problem.x, problem.y))
    problem.spec = problem.spec._replace(
        row_limit=checked_limit("row_limit", row_limit, problem.x, "one per row"),
        col_limit=checked_limit("col_limit", col_limit, problem.y, "one per column"),
        row_guide=row_guide,
        col_guide=col_guide,
    )
    pos, row, col = problem.run(problem.agree(call, "contrastive_stats", asked), **asked)
    return ContrastiveStats(pos, row if want_row else None, col if want_col else None)


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
    lengths: Tensor | None = None,
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
    ``row + softplus(-pos)``. Differentiable once in x, y, scale and col_bias. A ``col_bias`` of -inf excludes a column.

    The arguments are as in ``contrastive_stats``: x (M, D), y (N, D) and so on, without ``exclude_self`` and
    ``directions``. Pairs with equal ids are positives here: their logits change sign.

    Returns:
        SigmoidStats(pos (M,), row (M,)) in float64 (float32 on devices without it).

    Raises:
        TypeError, ValueError, RuntimeError: as ``contrastive_stats``.
    """
    call = call_of(group)
    problem = _checked(call, x, y, scale, lengths, targets, col_bias, row_ids, col_ids, memory_budget, backend)
    shape = problem.agree(call, "sigmoid_stats", {})
    pos, row, _ = problem.run(shape, want_col=False, equal_ids="negate", statistic="softplus")
    return SigmoidStats(pos, row)


@collective
def self_stats(
    x: Tensor,
    scale: float | Tensor = 1.0,
    *,
    lengths: Tensor | None = None,
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
        lengths: (B,) int64, the rows of each of B groups, or x (B, N, D); see ``contrastive_stats``.
        ids: (N,) or (N, K) integers, K <= 4; pairs with equal ids, in any of the K places, are excluded, or the only
            ones left. Default: excludes self-pairs only.
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
    call = call_of(group)
    groups, (x,) = grouped(call, lengths, {"x": autocast(x)})
    checks.feature_pair("x", x, "y", x, empty=call.spread)
    ids = checked_ids("ids", ids, x, "one per row")
    problem = Problem(
        x, x, scale, row_ids=ids, col_ids=ids, memory_budget=memory_budget, backend=backend, groups=groups
    )  # fmt: skip
    shape = problem.agree(call, "self_stats", {"equal_ids": equal_ids})
    return problem.run(shape, upper=True, want_col=False, equal_ids=equal_ids)[1]


def _checked(
    call: Call | Alone, x: Tensor, y: Tensor, scale: float | Tensor, lengths: Tensor | None, targets: Tensor | None,
    col_bias: Tensor | None, row_ids: Tensor | None, col_ids: Tensor | None, memory_budget: int | str, backend: str,
) -> Problem:  # fmt: skip
    same = y is x
    x = autocast(x)
    groups, (x, *other) = grouped(call, lengths, {"x": x} if same else {"x": x, "y": autocast(y)})
    y = x if same else other[0]
    checks.feature_pair("x", x, "y", y, empty=call.spread)
    targets = checked_targets(targets, x, y, call.spread)
    col_bias = checked_bias(col_bias, y)
    row_ids, col_ids = checked_pair_of_ids(row_ids, col_ids, x, y)
    return Problem(
        x, y, scale, targets=targets, col_bias=col_bias, row_ids=row_ids, col_ids=col_ids,
        memory_budget=memory_budget, backend=backend, groups=groups,
    )  # fmt: skip
