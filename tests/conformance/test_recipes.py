"""info-nce-pytorch, and SupContrast's loss, whose replacement is one call: docs/adapters/recipes.md."""

from __future__ import annotations

import pytest
import torch
from against import DTYPES, assert_same, features
from torch import Tensor

from fused_contrastive import info_nce_loss

info_nce = pytest.importorskip("info_nce", reason="info-nce-pytorch is not installed: make conformance")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("negatives", [None, "unpaired", "paired"])
def test_info_nce_pytorch(negatives: str | None, reduction: str, dtype: torch.dtype, backend: str) -> None:
    """Explicit negatives replace those of the batch: the batch's keys are excluded by their id."""
    n, k = 9, 5
    leaves = {"query": features(n, 16, dtype=dtype), "key": features(n, 16, dtype=dtype)}
    if negatives is not None:
        shape = (k, 16) if negatives == "unpaired" else (n, k, 16)
        leaves["negatives"] = features(*shape, dtype=dtype)

    def theirs(query: Tensor, key: Tensor, negatives_: Tensor | None = None) -> Tensor:
        return info_nce.info_nce(query, key, negatives_, 0.1, reduction, negatives or "unpaired")

    def ours(query: Tensor, key: Tensor, negatives_: Tensor | None = None) -> Tensor:
        ids = {}
        if negatives_ is not None:
            columns = n + (k if negatives_.dim() == 2 else 0)
            ids = {"row_ids": torch.zeros(n, dtype=torch.long), "col_ids": (torch.arange(columns) >= n).long()}
        return info_nce_loss(
            query, key, negatives=negatives_, **ids, temperature=0.1, reduction=reduction, normalize=True,
            backend=backend,
        )  # fmt: skip

    assert_same(
        lambda query, key, negatives=None: theirs(query, key, negatives),
        lambda query, key, negatives=None: ours(query, key, negatives),
        leaves,
        10.0 if reduction == "mean" else 10.0 * n,
    )
