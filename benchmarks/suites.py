"""The suites: which problems each one times, and for which problems it measures memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.compare import FEWEST
from benchmarks.groups import SIZES
from benchmarks.matryoshka import MATRYOSHKA
from benchmarks.rules import RULES
from benchmarks.workloads import BenchProblem


class Suite(NamedTuple):
    """Problems with the seconds that each is timed for, and problems whose memory is measured."""

    timed: list[tuple[BenchProblem, float]]
    memory: list[BenchProblem]
    only: tuple[str, ...] = ()  # implementations; empty: all
    fewest: int = FEWEST  # rounds of each timed problem, even if they take longer than its seconds

    @property
    def problems(self) -> list[BenchProblem]:
        return [*(problem for problem, _ in self.timed), *self.memory]


def _each(
    losses: Sequence[str], sizes: Sequence[int], d: int, dtypes: Sequence[str] = ("fp32",), device: str = "cpu"
) -> list[BenchProblem]:
    return [BenchProblem(loss, n, d, dtype, device) for loss in losses for dtype in dtypes for n in sizes]


def _seconds(problems: list[BenchProblem], seconds: float) -> list[tuple[BenchProblem, float]]:
    return [(problem, seconds) for problem in problems]


MATRIX = ("clip", "info_nce", "nt_xent", "siglip", "supcon")
GPU_SIZES = (4096, 8192, 16384, 32768, 65536, 131072)


def quick() -> Suite:
    """Every loss at one size, CLIP at three."""
    timed = _seconds(_each(["clip"], [8, 128, 1024], 512), 5) + _seconds(_each(MATRIX[1:], [1024], 512), 5)
    return Suite(timed, _each(["clip"], [1024, 2048, 4096], 256))


def cpu() -> Suite:
    """What `make bench` runs: the README's table."""
    timed = [
        *_seconds(_each(["clip"], [8, 128, 512], 512), 2),
        *_seconds(_each(["clip"], [1024, 2048], 512), 8),
        *_seconds(_each(["clip"], [4096, 8192], 512), 60),
        *_seconds(_each(MATRIX[1:], [256], 512), 2),
        *_seconds(_each(MATRIX[1:], [1024], 512), 6),
        *_seconds(_each(MATRIX[1:], [4096], 512), 20),
        *_seconds(_each(["clip"], [1024, 4096], 512, ["bf16"]), 20),
        *_seconds(_each(["max_sim"], [256], 128), 10),
        *_seconds(_each(["max_sim_own"], [32], 128), 5),
    ]
    weighed = [*_each(["clip"], [1024, 4096, 8192], 512), *_each(MATRIX[1:], [4096], 512)]
    weighed += _each(["clip"], [4096], 512, ["bf16"])
    return Suite(timed, [*weighed, BenchProblem("max_sim", 256, 128)])


def small() -> Suite:
    """Every loss where the calls cost more than the products; ours and eager."""
    return Suite(_seconds(_each(MATRIX, [8, 32, 128, 256], 512), 3), [], ("ours", "eager"), fewest=50)


def memory() -> Suite:
    """Memory alone, up to sizes where one N x N matrix takes 4 GB."""
    sizes = [1024, 2048, 4096, 8192, 16384, 32768]
    return Suite([], [*_each(MATRIX, sizes, 256), *_each(["max_sim"], [64, 128, 256, 512], 128)])


def rules() -> Suite:
    """CLIP with each rule and without it in turns, and a teacher; ours and eager."""
    only = ("ours", "ours, without the rule", "eager")
    return Suite(_seconds(_each([*RULES], [4096], 512), 20), _each([*RULES], [16384], 256), only)


def groups() -> Suite:
    """CLIP in many small groups, in fewer middle ones, and in some large ones."""
    problems = [BenchProblem(f"groups of {size}", size * count, 128) for size, count in SIZES.items()]
    return Suite(_seconds(problems, 5), problems)


def matryoshka() -> Suite:
    """Nested prefixes in one call, in a call for each, and eager in turns."""
    only = ("ours", "ours, memory_budget=0", "ours, loop over prefixes", "eager")
    return Suite(_seconds(_each([*MATRYOSHKA], [4096], 512), 20), _each([*MATRYOSHKA], [4096], 512), only)


def gpu() -> Suite:
    """Every dtype on a GPU, at the feature sizes of CLIP's and SigLIP's models."""
    dims, dtypes = (256, 512, 768, 1024, 1152), ("bf16", "fp16", "fp32")
    clip = [problem for d in dims for problem in _each(["clip"], GPU_SIZES, d, dtypes, "cuda")]
    others = _each(MATRIX[1:], GPU_SIZES[:4], 512, ["bf16", "fp32"], "cuda")
    tokens = _each(["max_sim"], [256, 512], 128, ["bf16", "fp32"], "cuda")
    return Suite(_seconds([*clip, *others, *tokens], 0.5), _each(MATRIX, GPU_SIZES[:4], 512, ["bf16"], "cuda"))


def gpu_table() -> Suite:
    """The table of `gpu_day.py`, which takes about a minute and a half: ours and eager in bf16."""
    losses, only = ("clip", "siglip", "info_nce"), ("ours", "ours, memory_budget=0", "ours, everything kept", "eager")
    sizes = [(n, d) for n in (8192, 32768, 65536) for d in (512, 768, 1024)]
    problems = [problem for n, d in sizes for problem in _each(losses, [n], d, ["bf16"], "cuda")]
    return Suite(_seconds(problems, 0.5), [problem for problem in problems if problem.loss == "clip"], only)


def million() -> Suite:
    """One batch whose N x N matrix no GPU could hold."""
    problems = [BenchProblem("clip", 1_048_576, 512, "bf16", "cuda")]
    return Suite(_seconds(problems, 0), problems, only=("ours, memory_budget=0",), fewest=2)


def toy() -> Suite:
    """Sizes for Triton's interpreter (TRITON_INTERPRET=1), which runs the GPU kernels where there is no GPU."""
    timed = _seconds(_each(["clip"], [65], 33, ["bf16"]), 0) + _seconds(_each(["nt_xent", "siglip"], [64], 20), 0)
    return Suite(timed, [BenchProblem("clip", 65, 33)], fewest=2)


SUITES = {
    "quick": quick, "cpu": cpu, "small": small, "rules": rules, "groups": groups, "matryoshka": matryoshka, "gpu": gpu,
    "gpu-table": gpu_table, "memory": memory, "million": million, "toy": toy,
}  # fmt: skip
