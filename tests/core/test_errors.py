"""Bad input: the error names the argument, what came and what was expected."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fused_contrastive import (
    ClipLoss,
    clip_loss,
    contrastive_stats,
    max_sim,
    nt_xent_loss,
    siglip_loss,
    supcon_loss,
)

X, Y = torch.randn(4, 3), torch.randn(5, 3)
LONG = torch.arange(4)

STATS = {
    "x not a tensor": (dict(x=[[1.0]]), TypeError, "x: got list, expected a torch.Tensor"),
    "x integer": (dict(x=torch.ones(4, 3, dtype=torch.long)), TypeError, "x: got dtype torch.int64, expected float32"),
    "x complex": (dict(x=torch.ones(4, 3, dtype=torch.cfloat)), TypeError, "x: got dtype torch.complex64"),
    "x sparse": (dict(x=torch.eye(4, 3).to_sparse()), TypeError, "x: got layout torch.sparse_coo, expected a d"),
    "x rank": (dict(x=torch.randn(3)), ValueError, "x: got shape (3,), expected 2 dimensions"),
    "y rank": (dict(y=torch.randn(1, 5, 3)), ValueError, "y: got shape (1, 5, 3), expected 2 dimensions"),
    "empty batch": (dict(x=torch.randn(0, 3)), ValueError, "x: got an empty batch of shape (0, 3)"),
    "D of 0": (dict(x=torch.randn(4, 0)), ValueError, "x: got an empty batch of shape (4, 0)"),
    "D differs": (dict(y=torch.randn(5, 2)), ValueError, "y: got D = 2, expected 3, the D of x"),
    "dtypes differ": (dict(y=Y.double()), TypeError, "y: got dtype torch.float64, expected torch.float32"),
    "devices differ": (dict(y=Y.to("meta")), ValueError, "y: got device meta, expected cpu, the device of x"),
    "M > N": (dict(x=torch.randn(6, 3)), ValueError, "targets: got None for M = 6 rows and N = 5 columns"),
    "targets length": (dict(targets=LONG[:3]), ValueError, "targets: got shape (3,), expected an integer tensor"),
    "targets dtype": (dict(targets=LONG.bool()), TypeError, "targets: got dtype torch.bool"),
    "targets negative": (dict(targets=LONG - 1), ValueError, "targets: got values from -1 to 2, expected 0 to 4"),
    "targets too large": (dict(targets=LONG + 2), ValueError, "targets: got values from 2 to 5, expected 0 to 4"),
    "targets a list": (dict(targets=[0, 1, 2, 3]), TypeError, "targets: got list"),
    "one of the ids": (dict(row_ids=LONG), ValueError, "row_ids, col_ids: got only one of them"),
    "ids length": (dict(row_ids=LONG, col_ids=LONG), ValueError, "col_ids: got shape (4,), expected"),
    "ids dtype": (dict(row_ids=LONG.float(), col_ids=torch.arange(5)), TypeError, "row_ids: got dtype torch.float32"),
    "bias length": (dict(col_bias=torch.zeros(4)), ValueError, "col_bias: got shape (4,)"),
    "bias dtype": (dict(col_bias=torch.arange(5)), TypeError, "col_bias: got dtype torch.int64"),
    "scale vector": (
        dict(scale=torch.ones(2)),
        ValueError,
        "scale: got shape (2,), expected a number or a tensor of shape () or (1,)",
    ),
    "scale integer": (dict(scale=torch.tensor(2)), TypeError, "scale: got dtype torch.int64"),
    "scale string": (dict(scale="2"), TypeError, "scale: got str, expected a number or a tensor of shape () or (1,)"),
    "direction": (dict(directions=["rows"]), ValueError, "directions: got 'rows', expected one of 'row', 'col'"),
    "directions a string": (dict(directions="row"), TypeError, "directions: got 'row', expected a sequence"),
    "no direction": (dict(directions=[]), ValueError, "directions: got none"),
    "backend": (
        dict(backend="cuda"),
        ValueError,
        "backend: got 'cuda', expected one of 'auto', 'reference', 'cpp', 'triton'",
    ),
    "negative budget": (dict(memory_budget=-1), ValueError, "memory_budget: got -1, expected at least 0"),
    "budget": (dict(memory_budget="max"), TypeError, "memory_budget: got 'max', expected a number of bytes or 'auto'"),
    "exclude_self": (dict(exclude_self=1), TypeError, "exclude_self: got 1"),
    "cpp elsewhere": (
        dict(x=X.to("meta"), y=Y.to("meta"), backend="cpp"),
        ValueError,
        "backend: got 'cpp' for torch.float32 features on meta",
    ),
}


@pytest.mark.parametrize("name", STATS)
def test_contrastive_stats(name: str) -> None:
    changes, error, message = STATS[name]
    with pytest.raises(error, match=re.escape(message)):
        contrastive_stats(**{"x": X, "y": Y, **changes})


CLIP = {
    "rows differ": (dict(text_features=Y), ValueError, "text_features: got 5 rows, expected 4, as many as image_feat"),
    "D differs": (
        dict(text_features=torch.randn(4, 2)),
        ValueError,
        "text_features: got D = 2, expected 3",
    ),
    "image rank": (dict(image_features=torch.randn(3)), ValueError, "image_features: got shape (3,)"),
    "scale": (dict(logit_scale=None), TypeError, "logit_scale, temperature: got neither"),
    "reduction": (dict(reduction="avg"), ValueError, "reduction: got 'avg', expected one of 'mean', 'sum', 'none'"),
    "smoothing": (dict(label_smoothing=1.0), ValueError, "label_smoothing: got 1.0, expected a number in [0, 1)"),
    "smoothing type": (dict(label_smoothing="a"), TypeError, "label_smoothing: got 'a'"),
}


@pytest.mark.parametrize("name", CLIP)
def test_clip_loss(name: str) -> None:
    changes, error, message = CLIP[name]
    with pytest.raises(error, match=re.escape(message)):
        clip_loss(**{"image_features": X, "text_features": X, "logit_scale": 1.0, **changes})


SUPCON = {
    "rank": (
        dict(features=torch.randn(2, 3, 4, 5, 6)),
        "features: got shape (2, 3, 4, 5, 6), expected (N, D) or (N, V, D)",
    ),
    "vector": (dict(features=torch.randn(4)), "features: got shape (4,), expected (N, D) or (N, V, D)"),
    "no view": (
        dict(features=torch.randn(4, 0, 3)),
        "features: got shape (4, 0, 3), expected (N, D) or (N, V, D) with",
    ),
    "no sample": (dict(features=torch.randn(0, 3)), "features: got an empty batch of shape (0, 3)"),
}


@pytest.mark.parametrize("name", SUPCON)
def test_supcon_loss(name: str) -> None:
    changes, message = SUPCON[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        supcon_loss(**{"features": X, "labels": LONG, **changes})


def test_clip_module_checks_when_made() -> None:
    with pytest.raises(ValueError, match="reduction"):
        ClipLoss(reduction="avg")
    with pytest.raises(ValueError, match="label_smoothing"):
        ClipLoss(label_smoothing=-0.1)


def test_targets_are_checked_under_compile() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: contrastive_stats(X, Y, targets=t).row, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="targets: got values from 2 to 5"):
        compiled(LONG + 2)


X_TOKENS, Y_TOKENS = torch.randn(4, 3, 2), torch.randn(5, 6, 2)
MASK = torch.ones(4, 3, dtype=torch.bool)
MAX_SIM = {
    "x a list": (dict(x_tokens=[[[1.0]]]), TypeError, "x_tokens: got list, expected a torch.Tensor of shape (items, t"),
    "x integer": (dict(x_tokens=X_TOKENS.long()), TypeError, "x_tokens: got dtype torch.int64, expected float32"),
    "x sparse": (dict(x_tokens=X_TOKENS.to_sparse()), TypeError, "x_tokens: got layout torch.sparse_coo, expected a d"),
    "x rank": (dict(x_tokens=X_TOKENS[0]), ValueError, "x_tokens: got shape (3, 2), expected 3 dim"),
    "y empty": (dict(y_tokens=Y_TOKENS[:, :0]), ValueError, "y_tokens: got an empty batch of shape (5, 0, 2)"),
    "D differs": (dict(y_tokens=torch.randn(5, 6, 3)), ValueError, "y_tokens: got D = 3, expected 2, the D of x_tok"),
    "dtypes differ": (
        dict(y_tokens=Y_TOKENS.double()),
        TypeError,
        "y_tokens: got dtype torch.float64, expected torch.fl",
    ),
    "devices differ": (dict(y_tokens=Y_TOKENS.to("meta")), ValueError, "y_tokens: got device meta, expected cpu"),
    "mask a list": (dict(x_mask=[True]), TypeError, "x_mask: got list, expected a bool tensor of shape (4, 3)"),
    "mask of floats": (
        dict(x_mask=MASK.long() * 2),
        ValueError,
        "x_mask: got values from 2 to 2, expected",
    ),
    "mask shape": (dict(y_mask=MASK), ValueError, "y_mask: got shape (4, 3), expected a bool tensor of shape (5, 6)"),
    "mask device": (dict(x_mask=MASK.to("meta")), ValueError, "x_mask: got device meta, expected cpu"),
    "reduction": (dict(reduction="none"), ValueError, "reduction: got 'none', expected one of 'sum', 'mean'"),
    "direction": (dict(direction="row"), ValueError, "direction: got 'row', expected one of 'x', 'y', 'both'"),
    "budget": (dict(memory_budget=-1), ValueError, "memory_budget: got -1, expected at least 0 bytes"),
    "backend": (dict(backend="cuda"), ValueError, "backend: got 'cuda', expected one of 'auto', 'reference'"),
}


@pytest.mark.parametrize("name", MAX_SIM)
def test_max_sim(name: str) -> None:
    changes, error, message = MAX_SIM[name]
    with pytest.raises(error, match=re.escape(message)):
        max_sim(**{"x_tokens": X_TOKENS, "y_tokens": Y_TOKENS, **changes})


@pytest.mark.parametrize(
    "number", [np.float16(3), np.float32(3), np.float64(3), np.int64(3)], ids=lambda n: type(n).__name__
)
def test_numpy_s_scalars_are_numbers(number: Any) -> None:
    """None of them narrows the arithmetic: 1 / 3 would be off by 2e-4 in float16."""
    losses: list[Callable[[Any], torch.Tensor]] = [
        lambda s: clip_loss(X, X, s),
        lambda s: nt_xent_loss(X, X + 1, s, normalize=True),
        lambda s: siglip_loss(X, X, s, s),
        lambda s: supcon_loss(X, LONG // 2, s),
        lambda s: contrastive_stats(X, Y, s).row,
    ]
    for loss in losses:
        assert torch.equal(loss(number), loss(3.0))


@pytest.mark.parametrize("option", ["reduction", "memory_budget", "backend"])
def test_an_array_where_a_word_is_expected(option: str) -> None:
    """A comparison with the word would be made element by element."""
    with pytest.raises((TypeError, ValueError), match=rf"^{option}: got array"):
        clip_loss(X, X, 1.0, **{option: np.arange(6)})
