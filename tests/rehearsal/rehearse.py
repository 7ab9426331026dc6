"""One architecture, in a process whose libcuda is the stand-in: runs the cases and watches Triton's launches."""

from __future__ import annotations

import argparse
import ctypes
import importlib
import pkgutil
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import cases
import triton
from triton.backends.nvidia.compiler import CUDABackend
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

import fused_contrastive.backends.triton as backend
import machine_code
from fused_contrastive.backends.triton import device

MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148}
BLOCK = 512  # largest rows and columns of a block of S, so that the cases have several blocks


class Counters(ctypes.Structure):
    """The counters of stand_in.c, of its type."""

    _fields_ = [(name, ctypes.c_int64) for name in ("launches", "descriptors", "illegal")]


COUNTERS = Counters.in_dll(ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL), "stand_in")


class IllegalError(Exception):
    """A launch or descriptor is illegal for a reason that the stand-in cannot see."""


def illegal(reason: str) -> None:
    COUNTERS.illegal += 1
    raise IllegalError(f"illegal: {reason}")


class Driver(CudaDriver):
    """Triton's driver, which here does not ask torch for the GPU."""

    def __init__(self, arch: str) -> None:
        super().__init__()
        capability = divmod(int(arch.removeprefix("sm_")), 10)
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0
        self.get_device_capability = lambda device: capability
        self.set_current_device = lambda device: None


def stand_in_for(arch: str) -> None:
    """Makes the backend treat CPU tensors as a GPU's, and Triton the stand-in as a GPU."""
    triton.runtime.driver.set_active(Driver(arch))
    of_gpu = device.Device("cpu", f"stand-in for {arch}", arch, arch != "sm_80", MULTIPROCESSORS[arch])
    device.stand_in = lambda _: of_gpu
    for found in pkgutil.iter_modules(backend.__path__, f"{backend.__name__}."):
        module = importlib.import_module(found.name)
        for name, value in list(vars(module).items()):
            if name.endswith("_BLOCK") and isinstance(value, tuple):
                setattr(module, name, (BLOCK, BLOCK))


class Watch:
    """Watches every launch and descriptor that Triton makes from now on."""

    def __init__(self) -> None:
        self.kernels: dict[str, Any] = {}  # compiled, by their hash
        self.launch, self.describe = JITFunction.run, TensorDescriptor.__post_init__
        JITFunction.run = lambda *args, **options: self._run(*args, **options)
        TensorDescriptor.__post_init__ = lambda descriptor: self._described(descriptor)

    def _run(self, function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        before = COUNTERS.launches
        kernel = self.launch(function, *args, grid=grid, warmup=warmup, **options)
        self.kernels[kernel.hash] = kernel
        if COUNTERS.launches != before + 1:  # Triton silently skips a grid of 0 or of 2^31 programs
            illegal(f"launch of {function.__name__}, grid {grid}: it did not take place")
        return kernel

    def _described(self, descriptor: Any) -> None:
        self.describe(descriptor)
        base = descriptor.base
        sizes = zip(descriptor.shape, descriptor.strides, strict=True)
        end = base.storage_offset() + 1 + sum((size - 1) * stride for size, stride in sizes)
        there = base.untyped_storage().nbytes() // base.itemsize
        if end > there:
            illegal(f"descriptor of {tuple(descriptor.shape)} ends {end - there} elements after its memory")


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Runs the cases of one process; returns the number of launches, and the failures."""
    (arch,) = given.arch
    stand_in_for(arch)
    watch = Watch()
    choose = cases.quick if given.quick else cases.every if given.every else cases.some
    chosen = [case for case in choose(arch, given.job) if given.only in str(case)]
    failures = []
    for plant in given.plant or [None]:
        with planted(plant, watch) if plant else nullcontext():
            named = [(f"{arch}, {case}", failure(case)) for case in chosen]
        failures += [f"{name}{f', planted {plant}' if plant else ''}: {reason}" for name, reason in named if reason]
    found = {name: getattr(COUNTERS, name) for name, _ in Counters._fields_}
    kernels = [machine_code.count(kernel, arch) for kernel in watch.kernels.values()] if given.json else []
    return {"calls": len(chosen), **found, "failures": failures, "kernels": kernels}


def failure(case: cases.Case) -> str | None:
    print(case, file=sys.stderr, flush=True)  # shows the culprit if the process dies
    before = COUNTERS.illegal
    try:
        case.run()
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "fused_contrastive" in f.filename]
        where = ", ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[-3:])
        return f"{type(error).__name__}: {str(error)[:500]} ({where})"
    return None if COUNTERS.illegal == before else "illegal, and nothing raised"


@contextmanager
def planted(what: str, watch: Watch) -> Iterator[None]:
    """Makes launches or descriptors illegal, to show that this is noticed."""
    for kernel in watch.kernels.values():  # so that each is compiled again
        kernel.src.fn.device_caches.clear()
    launch, describe, pack = JITFunction.run, TensorDescriptor.__post_init__, CUDABackend.pack_metadata

    def misaligned(descriptor: Any) -> None:
        describe(descriptor)
        descriptor.base = descriptor.base[:, 1:]

    def too_long(descriptor: Any) -> None:
        descriptor.shape = (descriptor.shape[0] + 1000, *descriptor.shape[1:])
        describe(descriptor)

    if what == "grid":
        JITFunction.run = lambda *args, grid, **options: launch(*args, grid=(0, *grid[1:]), **options)
    elif what == "shared":
        CUDABackend.pack_metadata = lambda self, metadata: pack(self, metadata._replace(shared=1 << 18))
    else:
        TensorDescriptor.__post_init__ = {"descriptor": misaligned, "memory": too_long}[what]
    try:
        yield
    finally:
        JITFunction.run, TensorDescriptor.__post_init__, CUDABackend.pack_metadata = launch, describe, pack
