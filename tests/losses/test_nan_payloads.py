"""NaN of every kind (quiet, signalling, both signs, many payloads): exactly the results that depend on one are NaN.

Read as an integer, a NaN's bits lie beyond those of every number. The kernels' integer arithmetic must not overflow
there, which `make sanitize` checks: it runs this file too.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fused_contrastive import contrastive_stats, info_nce_loss, max_sim, self_stats, sigmoid_stats

MANTISSA = {torch.float16: 10, torch.bfloat16: 7, torch.float32: 23, torch.float64: 52}
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
M, N, D, AT = 35, 17, 5, 16  # AT: the row with a NaN


def nans(dtype: torch.dtype) -> list[Tensor]:
    """The lowest and highest payloads, quiet and signalling, and those to which 100 can, and cannot, be added."""
    bits, mantissa = 8 * dtype.itemsize, MANTISSA[dtype]
    infinity = (1 << (bits - 1)) - (1 << mantissa)
    full, quiet = (1 << mantissa) - 1, 1 << (mantissa - 1)
    payloads = {1, 3, quiet - 1, quiet, quiet + 1, full - 110, full - 90, full - 1, full}
    found = [infinity + payload - sign for payload in sorted(payloads) if payload > 0 for sign in (0, 1 << (bits - 1))]
    return list(torch.tensor(found, dtype=INTEGERS[dtype.itemsize]).view(dtype))


def statistics(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Each primitive's statistics; and dx, from kept products and from a loss that forms gradients in its forward."""
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    targets = torch.arange(M) % N
    pos, row, col = contrastive_stats(x, y, 3.0, targets=targets, backend="cpp")
    (dx,) = torch.autograd.grad(row.sum(), x)
    one_walk = info_nce_loss(x, y, logit_scale=3.0, targets=targets, memory_budget=0, backend="cpp")
    (of_one_walk,) = torch.autograd.grad(one_walk, x)
    return {
        "pos": pos,
        "row": row,
        "col": col,
        "dx": dx.sum(1),
        "dx in one walk": of_one_walk.sum(1),
        "self": self_stats(x, 3.0, backend="cpp"),
        "sigmoid": sigmoid_stats(x, y, 3.0, targets=targets, backend="cpp").row,
        "max_sim": max_sim(x[:, None], y[:, None], backend="cpp")[:, 3],
    }


@pytest.mark.every_level
@pytest.mark.usefixtures("threads")
def test_a_nan_of_any_bits(seed: int) -> None:
    torch.set_num_threads(1)  # little work, many times
    only, every = torch.arange(M) == AT, torch.ones(M, dtype=torch.bool)
    expected = {"col": torch.arange(N) != AT % N, "self": every}  # a column leaves out its positive
    for dtype in MANTISSA:
        torch.manual_seed(seed)
        x, y = torch.randn(M, D).to(dtype), torch.randn(N, D).to(dtype)
        for name, found in statistics(x, y).items():
            assert found.isfinite().all(), f"{dtype}, {name} without a NaN: {found}"
        for nan in nans(dtype):
            x[AT, 2] = nan
            for name, found in statistics(x, y).items():
                what = f"{dtype}, a NaN {nan.view(INTEGERS[dtype.itemsize]).item():#x}, {name}: {found}"
                assert found.isnan().equal(expected.get(name, only)), what
                assert (found.isnan() | found.isfinite()).all(), what
