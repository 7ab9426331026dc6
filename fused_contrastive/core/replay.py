"""What a forward depends on besides its inputs and weights, so that a second one can repeat the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor


class RandomState:
    """The state now of torch's default random generators, of the CPU and of every accelerator in use."""

    def __init__(self) -> None:
        self._states: list[tuple[Callable[[Any], None], Any]] = [(torch.set_rng_state, torch.get_rng_state())]
        for module in (torch.cuda, torch.xpu):
            if module.is_initialized():
                self._states.append((module.set_rng_state_all, module.get_rng_state_all()))
        if torch.backends.mps.is_available():
            self._states.append((torch.mps.set_rng_state, torch.mps.get_rng_state()))

    def restore(self) -> None:
        for set_state, state in self._states:
            set_state(state)


class Buffers:
    """The values of a module's buffers now, such as running statistics, which a forward may change."""

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        self._values = [(buffer, buffer.detach().clone()) for buffer in buffers]

    def restore(self) -> None:
        for buffer, value in self._values:
            buffer.data.copy_(value)  # .data: a graph that has saved the buffer stays valid, as after a forward


class Autocast:
    """The state of autocast now, for the CPU and the accelerator."""

    def __init__(self) -> None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        devices = ["cpu", *([accelerator.type] if accelerator is not None else [])]
        self._options = [
            (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
            for device in devices
            if torch.amp.is_autocast_available(device)
        ]
        self._cache = torch.is_autocast_cache_enabled()

    @contextmanager
    def again(self) -> Iterator[None]:
        with ExitStack() as stack:
            for device, dtype, enabled in self._options:
                stack.enter_context(torch.autocast(device, dtype, enabled, self._cache))
            yield
