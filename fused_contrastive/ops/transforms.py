"""Gives an operator its formula, for autograd and for the transforms of torch.func, and the function that calls it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_contrastive.core.modes import NO_FORWARD_MODE, is_plain
from fused_contrastive.ops.schema import library


def register_formula(
    name: str, backward: Callable[..., Any], setup_context: Callable[[Any, Any, Any], None] | None = None
) -> None:
    """Registers a backward by ``torch.library.register_autograd``, and a second time for the transforms of torch.func.

    What register_autograd makes of it cannot be transformed by grad, vjp or vmap. They get an autograd function of
    their own, at the dispatch key that every transform meets first. vmap calls the operator for each element in turn.
    """
    operator = getattr(torch.ops.fused_contrastive, name)

    class Transformed(torch.autograd.Function):
        @staticmethod
        def forward(*inputs: Any) -> Any:
            return operator(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            if setup_context is not None:
                setup_context(ctx, inputs, output)

        @staticmethod
        def jvp(ctx: Any, *_: Any) -> None:
            raise RuntimeError(NO_FORWARD_MODE)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
            def element(i: int) -> Any:
                pairs = zip(inputs, in_dims, strict=True)
                return operator(*(each.select(dim, i) if isinstance(dim, int) else each for each, dim in pairs))

            if not info.batch_size:
                raise ValueError("vmap: got a batch of 0, expected at least 1")
            elements = [element(i) for i in range(info.batch_size)]
            if isinstance(elements[0], Tensor):
                return torch.stack(elements), 0
            stacked = tuple(map(torch.stack, zip(*elements, strict=True)))
            return stacked, (0,) * len(stacked)

    Transformed.backward = staticmethod(backward)  # type: ignore[method-assign]

    def transformed(*inputs: Any) -> Any:
        if _is_functionalized():
            raise RuntimeError(
                "fused_contrastive: torch.func.functionalize is not supported, expected make_fx or torch.export, which "
                "do the same with what they trace"
            )
        return Transformed.apply(*inputs)  # type: ignore[no-untyped-call]

    torch.library.register_autograd(f"fused_contrastive::{name}", backward, setup_context=setup_context, lib=library)
    library.impl(name, transformed, "FuncTorchDynamicLayerFrontMode")


def with_formula(
    name: str, run: Callable[..., Any], backward: Callable[..., Any], setup_context: Callable[[Any, Any, Any], None]
) -> Callable[..., Any]:
    """Registers an operator's formula, and returns the function by which the package calls the operator.

    The function takes the operator's inputs and ``differentiable``, whether a gradient is wanted. Where something
    traces or intercepts operators it goes through torch.ops. Else it calls the implementation ``run`` directly, without
    the dispatcher's Python layers, which cost about 200 us a call on a CPU.
    """
    register_formula(name, backward, setup_context)
    operator = getattr(torch.ops.fused_contrastive, name)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            # A separate setup_context would make Function.apply inspect the signature, about 100 us a call on a CPU.
            output = run(*inputs)
            setup_context(ctx, inputs, output)
            return output

    Eager.backward = staticmethod(backward)  # type: ignore[method-assign]

    def call(*inputs: Any, differentiable: bool) -> Any:
        if not is_plain(*inputs):
            return operator(*inputs)
        return Eager.apply(*inputs) if differentiable else run(*inputs)  # type: ignore[no-untyped-call]

    return call


def register_constant(name: str) -> None:
    """Registers an operator whose results have no gradient."""

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.inputs = len(inputs)
        ctx.mark_non_differentiable(*((output,) if isinstance(output, Tensor) else output))

    register_formula(name, lambda ctx, *_: (None,) * ctx.inputs, setup_context)


def _is_functionalized() -> bool:
    functorch = torch._C._functorch
    return bool(functorch.peek_interpreter_stack().key() == functorch.TransformType.Functionalize)
