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

import torch

# "auto" keeps at most total memory divided by this: a GPU's memory holds the model and its activations as well.
AUTO_SHARE = {"cuda": 64}
AUTO_SHARE_ELSEWHERE = 16
# On a CPU, of products no more than this share of them, or this many bytes where that is more: with it a step takes a
# tenth of eager's memory and is faster than it; all of them would make it a fifth faster than that, for thrice the memory.
AUTO_PRODUCTS = 1 / 5
AUTO_SMALL = 12 << 20

Layout = Callable[[int], tuple[tuple[int, ...], torch.dtype]]  # number of rows -> shape and dtype of what is kept


@functools.cache
def _host_memory() -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's own limit
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return total


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def total_memory(device_type: str, index: int | None) -> int:
    """Total memory of a device in bytes."""
    if device_type == "cuda":
        return int(torch.cuda.get_device_properties(index).total_memory)
    return _host_memory()


def rows_to_keep(m: int, layout: Layout, budget: int | str, device: torch.device, products: bool = True) -> int:
    """How many of m rows fit the budget; none where the backend keeps none. ``products``: what is kept are floats of S."""
    shape, dtype = layout(64)
    of_64 = math.prod(shape) * dtype.itemsize
    if not of_64:
        return 0
    size = budget
    if isinstance(size, str):
        size = total_memory(device.type, device.index) // AUTO_SHARE.get(device.type, AUTO_SHARE_ELSEWHERE)
        if products and device.type == "cpu":
            size = min(size, max(AUTO_SMALL, int(AUTO_PRODUCTS * m * of_64 / 64)))
    return min(m, 64 * size // of_64)
