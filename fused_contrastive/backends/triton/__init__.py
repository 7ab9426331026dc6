"""The Triton backend: one fused pass over tiles of S on a GPU, and vendor GEMMs for the gradients.

Triton and the kernels are imported when first used, so that a machine without them can import the package.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from fused_contrastive.backends.contract import Backend
from fused_contrastive.backends.triton import device, storage
from fused_contrastive.core.prefixes import Prefixes, PrefixGradients, PrefixNeeds
from fused_contrastive.core.reduction import Reduction
from fused_contrastive.core.spec import Forward, Gradients, Needs, Ranks, RowLoss, StatsSpec, Upstream
from fused_contrastive.core.tokens import MaxSimForward, MaxSimUpstream, TokenSpec, index_dtype

INSTALLED = importlib.util.find_spec("triton") is not None
OLDEST = (3, 4)


class Triton(Backend):
    def unavailable(self) -> str | None:
        if not INSTALLED:
            return "the package triton is not installed; `pip install triton`"
        found = importlib.metadata.version("triton")
        if tuple(map(int, found.split(".")[:2])) < OLDEST:
            return f"it needs Triton {'.'.join(map(str, OLDEST))} or later, and finds {found}; `pip install -U triton`"
        if device.INTERPRETED or device.stand_in is not None or torch.cuda.is_available():
            return None
        return "torch sees no NVIDIA or AMD GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly, for tests)"

    def supports(self, device_type: str, dtype: torch.dtype) -> bool:
        on_cpu = device.INTERPRETED or device.stand_in is not None
        return device_type == ("cpu" if on_cpu else "cuda") and dtype != torch.float64

    def kept(self, rows: int, n: int, dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
        return storage.layout(rows, n, dtype)

    def keeps(self, spec: StatsSpec, dtype: torch.dtype) -> bool:
        """Half-precision features keep exponentials, which the exact kernels do not read."""
        limited = spec.row_limit is not None or spec.col_limit is not None
        exact = limited or spec.statistic == "teacher" or (spec.equal_ids in ("apart", "add"))
        return dtype == torch.float32 or not exact or spec.statistic == "softplus"

    def takes_groups(self, spec: StatsSpec) -> bool:
        from fused_contrastive.backends.triton import groups_launch

        return groups_launch.takes(spec)

    def stats_forward(self, spec: StatsSpec, x: Tensor, y: Tensor) -> Forward:
        from fused_contrastive.backends.triton import groups_launch, launch

        if spec.row_lengths is not None:
            return groups_launch.forward(spec, x, y)
        return launch.forward(spec, x, y)

    def stats_backward(
        self, spec: StatsSpec, x: Tensor, y: Tensor, saved: Forward, upstream: Upstream, needs: Needs
    ) -> Gradients:
        from fused_contrastive.backends.triton import groups_launch, launch

        # Hooks on saved tensors may give them back in other strides, or other tensors.
        saved = Forward(*(t.contiguous() for t in saved))
        _check_saved("kept", saved.kept, *self.kept(spec.kept_rows, len(y), x.dtype))
        _, row, col = spec._replace(want_row=True, want_col=True).shapes(len(x), len(y))
        for name, value, shape in (("row", saved.row, row), ("col", saved.col, col)):
            if len(value):
                _check_saved(name, value, shape, value.dtype)
        run = launch.backward if spec.row_lengths is None else groups_launch.backward
        return run(spec, x, y, saved, upstream, needs)

    def prefixes_forward(self, spec: StatsSpec, of: Prefixes, x: Tensor, y: Tensor) -> Forward:
        from fused_contrastive.backends.triton import prefixes_launch

        return prefixes_launch.forward(spec, of, x, y)

    def prefixes_backward(
        self, spec: StatsSpec, of: Prefixes, x: Tensor, y: Tensor, saved: Forward, upstream: Upstream,
        needs: PrefixNeeds,
    ) -> PrefixGradients:  # fmt: skip
        from fused_contrastive.backends.triton import prefixes_launch

        # As in stats_backward: hooks on saved tensors may give back others.
        shapes = (len(of.dims), len(x)), (len(of.dims), len(y) if spec.want_col else 0)
        for name, value, shape in zip(("row", "col"), (saved.row, saved.col), shapes, strict=True):
            _check_saved(name, value, shape, torch.float64)
        return prefixes_launch.backward(spec, of, x, y, saved, upstream, needs)

    def fuses_loss(self, spec: StatsSpec, m: int) -> bool:
        """Losses over rows alone: of a softmax unless all products are kept, and always of softplus.

        The gradient of a sum of softplus is formed with the sum, so keeping products would save nothing. Limits, a
        teacher, and related pairs apart or added up, take the exact kernels of the two passes.
        """
        limited = spec.row_limit is not None or spec.col_limit is not None
        other = not spec.paired or spec.row_lengths is not None or spec.is_ranked()
        if limited or spec.equal_ids in ("apart", "add") or other:
            return False
        alone = not (spec.want_col or spec.upper)
        return alone and (spec.kept_rows < m or spec.statistic == "softplus")

    def row_loss(self, spec: StatsSpec, x: Tensor, y: Tensor, loss: RowLoss) -> tuple[Tensor, Ranks | None]:
        from fused_contrastive.backends.triton import at_once

        return at_once.row_loss(spec, x, y, loss), None

    def cross_entropy(
        self, pos: Tensor, normalisers: Sequence[Tensor], decoupled: bool, reduction: Reduction, dtype: torch.dtype
    ) -> Tensor:
        from fused_contrastive.backends.triton import loss_node

        return loss_node.cross_entropy(pos, normalisers, decoupled, reduction, dtype)

    def max_sim_forward(self, spec: TokenSpec, x: Tensor, y: Tensor) -> MaxSimForward:
        from fused_contrastive.backends.triton import max_sim_launch

        return max_sim_launch.forward(spec, x, y)

    def max_sim_backward(
        self, spec: TokenSpec, x: Tensor, y: Tensor, saved: MaxSimForward, upstream: MaxSimUpstream,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        from fused_contrastive.backends.triton import max_sim_launch

        saved = MaxSimForward(*(t.contiguous() for t in saved))
        (_, t, _), (n, p, _) = x.shape, y.shape
        columns = spec.own or n
        of_y = (spec.kept_rows, columns, p) if spec.both else (0, 0, 0)
        _check_saved("argmax_x", saved.argmax_x, (spec.kept_rows, columns, t), index_dtype(p))
        _check_saved("argmax_y", saved.argmax_y, of_y, index_dtype(t))
        return max_sim_launch.backward(spec, x, y, saved, upstream, needs)

    def merge_top_k(self, scores: Tensor, first_column: int, values: Tensor, indices: Tensor) -> None:
        from fused_contrastive.backends.triton import top_k

        top_k.merge_top_k(scores, first_column, values, indices)


def _check_saved(name: str, t: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(t.shape) != shape or t.dtype != dtype:
        raise ValueError(f"{name}: got {t.dtype} of shape {tuple(t.shape)}, expected {dtype} of shape {shape}")


BACKEND = Triton()
