"""One default configuration per architecture, source of the products and kernel: tile sizes, warps, stages."""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import torch

Source = Literal["half", "tf32", "given"]
"""How the kernels get products: their own from half precision or, as tf32, from float32; or from a vendor GEMM."""


class Config(NamedTuple):
    """How a kernel is cut into tiles."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group: int = 8  # rows of tiles in a band, for reuse in L2

    @property
    def options(self) -> dict[str, Any]:
        return {
            "BM": self.block_m,
            "BN": self.block_n,
            "BK": self.block_k,
            "GROUP": self.group,
            "num_warps": self.warps,
            "num_stages": self.stages,
            "enable_fp_fusion": True,
        }


Kernel = Literal["statistics", "sums", "gradient", "kept"]
"""Statistics of a softmax; sums of softplus, which take more registers; G of either; G from what was kept."""

# Blocks of S begin at its multiples; no tile is larger, so each lies in one of another configuration or apart.
TILE = 256

# By architecture: "sm_80" is compute capability 8.x, and so on. docs/triton-configurations.md has what they compile to.
CONFIGS: dict[tuple[str, Source, Kernel], Config] = {
    ("sm_80", "half", "statistics"): Config(128, 128, 64, warps=8, stages=3),
    ("sm_80", "half", "sums"): Config(128, 64, 64, warps=8, stages=3),
    ("sm_80", "half", "gradient"): Config(128, 128, 64, warps=8, stages=3),
    ("sm_80", "half", "kept"): Config(128, 128, 64, warps=8, stages=3),
    ("sm_80", "tf32", "statistics"): Config(128, 128, 32, warps=8, stages=3),
    ("sm_80", "tf32", "sums"): Config(128, 64, 32, warps=8, stages=3),
    ("sm_80", "tf32", "gradient"): Config(128, 128, 32, warps=8, stages=3),
    ("sm_80", "given", "statistics"): Config(64, 64, 32, warps=4, stages=1),
    ("sm_80", "given", "sums"): Config(64, 64, 32, warps=4, stages=1),
    ("sm_80", "given", "gradient"): Config(64, 64, 32, warps=4, stages=1),
    ("sm_90", "half", "statistics"): Config(256, 128, 64, warps=8, stages=3),
    ("sm_90", "half", "sums"): Config(128, 64, 64, warps=8, stages=3),
    ("sm_90", "half", "gradient"): Config(128, 256, 64, warps=8, stages=3),
    ("sm_90", "half", "kept"): Config(128, 128, 64, warps=8, stages=3),
    ("sm_90", "tf32", "statistics"): Config(128, 128, 32, warps=8, stages=3),
    ("sm_90", "tf32", "sums"): Config(128, 128, 32, warps=8, stages=3),
    ("sm_90", "tf32", "gradient"): Config(128, 128, 32, warps=8, stages=3),
    ("sm_90", "given", "statistics"): Config(64, 64, 32, warps=4, stages=1),
    ("sm_90", "given", "sums"): Config(64, 64, 32, warps=4, stages=1),
    ("sm_90", "given", "gradient"): Config(64, 64, 32, warps=4, stages=1),
    ("sm_100", "half", "statistics"): Config(128, 128, 64, warps=8, stages=3),
    ("sm_100", "half", "sums"): Config(128, 64, 64, warps=8, stages=3),
    ("sm_100", "half", "gradient"): Config(128, 64, 64, warps=8, stages=3),
    ("sm_100", "half", "kept"): Config(128, 64, 64, warps=8, stages=3),
    ("sm_100", "tf32", "statistics"): Config(128, 128, 32, warps=8, stages=3),
    ("sm_100", "tf32", "sums"): Config(128, 64, 32, warps=8, stages=3),
    ("sm_100", "tf32", "gradient"): Config(128, 64, 32, warps=8, stages=3),
    ("sm_100", "given", "statistics"): Config(64, 64, 32, warps=4, stages=1),
    ("sm_100", "given", "sums"): Config(64, 64, 32, warps=4, stages=1),
    ("sm_100", "given", "gradient"): Config(64, 64, 32, warps=4, stages=1),
    ("gfx942", "half", "statistics"): Config(128, 128, 64, warps=8, stages=2),
    ("gfx942", "half", "sums"): Config(128, 128, 64, warps=8, stages=2),
    ("gfx942", "half", "gradient"): Config(128, 128, 64, warps=8, stages=2),
    ("gfx942", "half", "kept"): Config(128, 128, 64, warps=8, stages=2),
    ("gfx942", "given", "statistics"): Config(64, 64, 32, warps=4, stages=1),
    ("gfx942", "given", "sums"): Config(64, 64, 32, warps=4, stages=1),
    ("gfx942", "given", "gradient"): Config(64, 64, 32, warps=4, stages=1),
    # Small, so that small problems have several tiles; of different shapes, as a GPU's are.
    ("interpreter", "half", "statistics"): Config(64, 64, 32, warps=4, stages=1, group=2),
    ("interpreter", "half", "sums"): Config(64, 32, 32, warps=4, stages=1, group=2),
    ("interpreter", "half", "gradient"): Config(32, 128, 32, warps=4, stages=1, group=2),
    ("interpreter", "half", "kept"): Config(64, 32, 32, warps=4, stages=1, group=2),
    ("interpreter", "tf32", "statistics"): Config(32, 128, 32, warps=4, stages=1, group=2),
    ("interpreter", "tf32", "sums"): Config(64, 64, 32, warps=4, stages=1, group=2),
    ("interpreter", "tf32", "gradient"): Config(64, 64, 32, warps=4, stages=1, group=2),
    ("interpreter", "given", "statistics"): Config(64, 64, 32, warps=4, stages=1, group=2),
    ("interpreter", "given", "sums"): Config(32, 64, 32, warps=4, stages=1, group=2),
    ("interpreter", "given", "gradient"): Config(64, 64, 32, warps=4, stages=1, group=2),
}


@functools.cache
def architecture(device: torch.device) -> str:
    """The rows of the table for a device.

    Raises: RuntimeError for an NVIDIA GPU older than compute capability 8.0.
    """
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        name = torch.cuda.get_device_name(device)
        raise RuntimeError(
            f"backend 'triton' cannot run on {name} (compute capability {major}.{minor}): it needs 8.0 or later. "
            "backend='reference' runs there."
        )
    if major >= 12:  # no tcgen05, and the shared memory of 8.9
        return "sm_80"
    return "sm_100" if major >= 10 else f"sm_{major}0"


@functools.cache
def has_tma(device: torch.device) -> bool:
    """Whether to load by NVIDIA's tensor copy engine: compute capabilities 9 to 11."""
    return architecture(device) in ("sm_90", "sm_100")


@functools.cache
def default(device: torch.device, source: Source, kernel: Kernel) -> Config:
    """The table's configuration for a device."""
    return CONFIGS[architecture(device), source, kernel]
