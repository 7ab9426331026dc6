"""The description of a problem, which every backend receives with the features."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_type_hints

import torch
from torch import Tensor

BackendName = Literal["auto", "reference", "cpp", "triton"]
Statistic = Literal["logsumexp", "softplus", "teacher"]
EqualIds = Literal["exclude", "only", "negate", "apart", "add"]


class StatsSpec(NamedTuple):
    """How logits are made of x (M, D) and y (N, D), which are excluded, and what is requested.

    ``S[i, j] = scale * x[i] . y[j] + col_bias[j]``. Excluded from ``row`` and ``col`` are the positive
    ``S[i, t(i)]`` and, with ``exclude_self``, ``S[i, i]``. Without ``paired`` there are no positives, and ``pos`` has 0
    elements. Pairs with ``row_ids[i] == col_ids[j]``, in any place if there are K ids each, are related.
    ``equal_ids`` says what becomes of related pairs:

    - "exclude": they are excluded.
    - "only": all other pairs are excluded.
    - "negate": their logits change sign.
    - "apart": they are reduced by themselves. ``row`` is (M, 2) and ``col`` (N, 2): [:, 0] is over the other pairs,
      and [:, 1] over the related pairs, whose logits change sign if the statistic is softplus.
    - "add": they count like the others, and ``row[:, 1]`` and ``col[:, 1]`` are the sums of their logits.

    Pairs with ``scale * x[i] . y[j] > row_limit[i]`` are excluded from row i alone, and pairs above ``col_limit[j]``
    from column j alone. With a guide, ``row_guide[i] . col_guide[j]`` is compared with the limits instead. Limits and
    guide have no gradient.

    With the statistic "teacher", the guide's products are a teacher's logits T. ``row`` is (M, 3): the log-sum-exp of
    S, the mean of S by softmax(T), and the log-sum-exp of T, which has no gradient; ``col`` is (N, 3) likewise. There
    are no positives, ids or limits; a column whose bias is -inf is excluded from T too.

    With lengths, rows and columns are cut into B groups, which follow each other: S is a problem of its own for each
    group, and no pair of two groups is computed. Targets count the columns of the row's group. A reference is
    compared with logits of its own group alone.

    With ``row_reference`` or ``col_reference``, ``row`` is (M, 3) and ``col`` (N, 3): [:, 1] is how many of the logits
    that are not excluded are above the reference, and [:, 2] is the highest of them. Both have no gradient, and related
    pairs are excluded or count like others. Either direction that is requested has a reference.

    With ``upper``, y is x and there is no bias: S is symmetric, and only its pairs ``j > i`` are computed. ``row`` is
    over both triangles, without the diagonal; ``want_col`` is False. Targets, if there are any, come in pairs:
    ``t(t(i)) = i``.

    This is the one place in Python that lists the fields: the operators' schema, what autograd saves and what
    processes send each other follow from it. Tensors come first.
    """

    scale: Tensor  # () in the compute dtype
    targets: Tensor | None = None  # (M,) int64 column of each row's positive; None: t(i) = i
    col_bias: Tensor | None = None  # (N,), or () for all columns, in the compute dtype
    row_ids: Tensor | None = None  # (M,) or (M, K) int64
    col_ids: Tensor | None = None  # (N,) or (N, K) int64
    row_limit: Tensor | None = None  # (M,) in the compute dtype
    col_limit: Tensor | None = None  # (N,) in the compute dtype
    row_guide: Tensor | None = None  # (M, G) of any floating dtype
    col_guide: Tensor | None = None  # (N, G)
    row_lengths: Tensor | None = None  # (B,) int64 on the CPU, how many rows each group has
    col_lengths: Tensor | None = None  # (B,) likewise of columns
    row_reference: Tensor | None = None  # (M,) in the compute dtype
    col_reference: Tensor | None = None  # (N,) in the compute dtype
    paired: bool = True  # row i has a positive, in column t(i)
    exclude_self: bool = False
    want_row: bool = True  # the row direction is requested
    want_col: bool = True  # the column direction is requested
    upper: bool = False  # y is x, and each pair is computed once: half the products
    equal_ids: EqualIds = "exclude"
    statistic: Statistic = (
        "logsumexp"  # log sum exp of the logits not excluded; or the sum of log(1 + exp); or "teacher"
    )
    # How many rows of S, from the first on, have their products kept for the backward. With groups the statistics keep
    # none; a loss whose gradients are formed in the forward may hold kept_rows * N products of each group.
    kept_rows: int = 0

    def shapes(self, m: int, n: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The shapes of pos, row and col for m rows and n columns."""
        parts = (2,) if self.equal_ids in ("apart", "add") else ()
        if self.statistic == "teacher" or self.is_ranked():
            parts = (3,)
        return (m if self.paired else 0,), (m if self.want_row else 0, *parts), (n if self.want_col else 0, *parts)

    def columns_of_rows(self, n: int) -> int | Tensor:
        """How many columns a row has: all n, or (M,) those of its group."""
        if self.row_lengths is None or self.col_lengths is None:
            return n
        return self.col_lengths.repeat_interleave(self.row_lengths).to(self.scale.device)

    def positive_columns(self, m: int) -> Tensor:
        """(M,) the column of each row's positive, among the columns of all groups."""
        device = self.scale.device
        local = torch.arange(m, device=device) if self.targets is None else self.targets
        if self.row_lengths is None or self.col_lengths is None:
            return local
        first = starts(self.col_lengths) - (starts(self.row_lengths) if self.targets is None else 0)
        return local + first.repeat_interleave(self.row_lengths, output_size=m).to(device)

    def is_ranked(self) -> bool:
        """Whether logits are compared with references."""
        return self.row_reference is not None or self.col_reference is not None


