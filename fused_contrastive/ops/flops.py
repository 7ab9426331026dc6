"""What torch.utils.flop_counter counts for each operator: 2 for every multiply-add of its matrix products, and no more.

Forward: the products x y^T once. Backward: the products that were not kept, again, and one full set for each of dx and
dy. Groups are counted as if their lengths were equal, since the counter sees only how many there are.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

import torch

from fused_contrastive.core.spec import StatsSpec

Shape = tuple[int, ...]


def _pairs(rows: int, n: int, upper: bool) -> int:
    """How many pairs the first ``rows`` rows of S have: n in each, or if ``upper`` those above the diagonal."""
    return rows * (n - 1) - rows * (rows - 1) // 2 if upper else rows * n


def _all_pairs(x: Shape, y: Shape, spec: Any) -> int:
    groups = 1 if spec.row_lengths is None else spec.row_lengths[0]
    return groups * _pairs(x[0] // groups, y[0] // groups, spec.upper)


def _stats_forward(x: Shape, y: Shape, *problem: Any, **_: Any) -> int:
    return 2 * x[1] * _all_pairs(x, y, StatsSpec(*problem[:-1]))


def _stats_backward(
    g_pos: Any, g_row: Any, g_col: Any, row: Any, col: Any, kept: Any, needs: list[bool], x: Shape, y: Shape,
    *problem: Any, **_: Any,
) -> int:  # fmt: skip
    spec = StatsSpec(*problem[:-1])
    pairs = _all_pairs(x, y, spec)
    again = pairs - _pairs(spec.kept_rows, y[0], spec.upper)
    return 2 * x[1] * (again + pairs * sum(needs[:2]))


def _prefixes_forward(
    x: Shape, y: Shape, scale: Any, targets: Any, row_ids: Any, col_ids: Any, dims: list[int], *_: Any, **__: Any
) -> int:
    return 2 * x[0] * y[0] * dims[-1]


def _prefixes_backward(
    g_pos: Any, g_row: Any, g_col: Any, row: Any, col: Any, kept: Any, needs: list[bool], x: Shape, y: Shape,
    scale: Any, targets: Any, row_ids: Any, col_ids: Any, dims: list[int], normalize: bool, want_col: bool,
    kept_rows: int, kept_prefixes: int, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Of rows whose longest prefixes are kept, the columns that the others have are multiplied again."""
    of_kept = (0, *dims)[len(dims) - kept_prefixes] * kept_rows
    return 2 * y[0] * (dims[-1] * (x[0] - kept_rows) + of_kept + dims[-1] * x[0] * sum(needs[:2]))


def _max_sim_forward(x: Shape, y: Shape, *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * y[-3] * y[-2] * x[2]


def _max_sim_backward(
    g_x: Any, g_y: Any, argmax_x: Any, argmax_y: Any, needs: list[bool], x: Shape, y: Shape, x_mask: Any, y_mask: Any,
    both: bool, smooth: float, kept: int, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """A token's maximum is one product, with D multiply-adds for each gradient that is needed; a smooth one is all."""
    (m, t, d), n, p = x, y[-3], y[-2]
    if smooth:
        return 2 * d * m * n * t * p * (1 + sum(needs))
    maxima = m * n * ((t if g_x is not None else 0) + (p if both and g_y is not None else 0))
    return 2 * d * ((m - kept) * n * t * p + maxima * sum(needs))


def _rank(queries: Shape, candidates: Shape, *_: Any, **__: Any) -> int:
    return 2 * queries[0] * candidates[0] * queries[1]


FORMULAS: dict[str, Callable[..., int]] = {
    "stats_forward": _stats_forward,
    "stats_backward": _stats_backward,
    "prefixes_forward": _prefixes_forward,
    "prefixes_backward": _prefixes_backward,
    "max_sim_forward": _max_sim_forward,
    "max_sim_backward": _max_sim_backward,
    "rank": _rank,
    "target_ranks": _rank,
}


def _register() -> None:
    from torch.utils.flop_counter import register_flop_formula

    for name, formula in FORMULAS.items():
        register_flop_formula(getattr(torch.ops.fused_contrastive, name))(formula)


class _WhenImported(importlib.abc.MetaPathFinder):
    """Registers the formulas once the counter's module is imported, which may import Triton and so take long."""

    name = "torch.utils.flop_counter"

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                _register()
                if self in sys.meta_path:
                    sys.meta_path.remove(self)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Called once, when the package is imported."""
    if _WhenImported.name in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _WhenImported())
