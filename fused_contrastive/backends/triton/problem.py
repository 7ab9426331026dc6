"""One problem as the kernels take it: features they can walk, the blocks of S, what is kept for the backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_contrastive.backends.triton import configs, device, storage
from fused_contrastive.backends.triton.tiles import GUIDE_K, Mask, Mode
from fused_contrastive.core.spec import StatsSpec


class Block(NamedTuple):
    """Rows and columns of S that one launch covers."""

    row0: int
    row1: int
    col0: int
    col1: int

    @property
    def rows(self) -> slice:
        return slice(self.row0, self.row1)

    @property
    def cols(self) -> slice:
        return slice(self.col0, self.col1)

    @property
    def height(self) -> int:
        return self.row1 - self.row0

    @property
    def width(self) -> int:
        return self.col1 - self.col0

    def tiles(self, c: configs.Config) -> tuple[int, int]:
        """Strips of tiles down, tiles across."""
        return -(-self.height // (c.block_m * c.strip)), -(-self.width // c.block_n)


def cuts(begin: int, end: int, step: int) -> list[tuple[int, int]]:
    """[begin, end) in nearly equal parts of at most ``step``, all but the last a multiple of the largest tile."""
    if begin == end:
        return []
    parts = -(-(end - begin) // step)
    each = -(-(end - begin) // (parts * configs.TILE)) * configs.TILE
    return [(i, min(i + each, end)) for i in range(begin, end, each)]


def blocks(m: int, n: int, kept_rows: int, height: int, width: int, upper: bool) -> Iterator[Block]:
    """Cuts S into rows of blocks; a block is kept as a whole or not at all.

    With ``upper``, blocks below the diagonal are left out.
    """
    for row0, row1 in (*cuts(0, kept_rows, height), *cuts(kept_rows, m, height)):
        for col0, col1 in cuts(0, n, width):
            if not upper or col1 > row0:
                yield Block(row0, row1, col0, col1)


def aligned(t: Tensor) -> Tensor:
    """Features whose rows begin at 16-byte boundaries, as wide loads and TMA need: the tensor itself, or a copy."""
    unit = 16 // t.itemsize
    if t.stride(1) == 1 and t.stride(0) >= t.shape[1] and t.stride(0) % unit == 0 and t.data_ptr() % 16 == 0:
        return t
    padded = t.new_empty(t.shape[0], -(-t.shape[1] // unit) * unit)[:, : t.shape[1]]
    return padded.copy_(t)


def tf32() -> bool:
    """Whether torch's own matrix products may round float32 to tf32 on a GPU."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # torch >= 2.9; there, asking in the old way raises after setting in the new
        return bool(matmul.fp32_precision == "tf32")
    return bool(matmul.allow_tf32)


def rounded_to_tf32(t: Tensor) -> Tensor:
    """Float32 to the nearest tf32, ties to even; inf and NaN stay.

    The matrix units truncate a mantissa to its first 10 bits, which would make all products too small.
    """
    bits = t.view(torch.int32)
    rounded = (bits + (0xFFF + ((bits >> 13) & 1))) & ~0x1FFF
    return torch.where(t.isfinite(), rounded.view(torch.float32), t)


def padded_guide(t: Tensor | None) -> Tensor | None:
    """A guide as the kernels multiply it: float32, with columns of zeros up to a multiple of GUIDE_K."""
    return None if t is None else torch.nn.functional.pad(t.float(), (0, -t.shape[1] % GUIDE_K.value))


def products_from(x: Tensor) -> configs.Source:
    """Where products come from.

    Float32 at full precision has no matrix units on NVIDIA: the vendor GEMM makes those products, block by block.
    """
    if x.dtype != torch.float32:
        return "half"
    return "tf32" if tf32() and not torch.version.hip else "gemm"


def multiplied(x: Tensor, y: Tensor, source: configs.Source, on: device.Device) -> tuple[Tensor, Tensor]:
    """Features as the kernels multiply them."""
    if on.interpreted:
        return aligned(x.float()), aligned(y.float())
    if source == "tf32":
        return aligned(rounded_to_tf32(x.contiguous())), aligned(rounded_to_tf32(y.contiguous()))
    return aligned(x), aligned(y)


