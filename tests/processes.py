"""Separate processes for tests. A server that has imported torch forks them, so that none has to import it again.

The server never uses threads and does not import fused_contrastive, which therefore does not see a forked process.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing

METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
context = multiprocessing.get_context(METHOD)
if METHOD == "forkserver":
    context.set_forkserver_preload(["torch", "numpy", "pytest"])
HANGS = 300  # seconds, also for a very busy machine


def spawn(work: Callable[..., None], args: tuple[Any, ...], nprocs: int) -> None:
    """Runs ``work(rank, *args)`` in ``nprocs`` processes, like torch.multiprocessing.spawn; kills them if they hang."""
    started = torch.multiprocessing.start_processes(
        _in_environment, (dict(os.environ), work, args), nprocs, join=False, start_method=METHOD
    )
    end = time.monotonic() + HANGS
    while not started.join(timeout=max(0.0, end - time.monotonic())):  # False at the timeout
        if time.monotonic() > end:
            for process in started.processes:
                process.kill()
            raise TimeoutError(f"{work.__name__}: processes did not end")


def _in_environment(rank: int, environment: dict[str, str], work: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.clear()  # it is the server's, from its start
    os.environ.update(environment)
    work(rank, *args)


class Process:
    """A process like ``python -c code``, with string arguments; its output goes to files."""

    def __init__(self, code: str, *arguments: str, **environment: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name, name) for name in ("out", "err")]
        for file in self._files:
            file.touch()
        args = ({**os.environ, **environment}, self._files, code, arguments)
        self._process = context.Process(target=_execute, args=args)
        self._process.start()

    def interrupt(self) -> None:
        """Sends SIGINT, like Ctrl-C."""
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGINT)

    @property
    def stdout(self) -> str:
        return self._files[0].read_text()

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    def wait(self) -> subprocess.CompletedProcess[str]:
        self._process.join(HANGS)
        hung = self.running
        self._process.kill()
        self._process.join()
        assert not hung, f"hung; {self.stdout}{self._files[1].read_text()}"
        return subprocess.CompletedProcess([], self._process.exitcode, self.stdout, self._files[1].read_text())


def _execute(environment: dict[str, str], files: list[Path], code: str, arguments: tuple[str, ...]) -> None:
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    sys.modules["__main__"] = main = types.ModuleType("__main__")  # a pool's processes look up functions there
    exec(compile(code, "<a test's process>", "exec"), main.__dict__)


def run(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return Process(code, *arguments, **environment).wait()
