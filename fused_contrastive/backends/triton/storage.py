"""Matrices that hold blocks of S or G, and what the forward keeps for the backward.

Half-precision features keep exponentials relative to their tile's reference: bfloat16, 2 bytes each, and one float32
reference per CELL x CELL of them. Float32 features keep the products. Shapes follow from rows, columns and dtype alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

CELL = 32  # as in tiles.py
WIDEST = 256  # columns of the widest tile: rows of a matrix are padded to it, so that no tile's columns need a mask
LONGEST_ROW = 2**23 - WIDEST  # for longer rows nothing is kept: offsets in a tile could pass 2^31


def padded(columns: int) -> int:
    return (columns + WIDEST - 1) // WIDEST * WIDEST


def layout(rows: int, n: int, features: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of the tensor that keeps ``rows`` rows of an (M, n) problem, or none if n >= LONGEST_ROW."""
    if n >= LONGEST_ROW:
        rows = 0
    if features == torch.float32:
        return (rows, padded(n)), torch.float32
    return (rows * padded(n) + 2 * _cells(rows) * _cells(padded(n)),), torch.bfloat16


def _cells(size: int) -> int:
    return (size + CELL - 1) // CELL


class Matrix(NamedTuple):
    """A block as kernels take it: rows lie ``stride`` apart and are padded to a multiple of every tile's columns."""

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
    """Blocks of the tensor that ``layout`` describes, which may have room for more rows. Without it none are kept."""

    def __init__(self, buffer: Tensor | None, rows: int, n: int, exact: bool) -> None:
        self.rows, self.exact = rows if buffer is not None else 0, exact
        self.unwritten = [] if buffer is None else [buffer]
        if buffer is None or not rows:
            return
        if exact:
            self.values = buffer[:rows]
            self.unwritten = [buffer[rows:], self.values[:, n:]]
            return
        size = rows * padded(n)
        cells = _cells(rows), _cells(padded(n))
        begin = buffer.numel() - 2 * math.prod(cells)  # where the references begin, behind all values
        self.values = buffer[:size].view(rows, padded(n))
        self.references = buffer[begin:].view(torch.float32).view(cells)
        self.unwritten = [buffer[size:begin], self.values[:, n:], self.references[:, _cells(n) :]]

    def clear_padding(self) -> None:
        """Zeros what kernels may not write, so that the tensor, which an operator returns, is the same each time."""
        for t in self.unwritten:
            if t.numel():
                t.zero_()

    def block(self, rows: slice, cols: slice) -> Kept:
        """What is kept of the block ``rows`` x ``cols``; both begin at multiples of a tile."""
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
