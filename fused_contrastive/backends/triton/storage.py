"""What the forward keeps for the backward, in one tensor whose shape follows from rows, columns and dtype alone.

Half-precision features keep exponentials relative to their tile's maximum: bfloat16, 2 bytes each, and one float32
reference per CELL x CELL of them. Float32 features keep the products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CELL = 32  # as in tiles.py
LONGEST_ROW = 2**23  # from it on, offsets in a tile of kept rows would pass 2^31: nothing is kept


def layout(rows: int, n: int, features: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of the tensor that keeps ``rows`` rows of an (M, n) problem: of too long ones, none."""
    if n >= LONGEST_ROW:
        rows = 0
    if features == torch.float32:
        return (rows, n), torch.float32
    return (_even(rows * n) + 2 * _cells(rows) * _cells(n),), torch.bfloat16


def _even(size: int) -> int:
    return (size + 1) // 2 * 2


def _cells(size: int) -> int:
    return (size + CELL - 1) // CELL


class View(NamedTuple):
    """A kept block as the kernels take it; None where nothing is kept."""

    given: Tensor | None  # products (height, width)
    exponentials: Tensor | None  # (height, width)
    references: Tensor | None  # (cells of all kept rows, cells of N)


class Kept:
    """Views of the tensor."""

    def __init__(self, buffer: Tensor, rows: int, n: int, exact: bool) -> None:
        self.rows, self.exact = rows, exact
        self.values = buffer[:rows] if exact else buffer[: rows * n].view(rows, n)
        if not exact:
            self.references = buffer[_even(rows * n) :].view(torch.float32).view(_cells(rows), _cells(n))

    def block(self, rows: slice, cols: slice) -> View:
        if rows.stop > self.rows:
            return View(None, None, None)
        values = self.values[rows, cols]
        return View(values, None, None) if self.exact else View(None, values, self.references)
