"""Whether a call is plain eager: nothing traces, transforms or intercepts it, and its tensors have memory to read.

A backend's kernels read and write memory directly, which a tracer, transform or mode cannot see. Where one is active,
calls go through the registered operator, which it can. The check runs several times a call, so it has to be cheap.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _disable_current_modes

# Bound once, because looking up each of these names costs as much as calling it.
_is_compiling = torch.compiler.is_compiling
_transforms_active = torch._C._are_functorch_transforms_active  # torch.func and torch.vmap
_dispatch_modes = torch._C._len_torch_dispatch_stack  # TorchDispatchMode: FakeTensorMode, make_fx, FlopCounterMode
_function_mode_enabled = torch._C._is_torch_function_mode_enabled
_jit_trace = torch._C._get_tracing_state  # torch.jit.is_tracing() takes ten times as long

# The types of most arguments: looking one up in a set is faster than isinstance.
_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter, type(None), bool, int, float, str))

NO_FORWARD_MODE = (
    "fused_contrastive: forward-mode differentiation (torch.func.jvp, jacfwd, hessian, torch.autograd.forward_ad) is "
    "not supported, expected reverse mode: torch.func.grad, vjp or jacrev, or torch.autograd.grad"
)


def is_plain(*values: Any) -> bool:
    """Whether nothing but eager mode is active, and no tensor among ``values`` is of a subclass with its own dispatch.

    Raises:
        RuntimeError: ``torch.jit.trace`` is recording, and would record uninitialised memory; or a tensor carries a
            tangent of ``torch.autograd.forward_ad``, which would be lost.
    """
    if _is_compiling():
        return False
    if _jit_trace() is not None:
        raise RuntimeError(
            "fused_contrastive: torch.jit.trace (and torch.onnx.export with dynamo=False) cannot record this function, "
            "expected torch.export.export or torch.compile"
        )
    if _transforms_active():
        return False
    if forward_ad._current_level >= 0:
        _refuse_tangents(values)
    if _dispatch_modes() or (_function_mode_enabled() and not _only_default_device()):
        return False
    for value in values:  # noqa: SIM110 - all() takes a generator, which costs more than the loop
        if type(value) not in _PLAIN_TYPES and isinstance(value, Tensor):
            return False
    return True


def _only_default_device() -> bool:
    """``torch.set_default_device`` is a mode too, but it changes only functions that take no tensor."""
    return all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())


def _refuse_tangents(values: tuple[Any, ...]) -> None:
    if any(isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in values):
        raise RuntimeError(NO_FORWARD_MODE)


def second_backward(ctx: Any, *_: Tensor) -> None:
    raise RuntimeError(
        "fused_contrastive: double backward is not supported (the gradients' own gradient was requested, for example "
        "by create_graph=True or a gradient penalty); use the eager formula for that term"
    )


def unwrapped(t: Tensor) -> Tensor:
    """The tensor below all transforms of torch.func, with the elements of all their batches."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(t):
        t = functorch.get_unwrapped(t)
    return t


def refuse_transforms(what: str) -> None:
    if _transforms_active():
        raise RuntimeError(
            f"{what}: got a call inside a transform of torch.func (grad, vjp, vmap), expected one outside: "
            "differentiate it by torch.autograd.grad or backward()"
        )


def refuse_fake(what: str, *values: object) -> None:
    """Raises RuntimeError in a call that a trace records or that has fake tensors, which cannot be sent to a process.

    Nothing is raised under torch.compile: its trace ends before the first exchange, which runs in Python.
    """
    if torch.compiler.is_dynamo_compiling():
        return
    keys = torch._C._TorchDispatchModeKey
    recorded = any(torch._C._get_dispatch_mode(key) is not None for key in (keys.FAKE, keys.PROXY))
    if recorded or any(type(t) not in _PLAIN_TYPES and hasattr(t, "fake_mode") for t in values):
        raise RuntimeError(
            f"{what}: got a call with fake or recorded tensors (FakeTensorMode, make_fx, torch.export), whose values "
            "cannot be sent to other processes, expected tensors with values, as in torch.compile"
        )


@contextmanager
def outside_everything() -> Iterator[None]:
    """In this block, no transform of torch.func, mode or torch.jit.trace sees what is computed."""
    trace = _jit_trace()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        with (
            torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack(),
            _disable_current_modes(),
            torch._C.DisableTorchFunction(),
        ):
            yield
    finally:
        torch._C._set_tracing_state(trace)  # type: ignore[attr-defined]
