"""Peak memory of one forward and backward, beyond inputs and gradients.

On a CPU it is how far the peak of resident memory rises (Linux), in a process of its own; on a GPU it is what torch's
allocator counts, in this process.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers  # noqa: F401  puts the libraries into the registry
from benchmarks.implementations import CannotRunError, Implementation, failure, load, named
from benchmarks.workloads import WORKLOADS, BenchProblem

ROOT = Path(__file__).parents[1]
PEAK = Path("/proc/self/clear_refs")  # writing to it resets the peak
WARM_UP = 64  # rows of the first call, which loads libraries and starts threads


def _resident(field: str) -> int:
    """VmRSS, resident bytes now, or VmHWM, their peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def rise(run: Callable[[], Any], device: str) -> tuple[int, Any]:
    """Bytes that the peak rises by during a call, and what it returns."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - start, result
    ctypes.CDLL(None).malloc_trim(0)  # otherwise the call could take freed memory, and the peak would not rise
    start = _resident("VmRSS")
    PEAK.write_text("5")
    result = run()
    return _resident("VmHWM") - start, result


def extra_bytes(implementation: Implementation, problem: BenchProblem) -> int:
    """A call's extra bytes, measured in this process, which on a CPU should have run nothing else."""
    work = WORKLOADS[problem.loss]
    loss = implementation.load(problem)

    def run(at: BenchProblem) -> int:
        leaves = list(work.inputs(at).values())
        x = leaves[0].detach().flatten(0, -2)
        torch.mm(x[:WARM_UP], x.T)  # the vendor's own buffers
        peak, found = rise(lambda: torch.autograd.grad(loss(*leaves), leaves, allow_unused=True), problem.device)
        return int(peak - sum(g.nbytes for g in found if g is not None))

    run(problem if implementation.compiled else replace(problem, n=min(WARM_UP, problem.n)))
    return run(problem)


def measure(implementation: Implementation, problem: BenchProblem) -> dict[str, Any]:
    """A row's "extra_bytes", or its "status". Raises: CannotRunError."""
    if problem.device == "cpu" and not os.access(PEAK, os.W_OK):
        raise CannotRunError(f"resident memory is measured by Linux's {PEAK}")
    load(implementation, problem)
    if problem.device != "cpu":
        return {"extra_bytes": extra_bytes(implementation, problem)}
    command = [sys.executable, "-m", "benchmarks.memory", json.dumps(asdict(problem)), implementation.name]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if ended.returncode < 0:
        return {"status": f"failed: ended by signal {-ended.returncode}, perhaps for want of memory"}
    if ended.returncode:
        last = ended.stderr.strip().splitlines()[-1:]
        return {"status": f"failed: exited with {ended.returncode}, and said {''.join(last)!r}"}
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])  # libraries may have printed before
    return found


def main(problem: BenchProblem, name: str) -> dict[str, Any]:
    """What ``measure`` runs in a process of its own."""
    try:
        return {"extra_bytes": extra_bytes(named(problem.loss, name), problem)}
    except Exception as error:
        return {"status": failure(error)}


if __name__ == "__main__":
    print(json.dumps(main(BenchProblem(**json.loads(sys.argv[1])), sys.argv[2])))
