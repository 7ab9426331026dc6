"""Gumbel noise that is a function of a seed and a place in a matrix, so that blocks and threads do not change it.

Adding it to logits and taking the k largest draws k columns from their softmax without replacement (Kool et al. 2019,
"Stochastic Beams and Where to Find Them", arXiv:1903.06059). Each row has a stream of SplitMix64 (Steele et al. 2014,
"Fast Splittable Pseudorandom Number Generators") of its own, whose start is an element of the seed's stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEP = -0x61C8864680B583EB  # 2^64 over the golden ratio, as int64, whose products and sums wrap round
FACTORS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # of the mixing function, Stafford's variant 13
ELEMENTS = 1 << 16  # of a matrix, mixed at a time: some temporaries of this size fit a core's cache
GPU_ELEMENTS = 1 << 24


def _shifted(z: Tensor, bits: int) -> Tensor:
    """A logical shift to the right; torch's copies the sign."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _half_mixed(z: Tensor) -> Tensor:
    """SplitMix64's mixing function without its last step, in place."""
    for bits, factor in zip((30, 27), FACTORS, strict=True):
        z.bitwise_xor_(_shifted(z, bits)).mul_(factor)
    return z


def row_keys(seed: Tensor, count: int) -> Tensor:
    """(count,) int64, where the streams of rows 0, 1, ... start; the seed is () int64."""
    z = _half_mixed(seed + STEP * torch.arange(1, count + 1, device=seed.device))
    return z.bitwise_xor_(_shifted(z, 31))


def add_gumbel(scores: Tensor, keys: Tensor, first_column: int) -> None:
    """Adds Gumbel noise to a block of scores (m, n), in place, given the keys (m,) of its rows.

    With u uniform it is -log(-log(1 - u)). Of 63 bits of u, the ones after the leading zeros are rounded to the dtype,
    so that large noise, which decides, is fine-grained; u is less than 1, so that all noise is above -inf.
    """
    m, n = scores.shape
    steps = STEP * torch.arange(first_column + 1, first_column + n + 1, device=scores.device)
    unit = (1 - torch.finfo(scores.dtype).eps / 2) * 2.0**-63
    height = max(1, (ELEMENTS if scores.device.type == "cpu" else GPU_ELEMENTS) // n)
    for first in range(0, m, height):
        rows = slice(first, first + height)
        z = _half_mixed(keys[rows, None] + steps)
        bits = z.bitwise_xor_(z >> 31).bitwise_and_((1 << 63) - 1)
        scores[rows] -= bits.to(scores.dtype).mul_(-unit).log1p_().neg_().log_()
