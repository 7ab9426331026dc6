"""Statistics of parts of S, what they add up to over the whole matrix, and the kernel that adds them up."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_contrastive.backends.triton.tiles import LN_2, finite, power


class Partials(NamedTuple):
    """The log-sum-exp of each row or column of a part of S: maximum + log(sum), in the logits' units; or plain sums."""

    maxima: Tensor  # (parts, length) float32; any reference, -inf where all pairs are excluded, 0 for plain sums
    sums: Tensor  # (parts, length) float32


class WeightedPartials(NamedTuple):
    """Partials with a third vector: its own type, as Triton 3.4 cannot compare a tuple that has a None with None."""

    maxima: Tensor
    sums: Tensor
    weighted: Tensor  # (parts, length) float32: a teacher's sums, each of its terms times our logit


AnyPartials = Partials | WeightedPartials


@triton.jit
def store_partials(partials, part, length, i, maximum, total, inside, weighted=None):
    where = part.to(tl.int64) * length + i
    tl.store(partials.maxima + where, maximum, mask=inside)
    tl.store(partials.sums + where, total, mask=inside)
    if weighted is not None:
        tl.store(partials.weighted + where, weighted, mask=inside)


@triton.jit
def _merge_one(
    parts_of, totals, parts, length, known, first, part_width, MODE: tl.constexpr, PLAIN: tl.constexpr,
    UPPER: tl.constexpr, PARTS: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * LENGTH + tl.arange(0, LENGTH)
    top = tl.load(totals.maxima + i, mask=i < known, other=float("-inf"))
    total = tl.load(totals.sums + i, mask=i < known, other=0.0)
    if totals.weighted is not None:
        total_weighted = tl.load(totals.weighted + i, mask=i < known, other=0.0)
    for part0 in range(0, parts, PARTS):
        p = part0 + tl.arange(0, PARTS)
        inside = (p < parts)[:, None] & (i < length)[None, :]
        if UPPER:  # row i has nothing in parts that end at or before the diagonal
            inside &= ((p + 1) * part_width - 1)[:, None] > (first + i)[None, :]
        where = p.to(tl.int64)[:, None] * length + i[None, :]
        tops = tl.load(parts_of.maxima + where, mask=inside, other=float("-inf"))
        sums = tl.load(parts_of.sums + where, mask=inside, other=0.0)
        higher = tl.maximum(top, tl.max(tops, axis=0))
        # The factor may underflow, so it is applied in two halves: with HEADROOM, a sum counts beside one whose
        # reference is 150 binary orders higher.
        half = power((tops - finite(higher)[None, :]) * 0.5, MODE)
        added = tl.sum((sums * half * half).to(tl.float64), axis=0)
        if totals.weighted is not None:
            weighted = tl.load(parts_of.weighted + where, mask=inside, other=0.0)
            added_weighted = tl.sum((weighted * half * half).to(tl.float64), axis=0)
        half = power((top - finite(higher)) * 0.5, MODE).to(tl.float64)
        total = total * half * half + added
        if totals.weighted is not None:
            total_weighted = total_weighted * half * half + added_weighted
        top = higher
    tl.store(totals.maxima + i, top, mask=i < length)
    tl.store(totals.sums + i, total, mask=i < length)
    if totals.weighted is not None:
        tl.store(totals.weighted + i, total_weighted, mask=i < length)
    high = top.to(tl.float64)
    if PLAIN:
        log = total * LN_2 if MODE.half else total
    else:
        log = (high + tl.log2(total)) * LN_2 if MODE.half else high + tl.log(total)
    tl.store(totals.value + i, log, mask=i < length)


class Totals(NamedTuple):
    """What the blocks so far add up to, in one direction of the whole matrix."""

    maxima: Tensor  # (length,) float32
    sums: Tensor  # (length,) float64
    value: Tensor  # (length,) float64: maximum + log(sum)
    weighted: Tensor | None = None  # (length,) float64, as in Partials


@triton.jit(do_not_specialize=["parts_m", "parts_n", "height", "width", "known_height", "known_width", "first"])
def merge(
    row_parts, row_totals, col_parts, col_totals, parts_m, parts_n, height, width, known_height, known_width, first,
    MODE: tl.constexpr, PLAIN: tl.constexpr, PART_WIDTH: tl.constexpr, PARTS: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    """Adds a block's Partials to the Totals, in order.

    Axis 1 of the grid is the direction: 0 rows, 1 columns; None where it is not asked. known_* is 0 for a direction's
    first block, whose totals hold nothing yet, and its length after. PLAIN: the maxima are 0 and the values are the
    sums. Sums and values are float64: next to a maximum of 1000, float32 would round log(sum) to 6e-5.

    With ``upper`` the parts of rows hold nothing below the diagonal: a part is PART_WIDTH columns wide, and the first
    row is ``first`` columns after the block's first.
    """
    if tl.program_id(1) == 0:
        if row_parts is not None:
            _merge_one(
                row_parts, row_totals, parts_n, height, known_height, first, PART_WIDTH, MODE, PLAIN, MODE.upper,
                PARTS, LENGTH,
            )  # fmt: skip
    elif col_parts is not None:  # every part of columns is filled: a strip without tiles writes -inf and 0
        _merge_one(col_parts, col_totals, parts_m, width, known_width, 0, 0, MODE, PLAIN, False, PARTS, LENGTH)


class Direction:
    """Memory for the totals of one direction and for partial statistics of a block; none if it is not needed.

    ``related`` is the same for the related pairs, if they are reduced apart or added up (``two``); or for a teacher's
    logits, with sums of our logits that are ``weighted`` by it.
    """

    def __init__(self, asked: bool, size: int, like: Tensor, two: bool = False, weighted: bool = False) -> None:
        self.related = Direction(asked, size, like, weighted=weighted) if two else None
        self.value = like.new_empty(size if asked else 0, dtype=torch.float64)
        self.asked = asked
        self.sums = torch.empty_like(self.value)
        self.weighted = torch.empty_like(self.value) if weighted and not two else None
        if asked:
            self.maxima = like.new_empty(size, dtype=torch.float32)

    def partials(self, parts: int, length: int) -> AnyPartials | None:
        if not self.asked:
            return None
        kind = Partials if self.weighted is None else WeightedPartials
        return kind(*(self.maxima.new_empty(parts, length) for _ in kind._fields))

    def partials_of_both(self, parts: int, length: int) -> list[AnyPartials | None]:
        return [None if d is None else d.partials(parts, length) for d in (self, self.related)]

    def result(self) -> Tensor:
        if (other := self.related) is None:
            return self.value
        if other.weighted is None:
            return torch.stack((self.value, other.value), dim=1)
        mean = other.weighted / other.sums.masked_fill(other.sums == 0, 1)  # 0 where all pairs are excluded
        return torch.stack((self.value, mean, other.value), dim=1)

    def totals(self, part: slice) -> Totals | None:
        if not self.asked:
            return None
        weighted = None if self.weighted is None else self.weighted[part]
        return Totals(self.maxima[part], self.sums[part], self.value[part], weighted)
