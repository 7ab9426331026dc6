"""The C++ CPU backend (csrc/): tiles of products swept by vectorised kernels, in parallel."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from fused_contrastive.backends.contract import Backend
from fused_contrastive.core import forks
from fused_contrastive.core.prefixes import Prefixes, PrefixGradients, PrefixNeeds, widths
from fused_contrastive.core.reduction import Reduction
from fused_contrastive.core.spec import Forward, Gradients, Needs, Ranks, RowLoss, StatsSpec, Upstream, compute_dtype
from fused_contrastive.core.tokens import MaxSimForward, MaxSimUpstream, TokenSpec

# The reinstall is forced and uncached, since pip would keep what is installed or reuse a wheel that it built before.
REMEDY = (
    "To build it: install g++ or clang++, then, in the environment that holds torch, "
    '`pip install "setuptools>=77" wheel ninja pybind11 numpy` and '
    "`FUSED_CONTRASTIVE_EXTENSION=1 pip install --force-reinstall --no-deps --no-cache-dir --no-build-isolation "
    "fused_contrastive` (in a clone: `-e .` for the name)"
)


def _explain(error: ImportError) -> str:
    package = Path(__file__).parents[1]
    if importlib.util.find_spec("fused_contrastive._C") is None:
        # Python looks into the current folder first: in a clone it finds the sources, whatever is installed.
        others = [str(Path(entry, package.name)) for entry in sys.path if Path(entry).resolve() != package.parent]
        installed = PathFinder.find_spec("fused_contrastive._C", others)
        if installed is not None and installed.origin is not None:
            return (
                f"the sources in {package}, without a compiled extension, hide the installed package, which has one: "
                f"{Path(installed.origin).parent}. Start Python in another folder, or install the sources in place: "
                "`pip install --no-build-isolation -e .` in their folder"
            )
        if (package.parent / "setup.py").is_file():
            what = f"its compiled extension has not been built in the sources, {package}"
        else:
            what = (
                "its compiled extension is not in this installation, which was made without a C++ compiler or with "
                "FUSED_CONTRASTIVE_EXTENSION=0"
            )
    else:
        what = (
            f"its compiled extension could not be loaded ({error}); an extension works with the minor version of torch "
            "that it was built for"
        )
    return f"{what}. {REMEDY}"


try:
    from fused_contrastive import _C

    _unavailable: str | None = None
except ImportError as error:
    _unavailable = _explain(error)


def vector_level() -> str:
    """The instruction set of the vector kernels here: baseline, avx2, avx512, avx512_bf16 or amx_bf16."""
    return _C.vector_level()


def is_parallel() -> bool:
    """Whether the extension was built with OpenMP, so that it uses torch's threads."""
    return _C.parallel


ALIGNED = 32  # the products' kernels begin and end prefixes at multiples of this