class Prepared:
    """Arguments that all launches of one problem share."""

    def __init__(self, spec: StatsSpec, x: Tensor, y: Tensor, kept_buffer: Tensor | None = None) -> None:
        self.spec = spec
        self.device = device.of(x.device)
        self.m, self.n, self.d = x.shape[0], y.shape[0], x.shape[1]
        self.dtype, self.source = x.dtype, products_from(x)
        self.multiplied = multiplied(x, y, self.source, self.device)
        # The features of the vendor GEMM's products and of the positives.
        self.x, self.y = (aligned(x), aligned(y)) if self.source == "tf32" else self.multiplied
        self.half = self.source == "half"
        self.softplus = spec.statistic == "softplus"
        apart, self.added = spec.equal_ids == "apart", spec.equal_ids == "add"
        self.teacher = spec.statistic == "teacher"
        self.two = apart or self.added or self.teacher  # a statistic has two parts
        self.limited = spec.row_limit is not None or spec.col_limit is not None
        # The exact kernels, two exponentials per logit, take all tiles of a softmax.
        self.exact = not self.half or self.limited or (self.two and not self.softplus)
        # With limits the backward needs the forward's products bit for bit, to exclude the same pairs. A vendor's GEMM
        # does not promise them; the same tiles of the same code have them.
        self.by_vendor = self.source == "gemm" and not self.limited
        kept_rows = spec.kept_rows if self.n < storage.LONGEST_ROW and not (self.half and self.exact) else 0
        if kept_rows < self.m:  # blocks begin at multiples of the largest tile
            kept_rows -= kept_rows % configs.TILE
        self.kept_rows = kept_rows
        self.kept = storage.KeptRows(kept_buffer, kept_rows, self.n, exact=not self.half)
        one_bias = spec.col_bias is not None and spec.col_bias.dim() == 0  # SigLIP's
        tensors = {name: getattr(spec, name) for name in Mask._fields if name in StatsSpec._fields}
        for name in ("row_guide", "col_guide"):
            tensors[name] = padded_guide(tensors[name]) if self.limited or self.teacher else None
        contiguous: dict[str, Any] = {name: None if t is None else t.contiguous() for name, t in tensors.items()}
        self.mask = Mask(**contiguous)
        self.tma = self.device.tma and self.source != "gemm"
        precision = "tf32" if self.source == "tf32" else "ieee"
        equal_ids = "negate" if apart and self.softplus else spec.equal_ids
        ids = 1 if spec.row_ids is None or spec.row_ids.dim() == 1 else spec.row_ids.shape[1]
        # Three products of tf32 are as precise as a sum of float32 products, and take the matrix units.
        in_matrix_units = self.source != "gemm" and self.device.architecture.startswith("sm_")
        row_guide = self.mask.row_guide
        guide = (0, "ieee") if row_guide is None else (row_guide.shape[1], "tf32x3" if in_matrix_units else "ieee")
        units_of_log_2 = self.half and (self.softplus or not self.exact)
        self.mode = Mode(
            units_of_log_2, self.tma, precision, spec.exclude_self, spec.upper, equal_ids, one_bias, ids, spec.paired,
            *guide, self.teacher,
        )  # fmt: skip

    def start_counts(self) -> None:
        """Memory in which the kernels count the logits above the references, if there are any."""
        counts: dict[str, Tensor] = {}
        for name, reference in (("row", self.mask.row_reference), ("col", self.mask.col_reference)):
            if reference is not None:
                counts[f"{name}_above"] = torch.zeros_like(reference, dtype=torch.int32)
                counts[f"{name}_highest"] = torch.full_like(reference, -torch.inf)
        self.mask = self.mask._replace(**counts)

    def with_counts(self, statistic: Tensor, axis: int) -> Tensor:
        """(size,) statistic of the rows (axis 0) or columns (axis 1) -> (size, 3) with the counts, if there are any."""
        if not self.spec.is_ranked():
            return statistic
        mask = self.mask
        above, highest = ((mask.row_above, mask.row_highest), (mask.col_above, mask.col_highest))[axis]
        if above is None or highest is None or not len(statistic):
            return statistic.new_empty(0, 3)
        return torch.stack((statistic, above.to(statistic.dtype), highest.to(statistic.dtype)), dim=1)

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        x, y = self.multiplied
        return self.m, self.n, self.d, x.stride(0), y.stride(0)

    def features(self, c: configs.Config) -> tuple[Any, Any]:
        """x and y as a kernel of this configuration loads them."""
        x, y = self.multiplied
        if not self.tma:
            return x, y
        return (
            TensorDescriptor.from_tensor(x, [c.block_m, c.block_k]),
            TensorDescriptor.from_tensor(y, [c.block_n, c.block_k]),
        )

    def tile(self, matrix: storage.Matrix | None, c: configs.Config) -> tuple[Any, int]:
        """A block as the kernels of half-precision features load or store its tiles, and its stride."""
        if matrix is None:
            return None, 0
        if not self.tma:
            return matrix.whole, matrix.stride
        return TensorDescriptor.from_tensor(matrix.whole, [c.block_m, c.block_n]), matrix.stride

    def blocks(self, height: int, width: int) -> list[Block]:
        if self.spec.upper:  # smaller, so that less of the blocks on the diagonal is wasted
            height = width = min(height, width) // 2
        return list(blocks(self.m, self.n, self.kept_rows, height, width, self.spec.upper))

    def first_of_rows(self, b: Block) -> bool:
        """Whether this block is the first one of its rows."""
        return b.col0 <= b.row0 if self.spec.upper else b.col0 == 0

    def products(self, b: Block, out: Tensor) -> Tensor:
        """The vendor GEMM's products of a block, written to ``out`` (height, width)."""
        return torch.mm(self.x[b.rows], self.y[b.cols].T, out=out)


def largest(all_blocks: list[Block]) -> tuple[int, int]:
    """The largest height, and the largest width, of any of the blocks."""
    return max((b.height for b in all_blocks), default=0), max((b.width for b in all_blocks), default=0)
