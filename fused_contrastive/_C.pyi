from collections.abc import Sequence

import torch
from torch import Tensor

parallel: bool

def vector_level() -> str: ...

class Problem:
    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        targets: Tensor | None,
        col_bias: Tensor | None,
        row_ids: Tensor | None,
        col_ids: Tensor | None,
        exclude_self: bool,
        rows: bool,
        cols: bool,
        upper: bool,
        equal_ids: str,
        reduction: str,
        kept_rows: int,
    ) -> None: ...

def stats_forward(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
def stats_backward(
    problem: Problem,
    row: Tensor,
    col: Tensor,
    kept: Tensor,
    g_pos: Tensor | None,
    g_row: Tensor | None,
    g_col: Tensor | None,
    needs: Sequence[bool],
    joint: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]: ...
def stats_at_once(
    problem: Problem, weight: float, margin: float, decoupled: bool, normalize: bool, needs: Sequence[bool]
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]]: ...
def normalize(views: Sequence[Tensor]) -> Tensor: ...
def cross_entropy(
    pos: Tensor, normalisers: Sequence[Tensor], decoupled: bool, reduction: str, dtype: torch.dtype
) -> Tensor: ...
def max_sim_forward(
    x: Tensor, y: Tensor, x_lengths: Tensor | None, y_lengths: Tensor | None, both: bool, kept_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
def max_sim_backward(
    x: Tensor,
    y: Tensor,
    x_lengths: Tensor | None,
    y_lengths: Tensor | None,
    argmax_x: Tensor,
    argmax_y: Tensor,
    g_x: Tensor | None,
    g_y: Tensor | None,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]: ...
def merge_top_k(scores: Tensor, first_column: int, values: Tensor, indices: Tensor) -> None: ...
def count_ahead(scores: Tensor, first_column: int, target_scores: Tensor, targets: Tensor, counts: Tensor) -> None: ...
