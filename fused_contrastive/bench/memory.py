"""Peak memory of one forward and backward above inputs and gradients, in a process of its own.

On a CPU it is how far the peak of resident memory rises (Linux), on a GPU what torch's allocator counts.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from fused_contrastive.bench import peers  # noqa: F401  puts the libraries into the registry
from fused_contrastive.bench.implementations import Implementation, named
from fused_contrastive.bench.workloads import WORKLOADS, Problem

WARM_UP = 64  # rows of the first call: it loads libraries and starts threads


def resident(field: str) -> int:
    """VmRSS, resident bytes now, or VmHWM, their peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status: resident memory is measured on Linux")


def cannot_measure(device: str) -> str | None:
    """Why not, on this machine."""
    peak = Path("/proc/self/clear_refs")
    return None if device != "cpu" or os.access(peak, os.W_OK) else f"resident memory is measured by Linux's {peak}"


def extra_bytes(implementation: Implementation, problem: Problem) -> int:
    """In this process, which should have run nothing else."""
    work = WORKLOADS[problem.loss]
    loss = implementation.load(problem)

    def run(at: Problem) -> int:
        leaves = work.inputs(at)
        x = leaves["x"].detach().flatten(0, -2)
        torch.mm(x[:WARM_UP], x.T)  # the vendor's own buffers
        start = _reset(problem.device)
        found = torch.autograd.grad(loss(*leaves.values()), list(leaves.values()), allow_unused=True)
        peak = _peak(problem.device)
        return peak - start - sum(g.numel() * g.element_size() for g in found if g is not None)

    run(problem if implementation.compiled else replace(problem, n=min(WARM_UP, problem.n)))
    return run(problem)


def _reset(device: str) -> int:
    """Bytes in use; the peak starts anew."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    ctypes.CDLL(None).malloc_trim(0)  # nothing freed is left for the loss to take without being seen
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    return before


def _peak(device: str) -> int:
    if device == "cuda":
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated())
    return resident("VmHWM")


def in_own_process(implementation: Implementation, problem: Problem) -> int | str:
    """Bytes, or what went wrong."""
    command = [sys.executable, "-m", __spec__.name, implementation.name, json.dumps(asdict(problem))]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode < 0:
        return f"failed: ended by signal {-result.returncode}, perhaps for want of memory"
    if result.returncode:
        return f"failed: {(result.stderr.strip() or 'no message').splitlines()[-1]}"
    return int(result.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description="One measurement, as JSON; python -m fused_contrastive bench calls it")
    parser.add_argument("implementation")
    parser.add_argument("problem", type=json.loads)
    options = parser.parse_args()
    problem = Problem(**options.problem)
    print(extra_bytes(named(problem.loss, options.implementation), problem))


if __name__ == "__main__":
    main()
