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
from torch import Tensor

from fused_contrastive.core import compiler

# "auto" keeps at most total memory divided by this: a GPU's memory holds the model and its activations as well.
AUTO_SHARE = {"cuda": 64}
AUTO_SHARE_ELSEWHERE = 16

# Keeping products takes a GPU's bandwidth, and saves time that grows with D. From this D on, by the model of
# tools/roofline.py, half-precision products are faster to keep than to compute again.
LEAST_D = 160

CPU_BYTES = 64 << 20  # on a CPU, "auto" keeps at most this many bytes of products and of copies of features

Kept = tuple[tuple[int, ...], torch.dtype]  # shape and dtype of what is kept


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


def products_to_keep(x: Tensor, columns: int, kept: Callable[..., Kept], budget: int | str, copied: int = 0) -> int:
    """How many rows of the products of x (M, D) with ``columns`` columns fit the budget.

    ``kept`` is the backend's; ``copied`` are the bytes of copies of features, which "auto" counts on a CPU.
    """
    if budget == "auto":
        if x.device.type == "cuda" and x.dtype.itemsize == 2 and x.shape[1] < LEAST_D:
            return 0
        if x.device.type == "cpu":
            budget = max(0, CPU_BYTES - copied)
    return rows_to_keep(x.shape[0], kept(64, columns, x.dtype), budget, x.device)


def rows_to_keep(m: int, of_64_rows: Kept, budget: int | str, device: torch.device) -> int:
    """How many of m rows fit the budget; 0 if the backend keeps no products."""
    shape, dtype = of_64_rows
    of_64 = math.prod(shape) * dtype.itemsize
    if not of_64:
        return 0
    if isinstance(budget, str):
        total = total_memory(device.type, device.index)
        budget = total // AUTO_SHARE.get(device.type, AUTO_SHARE_ELSEWHERE)
    fit = 64 * budget // of_64
    if device.type == "cpu" and not (type(m) is int and type(fit) is int):
        return torch.sym_min(m, fit)  # type: ignore[no-any-return]  # it puts no guard on symbolic shapes
    return min(m, fit)
