"""colpali-engine's losses: values and gradients against the library's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from against import DTYPES, assert_same, features

pytest.importorskip("colpali_engine", reason="colpali_engine is not installed: make conformance")

from colpali_engine import loss as library
from colpali_engine.loss import bi_encoder_losses as bi

from fused_contrastive.adapters import colpali_engine as ours

B, K, D = 4, 3, 12
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "raw": {"normalize_scores": False, "temperature": 2.0},
    "smooth": {"use_smooth_max": True, "tau": 0.3, "temperature": 0.5},
    "filter": {"pos_aware_negative_filtering": True, "filter_threshold": 0.5, "temperature": 0.1},
}
EXPLICIT = {"in_batch_term_weight": 0.3}


def leaves_of(*shapes: tuple[int, ...], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    names = ("query_embeddings", "doc_embeddings", "neg_doc_embeddings")
    return {name: features(*shape, dtype=dtype) for name, shape in zip(names, shapes, strict=False)}


def compared(
    name: str, options: dict[str, Any], leaves: dict[str, torch.Tensor], offset: int, backend: str,
    padded: dict[str, torch.Tensor] | None = None,
) -> None:  # fmt: skip
    """``padded``: masks that embeddings are multiplied by, as the library's models do."""
    found, masks = [], padded or {}
    for module in (library if hasattr(library, name) else bi, ours):
        loss = getattr(module, name)(**options)
        loss.backend = backend
        found.append(
            lambda loss=loss, **leaves: loss(
                **{name: t * masks[name] if name in masks else t for name, t in leaves.items()}, offset=offset
            )
        )
    assert_same(*found, leaves, 8 / options.get("temperature", 0.02))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ["ColbertLoss", "ColbertPairwiseCELoss", "ColbertSigmoidLoss"])
def test_late_interaction(name: str, option: str, dtype: torch.dtype, backend: str) -> None:
    leaves = leaves_of((B, 5, D), (B, 6, D), dtype=dtype)
    lengths = {"query_embeddings": torch.tensor([3, 5, 5, 4]), "doc_embeddings": torch.tensor([6, 2, 5, 6])}
    masks = {name: (torch.arange(leaves[name].shape[1]) < n[:, None])[..., None] for name, n in lengths.items()}
    compared(name, OPTIONS[option], leaves, 0, backend, masks)


@pytest.mark.parametrize("offset", [0, 2])
def test_documents_of_all_processes(offset: int, backend: str) -> None:
    leaves = leaves_of((B, 5, D), (B + 2, 6, D), dtype=torch.float32)
    for name in ("ColbertLoss", "ColbertPairwiseCELoss"):
        compared(name, {}, leaves, offset, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ["ColbertNegativeCELoss", "ColbertPairwiseNegativeCELoss"])
def test_late_interaction_with_negatives(name: str, option: str, dtype: torch.dtype, backend: str) -> None:
    leaves = leaves_of((B, 5, D), (B, 6, D), (B, K, 7, D), dtype=dtype)
    compared(name, {**OPTIONS[option], **EXPLICIT}, leaves, 0, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, B])
@pytest.mark.parametrize("name", ["BiEncoderLoss", "BiPairwiseCELoss", "BiSigmoidLoss"])
def test_bi_encoders(name: str, offset: int, dtype: torch.dtype, backend: str) -> None:
    leaves = leaves_of((B, D), (B + offset, D), dtype=dtype)
    compared(name, {"temperature": 0.1}, leaves, offset, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_directions(dtype: torch.dtype, backend: str) -> None:
    compared("BiPairedEncoderLoss", {"temperature": 0.1}, leaves_of((B, D), (B, D), dtype=dtype), 0, backend)


def test_both_directions_of_other_processes_documents() -> None:
    with pytest.raises(ValueError, match="offset: got 4, expected 0"):
        ours.BiPairedEncoderLoss()(features(B, D), features(B, D), 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["BiNegativeCELoss", "BiPairwiseNegativeCELoss"])
def test_bi_encoders_with_negatives(name: str, dtype: torch.dtype, backend: str) -> None:
    leaves = leaves_of((B, D), (B, D), (B, K, D), dtype=dtype)
    compared(name, {"temperature": 0.1, **EXPLICIT}, leaves, 0, backend)


@pytest.mark.parametrize(
    "name", ["BiEncoderLoss", "BiPairedEncoderLoss", "BiNegativeCELoss", "BiPairwiseCELoss", "BiSigmoidLoss"]
)
def test_the_filter_of_bi_encoders_is_not_covered(name: str) -> None:
    with pytest.raises(NotImplementedError, match="pos_aware_negative_filtering: got True"):
        getattr(ours, name)(pos_aware_negative_filtering=True)


def test_documents_that_are_no_multiple_of_the_queries() -> None:
    with pytest.raises(ValueError, match="doc_embeddings: got 6 rows with offset=0, expected multiples of 4"):
        ours.BiSigmoidLoss()(features(4, D), features(6, D))


@pytest.mark.parametrize("name", ["ColbertNegativeCELoss", "BiNegativeCELoss"])
def test_the_loss_of_the_batch_is_ours_too(name: str) -> None:
    made = getattr(ours, name)().inner_loss
    assert type(made).__module__ == ours.__name__


def test_patch() -> None:
    with ours.patch_colpali_engine():
        assert library.ColbertLoss is ours.ColbertLoss
        assert type(library.ColbertNegativeCELoss().inner_loss) is ours.ColbertLoss
    assert library.ColbertLoss is not ours.ColbertLoss
