from collections.abc import Sequence

import torch
from torch import Tensor

parallel: bool

def vector_level() -> str: ...
def stats_forward(
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
    kept_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
def stats_backward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    targets: Tensor | None,
    col_bias: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    exclude_self: bool,
    row: Tensor,
    col: Tensor,
    kept: Tensor,
    g_pos: Tensor | None,
    g_row: Tensor | None,
    g_col: Tensor | None,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]: ...
def cross_entropy(
    pos: Tensor, normalisers: Sequence[Tensor], decoupled: bool, reduction: str, dtype: torch.dtype
) -> Tensor: ...
def merge_top_k(scores: Tensor, first_column: int, values: Tensor, indices: Tensor) -> None: ...
def count_ahead(scores: Tensor, first_column: int, target_scores: Tensor, targets: Tensor, counts: Tensor) -> None: ...
