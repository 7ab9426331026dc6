"""``memory_budget``: bytes of logits the forward may keep, turned into a number of rows.

Kept rows save the backward one of its three products. The number follows from shapes and the device's total memory
alone, never from what is free now, so that a traced graph stays valid.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fused_contrastive.core import compiler

# "auto" keeps at most total memory divided by this: a GPU's memory holds the model and its activations as well.
AUTO_SHARE = {"cuda": 64}
AUTO_SHARE_ELSEWHERE = 16


# Keeping products takes a GPU's bandwidth, and saves time that grows with D. From here on, says the model of
# benchmarks/roofline.py, half-precision products are kept faster than made again.
LEAST_D = 160

WORTH_A_SECTION = 64  # rows: what a floor that fades comes to is a multiple of this


class Most(NamedTuple):
    """What "auto" keeps at most on a CPU: a part of all rows, 1 / ``part`` (0: none), or these bytes if that is more.

    A step is then faster than eager in a tenth of its memory. All of the products would save it another sixth of its
    time, for thrice the memory.
    """

    part: int
    floor: int
    fades: bool = False  # the floor counts for less, the more rows there are


PRODUCTS = Most(5, 12 << 20)
# Of bfloat16 features: eager's own matrices are half as large, the products kept are float32 all the same, and
# multiplying again costs half as much.
BFLOAT16_PRODUCTS = Most(0, 4 << 20, fades=True)
TRIANGLE = Most(64, 2 << 20)  # of what is kept of a triangle, half is never computed
EVERYTHING = Most(1, 0)


def products_of(dtype: torch.dtype) -> Most:
    """What "auto" keeps of the products of features of this dtype."""
    return BFLOAT16_PRODUCTS if dtype == torch.bfloat16 else PRODUCTS


Kept = tuple[tuple[int, ...], torch.dtype]  # shape and dtype of what is kept
Layout = Callable[[int], Kept]  # what so many rows take


@functools.cache
def _host_memory() -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's own limit
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return total


@compiler.constant
def total_memory(device_type: str, index: int | None) -> int:
    """Total memory of a device in bytes."""
    if device_type == "cuda":
        return int(torch.cuda.get_device_properties(index).total_memory)
    return _host_memory()


def products_to_keep(
    x: Tensor, columns: int, kept: Callable[..., Kept], budget: int | str, most: Most | None = None
) -> int:
    """How many rows of the products of x (M, D) with so many columns a backend keeps, whose ``kept`` is given."""
    if budget == "auto" and x.device.type == "cuda" and x.dtype.itemsize == 2 and x.shape[1] < LEAST_D:
        return 0
    layout = functools.partial(kept, n=columns, dtype=x.dtype)
    return rows_to_keep(x.shape[0], layout, budget, x.device, most or products_of(x.dtype))


def rows_to_keep(m: int, layout: Layout, budget: int | str, device: torch.device, most: Most = EVERYTHING) -> int:
    """How many of m rows fit the budget; none where the backend keeps none."""
    shape, dtype = layout(64)
    of_64 = math.prod(shape) * dtype.itemsize
    if not of_64:
        return 0
    if not isinstance(budget, str):
        return min(m, 64 * budget // of_64)
    total = total_memory(device.type, device.index)
    rows: int = 64 * (total // AUTO_SHARE.get(device.type, AUTO_SHARE_ELSEWHERE)) // of_64
    if device.type == "cpu":  # without a guard on the shapes where they are symbols
        floor = 64 * most.floor // of_64
        if most.fades:
            floor = torch.sym_min(floor, floor * floor // torch.sym_max(m, 1)) // WORTH_A_SECTION * WORTH_A_SECTION
        rows = torch.sym_min(rows, torch.sym_max(floor, m // most.part if most.part else 0))
        rows = torch.sym_min(m, rows)
    else:
        rows = min(m, rows)
    return rows
