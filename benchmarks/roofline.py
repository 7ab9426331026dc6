"""What the Triton backend's steps should take on a GPU, from its data sheet and counted work: a table in Markdown.

    python benchmarks/roofline.py                  # the table in docs/triton.md: an H200, bf16
    python benchmarks/roofline.py --l2 5.5         # another assumption

A prediction, to be held against `python -m fused_contrastive bench --suite gpu`; nothing here is measured. A tile's
program computes its products, then its exponentials and sums; with one program per SM the two do not overlap. So a
step takes, in clocks per logit,

    low     products                  + max(exponentials, instructions)      all loads and stores hidden
    high    max(products, L2 loads)   + exponentials + instructions + HBM    only the loads of the products hidden
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

from fused_contrastive.backends.triton.configs import CONFIGS, Kernel

SMS, CLOCK, EXP_PER_CLOCK, LANES = 132, 1.755e9, 16, 128  # per SM; an instruction takes LANES logits per clock
BYTES = 2  # of a bf16 number
# Per logit: exponentials, other instructions, bf16 numbers written to or read from HBM. Counted in the kernels.
STATISTICS, STATISTICS_KEEPING = (1, 7, 0), (1, 7.5, 1)  # scale, max, subtract, two sums, masks; keeping: store
GRADIENT, GRADIENT_KEPT = (1, 5.5, 1), (0, 4.5, 2)  # scale, subtract, add, two multiplications, store; kept: load
GEMMS = (2.0, 2.3)  # u: dx = G y and dy = G^T x; high, 15% below the rate of the large square product


class Gpu(NamedTuple):
    gemm: float  # FLOP/s of a large bf16 torch.mm
    l2: float  # bytes/s from L2 into the SMs
    hbm: float  # bytes/s


def step(gpu: Gpu, d: int, work: tuple[float, float, float], kernel: Kernel) -> tuple[float, float]:
    """(low, high) of one kernel over all of S, in u."""
    exponentials, instructions, moved = work
    per_sm = SMS * CLOCK
    u = 2 * d / (gpu.gemm / per_sm)  # clocks per logit
    products = loads = 0.0
    if kernel != "kept":
        config = CONFIGS["sm_90", "half", kernel]
        products = u
        loads = (1 / config.block_m + 1 / config.block_n) * d * BYTES / (gpu.l2 / per_sm)
    memory = moved * BYTES / (gpu.hbm / per_sm)
    exp_time, other_time = exponentials / EXP_PER_CLOCK, instructions / LANES
    low = max(products + max(exp_time, other_time), memory)
    return low / u, (max(products, loads) + exp_time + other_time + memory) / u


def predict(gpu: Gpu, d: int) -> dict[str, tuple[float, float]]:
    """(low, high) of each step and sum, in u."""
    forward, keeping = (step(gpu, d, work, "statistics") for work in (STATISTICS, STATISTICS_KEEPING))
    gradient, kept = step(gpu, d, GRADIENT, "gradient"), step(gpu, d, GRADIENT_KEPT, "kept")

    def total(*parts: tuple[float, float]) -> tuple[float, float]:
        return sum(low for low, _ in parts), sum(high for _, high in parts)

    return {
        "forward": forward, "G": gradient, "both, recompute": total(forward, gradient, GEMMS),
        "forward, keeping": keeping, "G from kept": kept, "both, kept": total(keeping, kept, GEMMS),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gemm", type=float, default=790, help="TFLOP/s of a large bf16 product (assumed: 790)")
    parser.add_argument("--l2", type=float, default=7.5, help="TB/s from L2 into the SMs (assumed: 7.5)")
    parser.add_argument(
        "--hbm", type=float, default=4.3, help="TB/s of HBM (assumed: 90%% of the 4.8 on the data sheet)"
    )
    options = parser.parse_args()
    gpu = Gpu(*(1e12 * value for value in (options.gemm, options.l2, options.hbm)))
    print(f"{options.gemm:.0f} TFLOP/s, L2 {options.l2} TB/s, HBM {options.hbm} TB/s; low - high, in u\n")
    dims = [256, 512, 768, 1024, 1152]
    print("| D |", " | ".join(predict(gpu, dims[0])), "|\n| ---: |" + " ---: |" * 6)
    for d in dims:
        print(f"| {d} |", " | ".join(f"{low:.2f} - {high:.2f}" for low, high in predict(gpu, d).values()), "|")


if __name__ == "__main__":
    main()
