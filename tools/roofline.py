"""What the Triton backend's steps should take on a GPU: a model of one tile, from counted instructions. Markdown.

    python tools/roofline.py                  # the table in docs/triton.md: an H200, bf16
    python tools/roofline.py --gemm 700       # another assumption

Nothing here is measured: it is a prediction, to be compared with `python benchmarks/gpu_day.py`. Times are in u, the
time of one N x N x D product by the vendor's GEMM. A program computes a tile's
products, and then issues the instructions of its logits while the matrix units wait: one program fits on an SM, so the
two do not overlap. Loads of features and stores of tiles are taken to be hidden behind them, unless HBM is what limits.
Instructions are read from docs/triton-configurations.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).parents[1] / "docs/triton-configurations.md"
SMS, CLOCK = 132, 1.755e9
LANES, EXPONENTIALS = 128, 16  # of an SM, per clock: threads that it issues for, results of exp2
BETWEEN = 3.0  # instructions per logit between a tile and the next one's products: 309 to 342 were counted for 128
DIMS = (256, 512, 768, 1024)
GEMM_LOSS = 1.1  # dx = G y and dy = G^T x against a large square product
KERNELS = {  # exponentials per logit, bytes per logit that HBM moves
    "strip_statistics": (1, 0), "strip_statistics, keeping": (1, 2), "gradient": (1, 2), "gradient_of_kept": (0, 4),
    "sigmoid_statistics": (1, 0), "sigmoid_statistics, keeping": (2, 2),
}  # fmt: skip


class Gpu(NamedTuple):
    gemm: float  # FLOP/s of a large bf16 torch.mm
    hbm: float  # bytes/s


def instructions() -> dict[str, float]:
    """Instructions per logit of sm_90's kernels of half-precision features, without options."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.read_text().splitlines() if "|" in line]
    names = next(row for row in rows if row[0] == "arch")
    table = [dict(zip(names, row, strict=True)) for row in rows]
    return {
        row["kernel"]: float(row["per logit"])
        for row in table
        if (row["arch"], row["source"], row["options"]) == ("sm_90", "half", "none") and row["kernel"] in KERNELS
    }


def kernel(gpu: Gpu, d: int, name: str, counts: dict[str, float], hidden: bool = False) -> float:
    """A kernel's time for all of S, in u. ``hidden``: as if products, instructions, exponentials and HBM overlapped."""
    per_sm = SMS * CLOCK
    u = 2 * d / (gpu.gemm / per_sm)  # clocks per logit, as all below
    exponentials, moved = KERNELS[name]
    products = 0.0 if name == "gradient_of_kept" else u
    memory = moved / (gpu.hbm / per_sm)
    issued = counts[name] + (BETWEEN if products else 0)
    if hidden:
        return max(products, exponentials / EXPONENTIALS, issued / LANES, memory) / u
    return max(products + exponentials / EXPONENTIALS + issued / LANES, memory) / u


def predict(gpu: Gpu, d: int, counts: dict[str, float], hidden: bool = False) -> dict[str, float]:
    """The time of each kernel and step, in u."""
    one = {name: kernel(gpu, d, name, counts, hidden) for name in KERNELS}
    gemms = 2.0 if hidden else 2 * GEMM_LOSS
    return {
        "forward": one["strip_statistics"],
        "G": one["gradient"],
        "step, made again": one["strip_statistics"] + one["gradient"] + gemms,
        "forward, keeping": one["strip_statistics, keeping"],
        "G from kept": one["gradient_of_kept"],
        "step, kept": one["strip_statistics, keeping"] + one["gradient_of_kept"] + gemms,
        "SigLIP": one["sigmoid_statistics, keeping"] + gemms,
    }


def kept_from(gpu: Gpu, counts: dict[str, float]) -> int:
    """The least D, a multiple of 16, from which keeping is predicted to be faster."""
    for d in range(16, 4096, 16):
        found = predict(gpu, d, counts)
        if found["step, kept"] < found["step, made again"]:
            return d
    raise ValueError("keeping is never predicted to be faster")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gemm", type=float, default=790, help="TFLOP/s of a large bf16 product (assumed: 790)")
    parser.add_argument(
        "--hbm", type=float, default=4.3, help="TB/s of HBM (assumed: 90%% of the 4.8 on the data sheet)"
    )
    options = parser.parse_args()
    gpu, counts = Gpu(1e12 * options.gemm, 1e12 * options.hbm), instructions()
    print(f"{options.gemm:.0f} TFLOP/s, HBM {options.hbm} TB/s; in u, in brackets if everything overlapped\n")
    print("| D |", " | ".join(predict(gpu, DIMS[0], counts)), "|\n| ---: |" + " ---: |" * 7)
    for d in DIMS:
        pairs = zip(predict(gpu, d, counts).values(), predict(gpu, d, counts, hidden=True).values(), strict=True)
        print(f"| {d} |", " | ".join(f"{value:.2f} ({ideal:.2f})" for value, ideal in pairs), "|")
    print(f"\nKeeping is predicted to be faster from D = {kept_from(gpu, counts)} on.")


if __name__ == "__main__":
    main()
