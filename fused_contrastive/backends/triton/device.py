"""The properties of a device that the backend needs.

They are looked up in one place, so that a rehearsal (tests/rehearsal) can stand in for a GPU.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

# Whether Triton's interpreter runs the kernels, on CPU tensors: settled on import, as Triton settles it.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")


class Device(NamedTuple):
    """Properties of the device that holds the features."""

    type: str  # of the tensors
    name: str
    architecture: str  # a row of configs.CONFIGS
    tma: bool  # it has NVIDIA's tensor memory accelerator: compute capabilities 9 to 11
    multiprocessors: int

    @property
    def interpreted(self) -> bool:
        """Whether Triton's interpreter runs the kernels.

        It multiplies bfloat16 as if the bits were integers, so features become float32.
        """
        return self.architecture == "interpreter"


_INTERPRETER = Device("cpu", "interpreter", "interpreter", False, 1)


def of_cuda(device: torch.device) -> Device:
    """The properties of a GPU.

    Raises: RuntimeError for an NVIDIA GPU older than compute capability 8.0.
    """
    properties = torch.cuda.get_device_properties(device)
    name, multiprocessors = properties.name, properties.multi_processor_count
    if torch.version.hip:
        return Device("cuda", name, "gfx942", False, multiprocessors)
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise RuntimeError(
            f"backend 'triton' cannot run on {name} (compute capability {major}.{minor}): it needs 8.0 or later. "
            "backend='reference' runs there."
        )
    if major >= 12:  # no tcgen05, and the shared memory of 8.9
        return Device("cuda", name, "sm_80", False, multiprocessors)
    return Device("cuda", name, "sm_100" if major >= 10 else f"sm_{major}0", major >= 9, multiprocessors)


# Set by a rehearsal, which answers for a GPU that is not there.
stand_in: Callable[[torch.device], Device] | None = None


@functools.cache
def of(device: torch.device) -> Device:
    """The properties of a device that this backend supports."""
    if stand_in is not None:
        return stand_in(device)
    return _INTERPRETER if device.type == "cpu" else of_cuda(device)


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the one that kernels are launched on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
