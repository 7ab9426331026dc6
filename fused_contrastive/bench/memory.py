"""Peak memory of one forward and backward above inputs and gradients, in a process of its own.

On a CPU it is how far the peak of resident memory rises (Linux), on a GPU what torch's allocator counts.
"""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import os
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from fused_contrastive.bench import peers  # noqa: F401  puts the libraries into the registry
from fused_contrastive.bench.implementations import Implementation, failure, named
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


@functools.cache
def _starter() -> BaseContext:
    """Starts processes with torch imported, which would take most of a measurement, and nothing run.

    Not with this package imported: it limits itself to one thread in a forked process. They have the environment of the
    first one. Where there is no such way of starting processes (Windows), each imports torch by itself.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["torch._dynamo"])
    return forks


def _measure(answer: Connection, output: str, name: str, problem: Problem) -> None:
    """In the new process. What libraries print goes to the file ``output``: it is no part of the progress shown."""
    with open(output, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    try:
        answer.send(extra_bytes(named(problem.loss, name), problem))
    except Exception as error:
        answer.send(failure(error))


def in_own_process(implementation: Implementation, problem: Problem) -> int | str:
    """Bytes, or what went wrong."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    with TemporaryDirectory() as folder, ours:
        output = Path(folder) / "output"
        arguments = (theirs, str(output), implementation.name, problem)
        process = _starter().Process(target=_measure, args=arguments)  # type: ignore[attr-defined]
        process.start()
        theirs.close()
        try:
            answer: int | str = ours.recv()
        except EOFError:  # ended without a word
            process.join()
            return f"failed: {_end(process.exitcode, output)}"
        process.join()
    return answer


def _end(code: int, output: Path) -> str:
    if code < 0:
        return f"ended by signal {-code}, perhaps for want of memory"
    said = output.read_text(errors="replace").strip() if output.exists() else ""
    return f"exited with {code}, and said {said.splitlines()[-1]!r}" if said else f"exited with {code} in silence"