def _aligned(dims: tuple[int, ...], x: Tensor, y: Tensor) -> tuple[tuple[int, ...], Tensor, Tensor]:
    """The features with zeros after each prefix that does not end at a multiple of 32, and where prefixes end there."""
    parts = widths(dims, x.shape[1])
    if not any(width % ALIGNED for width in parts) and parts[-1] == 0:
        return dims, x, y
    sizes = [-(-width // ALIGNED) * ALIGNED for width in parts[:-1]]

    def spaced(t: Tensor) -> Tensor:
        out = t.new_zeros(t.shape[0], sum(sizes))
        for part, room in zip(t.split(parts, dim=1)[: len(dims)], out.split(sizes, dim=1), strict=True):
            room[:, : part.shape[1]] = part
        return out

    return tuple(accumulate(sizes)), spaced(x), spaced(y)


def _taken_out(t: Tensor, of: Prefixes, d: int) -> Tensor:
    """The gradients of (rows, d) features from those of what ``_aligned`` made of them."""
    out, first = t.new_zeros(t.shape[0], d), 0
    for part in of.parts:
        width = part.stop - part.start
        out[:, part] = t[:, first : first + width]
        first += -(-width // ALIGNED) * ALIGNED
    return out


class Cpp(Backend):
    def unavailable(self) -> str | None:
        return _unavailable

    def supports(self, device_type: str, dtype: torch.dtype) -> bool:
        return device_type == "cpu"

    def kept(self, rows: int, n: int, dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
        return (rows, n), compute_dtype(dtype)

    def takes_groups(self, spec: StatsSpec) -> bool:
        return True

    def stats_forward(self, spec: StatsSpec, x: Tensor, y: Tensor) -> Forward:
        forks.guard()
        return Forward(*_C.stats_forward(x, y, spec))

    def stats_backward(
        self, spec: StatsSpec, x: Tensor, y: Tensor, saved: Forward, upstream: Upstream, needs: Needs
    ) -> Gradients:
        forks.guard()
        return Gradients(*_C.stats_backward(x, y, spec, saved.row, saved.col, saved.kept, *upstream, needs))

    def kept_of_prefixes(self, rows: int, n: int, count: int, dtype: torch.dtype) -> tuple[int, ...]:
        return (rows, count * n)

    def prefixes_forward(self, spec: StatsSpec, of: Prefixes, x: Tensor, y: Tensor) -> Forward:
        forks.guard()
        dims, x, y = _aligned(of.dims, x, y)
        return Forward(*_C.prefixes_forward(x, y, spec, dims, of.row, of.col, of.kept))

    def prefixes_backward(
        self, spec: StatsSpec, of: Prefixes, x: Tensor, y: Tensor, saved: Forward, upstream: Upstream,
        needs: PrefixNeeds,
    ) -> PrefixGradients:  # fmt: skip
        forks.guard()
        d = x.shape[1]
        dims, x, y = _aligned(of.dims, x, y)
        _, row, col, kept = saved
        dx, dy, dscale = _C.prefixes_backward(
            x, y, spec, dims, of.row, of.col, of.kept, row, col, kept, *upstream, needs
        )
        dx, dy = (t if t is None or (dims == of.dims and t.shape[1] == d) else _taken_out(t, of, d) for t in (dx, dy))
        return PrefixGradients(dx, dy, dscale)

    def fuses_loss(self, spec: StatsSpec, m: int) -> bool:
        """Losses over rows alone, in one walk over S; others, and triangles, only if all products may be kept.

        Of groups always: each keeps what fits the memory budget by itself.
        """
        return spec.kept_rows == m or not (spec.want_col or spec.upper) or spec.row_lengths is not None

    def row_loss(self, spec: StatsSpec, x: Tensor, y: Tensor, loss: RowLoss) -> tuple[Tensor, Ranks | None]:
        forks.guard()
        value, pos, row, col = _C.row_loss(x, y, spec, loss)
        return value, None if row is None else Ranks(pos, row, col if spec.want_col else None)

    def cross_entropy(
        self, pos: Tensor, normalisers: Sequence[Tensor], decoupled: bool, reduction: Reduction, dtype: torch.dtype
    ) -> Tensor:
        forks.guard()
        return _C.cross_entropy(pos, normalisers, decoupled, reduction, dtype)

    def normalize(self, *views: Tensor) -> Tensor:
        forks.guard()
        return _C.normalize(views)

    def max_sim_forward(self, spec: TokenSpec, x: Tensor, y: Tensor) -> MaxSimForward:
        forks.guard()
        return MaxSimForward(*_C.max_sim_forward(x, y, spec))

    def max_sim_backward(
        self, spec: TokenSpec, x: Tensor, y: Tensor, saved: MaxSimForward, upstream: MaxSimUpstream,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        forks.guard()
        return _C.max_sim_backward(x, y, spec, saved.argmax_x, saved.argmax_y, *upstream, needs)

    def merge_top_k(self, scores: Tensor, first_column: int, values: Tensor, indices: Tensor) -> None:
        forks.guard()
        _C.merge_top_k(scores, first_column, values, indices)

    def count_ahead(
        self, scores: Tensor, first_column: int, target_scores: Tensor, targets: Tensor, counts: Tensor
    ) -> None:
        forks.guard()
        _C.count_ahead(scores, first_column, target_scores, targets, counts)


BACKEND = Cpp()
