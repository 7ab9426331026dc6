"""Matrices that hold blocks of S or G, and what the forward keeps for the backward.

Half-precision features keep exponentials relative to their tile's reference: bfloat16, 2 bytes each, and one float32
reference per CELL x CELL of them. Float32 features keep the products. Shapes follow from rows, columns and dtype alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CELL = 32  # as in tiles.py
WIDEST = 256  # columns of the widest tile: rows of a matrix are padded to it, so that no tile's columns need a mask
LONGEST_ROW = 2**23 - WIDEST  # from it on, offsets in a tile would pass 2^31: nothing is kept


def padded(columns: int) -> int:
    return (columns + WIDEST - 1) // WIDEST * WIDEST


def layout(rows: int, n: int, features: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of the tensor that keeps ``rows`` rows of an (M, n) problem: of too long ones, none."""
    if n >= LONGEST_ROW:
        rows = 0
    if features == torch.float32:
        return (rows, padded(n)), torch.float32
    return (rows * padded(n) + 2 * _cells(rows) * _cells(padded(n)),), torch.bfloat16


def _cells(size: int) -> int:
    return (size + CELL - 1) // CELL


class Matrix(NamedTuple):
    """A block as kernels take it: rows that lie ``stride`` apart, and reach to a multiple of every tile's columns."""

    whole: Tensor  # (height, padded width)
    width: int

    @property
    def stride(self) -> int:
        return self.whole.stride(0)

    @property
    def values(self) -> Tensor:
        """(height, width)"""
        return self.whole[:, : self.width]


class Kept(NamedTuple):
    """A kept block; None where nothing is kept."""

    products: Matrix | None = None
    exponentials: Matrix | None = None
    references: Tensor | None = None  # (cells down, cells across), float32


class KeptRows:
    """Blocks of the tensor that ``layout`` describes."""

    def __init__(self, buffer: Tensor, rows: int, n: int, exact: bool) -> None:
        self.rows, self.exact = rows, exact
        size = rows * padded(n)
        self.values = buffer[:rows] if exact else buffer[:size].view(rows, padded(n))
        if not exact:
            down, across = _cells(rows), _cells(padded(n))
            self.references = buffer[size : size + 2 * down * across].view(torch.float32).view(down, across)

    def block(self, rows: slice, cols: slice) -> Kept:
        """``rows`` and ``cols`` begin at multiples of a tile."""
        if rows.stop > self.rows:
            return Kept()
        width = cols.stop - cols.start
        matrix = Matrix(self.values[rows, cols.start : cols.start + padded(width)], width)
        if self.exact:
            return Kept(products=matrix)
        return Kept(exponentials=matrix, references=self.references[rows.start // CELL :, cols.start // CELL :])


def scratch(like: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """Memory for blocks of up to these sizes."""
    return like.new_empty(height, padded(width), dtype=dtype)


def block_of(room: Tensor, height: int, width: int) -> Matrix:
    return Matrix(room[:height, : padded(width)], width)