def starts(lengths: Tensor) -> Tensor:
    """(B,) where each group begins."""
    return lengths.cumsum(0) - lengths


FIELDS = get_type_hints(StatsSpec)
TENSORS = tuple(name for name, kind in FIELDS.items() if kind in (Tensor, Tensor | None))
# The tensors of the rows, and of the columns, with their dtypes; None is any floating dtype.
OF_ROWS: dict[str, torch.dtype | None] = {
    "targets": torch.int64,
    "row_ids": torch.int64,
    "row_limit": None,
    "row_guide": None,
    "row_reference": None,
}
OF_COLS: dict[str, torch.dtype | None] = {
    "col_bias": None,
    "col_ids": torch.int64,
    "col_limit": None,
    "col_guide": None,
    "col_reference": None,
}
OF_TWO_DIMENSIONS = (
    "row_ids",
    "col_ids",
    "row_guide",
    "col_guide",
)  # (M, K) or (M, G): a row or column may have several elements
MOST_IDS = 5  # of a row or column: a caller's 4, and one that relates a row to its target


class Forward(NamedTuple):
    """A backend's forward result, in ``statistics_dtype``; a direction that is not requested has 0 elements."""

    pos: Tensor  # (M,), NaN where the logit is +inf; (0,) without positives
    row: Tensor  # (M,), or (M, 2) with ``equal_ids`` "apart" or "add", or (M, 3) with a teacher or references
    col: Tensor  # (N,), (N, 2) or (N, 3)
    kept: Tensor  # the products of the first kept_rows rows, for the backward, in a form that the backend chooses


class Ranks(NamedTuple):
    """What comparing the logits with references gave, in a floating dtype and without gradient."""

    pos: Tensor  # (M,) logits of the positives
    row: Tensor  # (M, 2) how many logits are above the reference, and the highest logit
    col: Tensor | None  # (N, 2)


class Upstream(NamedTuple):
    """Gradients that arrive at the statistics; None means zero."""

    pos: Tensor | None  # each in the shape of the statistic
    row: Tensor | None
    col: Tensor | None


class Needs(NamedTuple):
    """Which gradients are requested."""

    x: bool
    y: bool
    scale: bool
    col_bias: bool
    joint: bool = False  # y is x: the gradient of x is to be the sum of both, and the gradient of y None


class Gradients(NamedTuple):
    """A backend's backward result; None for a gradient that is not requested."""

    x: Tensor | None  # (M, D) in the dtype of x
    y: Tensor | None  # (N, D) in the dtype of y
    scale: Tensor | None  # ()
    col_bias: Tensor | None  # in the shape of the bias


