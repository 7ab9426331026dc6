"""One default configuration per architecture, source of the products and kernel: tile sizes, warps, stages."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from fused_contrastive.backends.triton.device import Device

Source = Literal["half", "tf32", "gemm"]
"""How the kernels get products: their own from half precision or, as tf32, from float32; or from a vendor GEMM."""


class Config(NamedTuple):
    """How a kernel is cut into tiles."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group: int = 8  # rows of tiles in a band, for reuse in L2
    strip: int = 1  # statistics: tiles that a program walks, down one column of tiles
    split: int = 0  # sums: columns are done in 2^split groups if slopes are stored, else in half as many
    fold: int = 0  # statistics: warps down a tile, if their column sums stay apart to the strip's end; else 0

    @property
    def options(self) -> dict[str, Any]:
        """The options as Triton takes them. Fusion is requested because Triton 3.10 no longer does it by default."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}

    @property
    def exact(self) -> Config:
        """For the exact kernels beside this one, which take more registers: lower tiles, strips of the same height."""
        block_m = 64 if self.block_m > 64 else self.block_m // 2
        return self._replace(block_m=block_m, strip=self.strip * self.block_m // block_m, fold=0)


Kernel = Literal["statistics", "sums", "gradient", "kept"]
"""Statistics of a softmax; sums of softplus; G of either; G from what was kept."""

# Blocks of S begin at multiples of this, and no tile is higher or wider. So in rows, and in columns, tiles of two
# configurations are nested or disjoint.
TILE = 256

# By architecture: "sm_80" is compute capability 8.x, and so on. docs/triton-configurations.md has what they compile to.
CONFIGS: dict[tuple[str, Source, Kernel], Config] = {
    ("sm_80", "half", "statistics"): Config(128, 128, 64, warps=8, stages=3, strip=8, fold=4),
    ("sm_80", "half", "sums"): Config(128, 128, 64, warps=8, stages=3),
    ("sm_80", "half", "gradient"): Config(128, 128, 64, warps=8, stages=3),
    ("sm_80", "half", "kept"): Config(128, 128, 64, warps=8, stages=1),
    ("sm_80", "tf32", "statistics"): Config(128, 64, 32, warps=8, stages=3, strip=4),
    ("sm_80", "tf32", "sums"): Config(128, 64, 32, warps=8, stages=3),
    ("sm_80", "tf32", "gradient"): Config(128, 64, 32, warps=8, stages=3),
    ("sm_90", "half", "statistics"): Config(256, 128, 64, warps=8, stages=3, strip=8, fold=8),
    ("sm_90", "half", "sums"): Config(256, 128, 64, warps=8, stages=3, split=2),
    ("sm_90", "half", "gradient"): Config(128, 256, 64, warps=8, stages=3),
    ("sm_90", "half", "kept"): Config(128, 128, 64, warps=4, stages=1),
    ("sm_90", "tf32", "statistics"): Config(128, 64, 32, warps=8, stages=3, strip=4),
    ("sm_90", "tf32", "sums"): Config(128, 128, 32, warps=8, stages=3),
    ("sm_90", "tf32", "gradient"): Config(128, 128, 32, warps=8, stages=3),
    ("sm_100", "half", "statistics"): Config(128, 128, 64, warps=8, stages=3, strip=8),
    ("sm_100", "half", "sums"): Config(128, 64, 64, warps=8, stages=3),
    ("sm_100", "half", "gradient"): Config(128, 64, 64, warps=8, stages=3),
    ("sm_100", "half", "kept"): Config(128, 128, 64, warps=4, stages=1),
    ("sm_100", "tf32", "statistics"): Config(128, 64, 32, warps=8, stages=3, strip=4),
    ("sm_100", "tf32", "sums"): Config(128, 64, 32, warps=8, stages=3),
    ("sm_100", "tf32", "gradient"): Config(128, 64, 32, warps=8, stages=3),
    ("gfx942", "half", "statistics"): Config(128, 128, 64, warps=8, stages=2, strip=8),
    ("gfx942", "half", "sums"): Config(128, 128, 64, warps=8, stages=2),
    ("gfx942", "half", "gradient"): Config(128, 128, 64, warps=8, stages=2),
    ("gfx942", "half", "kept"): Config(128, 128, 64, warps=8, stages=1),
    # Small, so that small problems have several tiles; of different shapes, as a GPU's are.
    ("interpreter", "half", "statistics"): Config(64, 32, 32, warps=4, stages=1, group=2, strip=2, fold=2),
    ("interpreter", "half", "sums"): Config(64, 32, 32, warps=4, stages=1, group=2, split=1),
    ("interpreter", "half", "gradient"): Config(32, 64, 32, warps=4, stages=1, group=2),
    ("interpreter", "half", "kept"): Config(32, 32, 32, warps=4, stages=1, group=2),
    ("interpreter", "tf32", "statistics"): Config(32, 64, 32, warps=4, stages=1, group=2, strip=2),
    ("interpreter", "tf32", "sums"): Config(64, 64, 32, warps=4, stages=1, group=2),
    ("interpreter", "tf32", "gradient"): Config(64, 64, 32, warps=4, stages=1, group=2),
}
for _architecture in ("sm_80", "sm_90", "sm_100", "gfx942", "interpreter"):  # without matrix units these do not differ
    CONFIGS[_architecture, "gemm", "statistics"] = Config(64, 64, 32, warps=4, stages=1, strip=4)
    CONFIGS[_architecture, "gemm", "sums"] = Config(64, 64, 32, warps=4, stages=1)
    CONFIGS[_architecture, "gemm", "gradient"] = Config(64, 64, 32, warps=4, stages=1)


def default(device: Device, source: Source, kernel: Kernel) -> Config:
    """The table's configuration for a device."""
    return CONFIGS[device.architecture, source, kernel]
