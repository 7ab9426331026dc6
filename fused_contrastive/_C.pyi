from collections.abc import Sequence

import torch
from torch import Tensor

from fused_contrastive.core.prefixes import PrefixNeeds
from fused_contrastive.core.spec import Needs, RowLoss, StatsSpec
from fused_contrastive.core.tokens import TokenSpec

parallel: bool

def vector_level() -> str: ...
def stats_forward(x: Tensor, y: Tensor, spec: StatsSpec) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
def stats_backward(
    x: Tensor,
    y: Tensor,
    spec: StatsSpec,
    row: Tensor,
    col: Tensor,
    kept: Tensor,
    g_pos: Tensor | None,
    g_row: Tensor | None,
    g_col: Tensor | None,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]: ...
def prefixes_forward(
    x: Tensor, y: Tensor, spec: StatsSpec, dims: Sequence[int], row: Tensor | None, col: Tensor | None, kept: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
def prefixes_backward(
    x: Tensor,
    y: Tensor,
    spec: StatsSpec,
    dims: Sequence[int],
    row_factors: Tensor | None,
    col_factors: Tensor | None,
    kept_prefixes: int,
    row: Tensor,
    col: Tensor,
    kept: Tensor,
    g_pos: Tensor | None,
    g_row: Tensor | None,
    g_col: Tensor | None,
    needs: PrefixNeeds,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]: ...
def row_loss(
    x: Tensor, y: Tensor, spec: StatsSpec, loss: RowLoss
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]: ...
def normalize(views: Sequence[Tensor]) -> Tensor: ...
def cross_entropy(
    pos: Tensor, normalisers: Sequence[Tensor], decoupled: bool, reduction: str, dtype: torch.dtype
) -> Tensor: ...
def max_sim_forward(x: Tensor, y: Tensor, spec: TokenSpec) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
def max_sim_backward(
    x: Tensor,
    y: Tensor,
    spec: TokenSpec,
    argmax_x: Tensor,
    argmax_y: Tensor,
    g_x: Tensor | None,
    g_y: Tensor | None,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]: ...
def merge_top_k(scores: Tensor, first_column: int, values: Tensor, indices: Tensor) -> None: ...
def count_ahead(scores: Tensor, first_column: int, target_scores: Tensor, targets: Tensor, counts: Tensor) -> None: ...