def empty(spec: StatsSpec, shape: tuple[int, ...], x: Tensor) -> Tensor:
    """A statistic over no pair, in one of the spec's shapes."""
    value = x.new_full(shape, 0 if spec.statistic == "softplus" else -torch.inf, dtype=statistics_dtype(x.device))
    if value.dim() == 2 and (spec.equal_ids == "add" or spec.statistic == "teacher" or spec.is_ranked()):
        value[:, 1] = 0
    if value.dim() == 2 and spec.is_ranked():
        value[:, 2] = -torch.inf
    return value


def merged(spec: StatsSpec, a: Tensor, b: Tensor) -> Tensor:
    """The statistic over two parts of S, from its values ``a`` and ``b`` over each part."""
    if spec.is_ranked():
        whole = merged(without_references(spec), a[:, 0], b[:, 0])
        return torch.stack((whole, a[:, 1] + b[:, 1], torch.maximum(a[:, 2], b[:, 2])), dim=1)
    if spec.statistic == "softplus":
        return a + b
    if spec.equal_ids == "add":
        return torch.stack((torch.logaddexp(a[:, 0], b[:, 0]), a[:, 1] + b[:, 1]), dim=1)
    if spec.statistic == "teacher":
        total = torch.logaddexp(a[:, 2], b[:, 2])
        mean = a[:, 1] * share_of(a[:, 2], total) + b[:, 1] * share_of(b[:, 2], total)
        return torch.stack((torch.logaddexp(a[:, 0], b[:, 0]), mean, total), dim=1)
    return torch.logaddexp(a, b)


def without_references(spec: StatsSpec) -> StatsSpec:
    return spec._replace(row_reference=None, col_reference=None)


def for_backward(spec: StatsSpec, saved: Forward, upstream: Upstream) -> tuple[StatsSpec, Forward, Upstream]:
    """A backward's problem without references, since what they give has no gradient."""
    if not spec.is_ranked():
        return spec, saved, upstream
    first = [None if t is None else t.select(-1, 0).contiguous() for t in (upstream.row, upstream.col)]
    row, col = (t.select(-1, 0).contiguous() for t in (saved.row, saved.col))
    return without_references(spec), saved._replace(row=row, col=col), Upstream(upstream.pos, *first)


def share_of(part: Tensor, total: Tensor) -> Tensor:
    """exp(part - total), and 0 where the part is empty, which may be all of the total."""
    return (part - total.masked_fill(total == -torch.inf, 0)).exp()


class RowLoss(NamedTuple):
    """A loss that is a sum over rows, or over rows and columns: what ``Backend.row_loss`` computes.

    With z the normaliser of a row or column minus its positive's logit, plus the margin, it is the sum of
    ``weight * softplus(z)``, or of ``weight * z`` if decoupled. For the softplus statistic it is the sum of
    ``weight * (row + softplus(-pos))``. The columns that count are the first M, the positives of the M rows in order.
    """

    weight: float = 1.0
    margin: float = 0.0
    decoupled: bool = False
    normalize: bool = False  # x and y, float32 or float64, are divided by their rows' norms first
    # (M,) int64, for an ``upper`` problem: a row's loss is ``row`` minus the mean logit of the other rows with its
    # label. A row does not count if no other has its label. ``over_counted``: the weight is one over the rows that do.
    labels: Tensor | None = None
    over_counted: bool = False


def summed_like(col_bias: Tensor | None, gradient: Tensor) -> Tensor:
    """(N,) gradients of the columns' biases -> the gradient of ``col_bias``, in its shape."""
    return gradient.sum() if col_bias is not None and col_bias.dim() == 0 else gradient


def compute_dtype(features: torch.dtype) -> torch.dtype:
    """The dtype of products, logits, losses and scale gradients: float64 for float64 features, else float32."""
    return torch.float64 if features == torch.float64 else torch.float32


def statistics_dtype(device: torch.device) -> torch.dtype:
    """The dtype of pos, row and col: float64 where the device has it.

    They are vectors, so it costs nothing, and a float32 log-normaliser of 1000 would round the loss and every weight
    in the gradient by 3e-5, which eager's softmax, subtracting the maximum first, does not.
    """
    return torch.float32 if device.type == "mps" else torch.float64


# Computed once: torch.compile of torch 2.8 cannot trace is_autocast_available.
AUTOCAST_DEVICES = frozenset(
    name for name in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia") if torch.amp.is_autocast_available(name)
)


def autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is on for this device; devices without autocast say no."""
    return device.type in AUTOCAST_DEVICES and torch.is_autocast_enabled(device.type)
