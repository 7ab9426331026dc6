"""A loss and its gradients against the reference backend in float64, on whatever tensors it is given."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_contrastive.core import hints, observing
from fused_contrastive.core.budget import Deviation, allowed, difference, largest_finite
from fused_contrastive.core.forks import guarded
from fused_contrastive.ops import dispatch

ROUNDINGS = 32  # eps of the largest element that are allowed beyond twice the reference's own error in the same dtype


@dataclass(frozen=True)
class Verification:
    """The errors of the value and of each gradient; printed, it has one line for each.

    Attributes:
        deviations: for each, a ``Deviation``: quantity, error, the reference's own error, and what is allowed.
        held: whether every error is within what is allowed.
        worst: the deviation that used the largest share.
    """

    deviations: tuple[Deviation, ...]

    @property
    def held(self) -> bool:
        """Whether every error is within what is allowed."""
        return all(deviation.share <= 1 for deviation in self.deviations)

    @property
    def worst(self) -> Deviation:
        return max(self.deviations, key=lambda deviation: deviation.share)

    def __str__(self) -> str:
        lines = [
            f"{d.quantity:>24}: off by {d.error:.2e}, {d.allowed:.2e} allowed{'' if d.share <= 1 else '  BREACH'}"
            for d in self.deviations
        ]
        return "\n".join(lines)


def compare(
    function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any], draws: bool, any_threads: bool
) -> Verification:
    """Calls ``function`` three times on copies: as it is, with the reference in the same dtype, and in float64.

    The allowed error is twice the second call's error against the third, plus ``ROUNDINGS`` eps of the largest element.
    The function's result is a tensor, or a tuple or dict of tensors; gradients are of the sum of all their elements.
    With ``draws``, each call draws the same random numbers, from the generators that all threads share. With
    ``any_threads``, other threads may call losses meanwhile: a function that calls losses in threads of its own needs
    False, because the reference is not forced there.

    Raises:
        ValueError: the function calls none of this package's losses, or gives nothing to compare.
        RuntimeError: another thread called a loss meanwhile, unless ``any_threads`` may.
    """
    state = torch.get_rng_state() if draws else None
    with torch.random.fork_rng(enabled=draws):  # afterwards, a training draws the same numbers as without this call
        ours, dtype = _evaluate(function, args, options, None, state)
        with dispatch.using("reference") as forced:
            plain, _ = _evaluate(function, args, options, None, state)
            exact, _ = _evaluate(function, args, options, torch.float64, state)
    if forced.missed and not any_threads:
        raise RuntimeError(
            f"loss_fn: another thread called a loss while {function!r} was verified, which cannot be told from one of "
            "its own, and would not be verified there; expected losses in the thread of verify, or in others by "
            "contextvars.copy_context().run(loss, ...), and no training beside it"
        )
    if not forced.calls:
        raise ValueError(
            f"loss_fn: {function!r} calls none of fused_contrastive's losses, so there is nothing to verify"
        )
    deviations = []
    for name, value in ours.items():
        right = exact[name]
        theirs, error = (_difference(found, right) for found in (plain[name], value))
        most = allowed(theirs, dtype, largest_finite(right), ROUNDINGS)
        deviations.append(Deviation(name, error, theirs, most))
    return Verification(tuple(deviations))


def _difference(found: Tensor, right: Tensor) -> float:
    """max |found - right|; where ``right`` is NaN, NaN agrees."""
    if not right.numel():
        return 0.0
    agree = found.isnan() & right.isnan()
    return difference(found.masked_fill(agree, 0), right.masked_fill(agree, 0))


def _evaluate(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    options: dict[str, Any],
    dtype: torch.dtype | None,
    state: Tensor | None,
) -> tuple[dict[str, Tensor], torch.dtype]:
    """Value and gradients in float64, by name; and the dtype of the first features."""
    if state is not None:
        torch.set_rng_state(state)  # dropout drops the same elements in each call
    leaves: dict[str, Tensor] = {}
    found: list[torch.dtype] = []

    def copied(name: str, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            found.append(value.dtype)
            copy = value.detach().to(dtype or value.dtype, copy=True).requires_grad_()
            leaves[name] = copy
            return copy
        if isinstance(value, (tuple, list)):
            return type(value)(copied(f"{name}[{k}]", each) for k, each in enumerate(value))
        return value

    new_args = [copied(f"argument {k}", value) for k, value in enumerate(args)]
    new_options = {name: copied(name, value) for name, value in options.items()}
    with torch.enable_grad():
        result = function(*new_args, **new_options)
    values = list(result.values()) if isinstance(result, dict) else result
    tensors = [t for t in (values if isinstance(values, (tuple, list)) else [values]) if isinstance(t, Tensor)]
    if not tensors or not leaves:
        raise ValueError(f"loss_fn: got {type(result).__name__} from {function!r}, expected a tensor of tensors")
    objective = torch.stack([t.double().sum() for t in tensors]).sum()
    results = {"value" if len(tensors) == 1 else f"value {k}": t.detach().double() for k, t in enumerate(tensors)}
    if objective.requires_grad:
        # A checkpoint computes its loss again in the backward, which must run in this thread: others force no backend.
        with torch.autograd.set_multithreading_enabled(False):
            gradients = torch.autograd.grad(objective, list(leaves.values()), allow_unused=True)
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
            results[f"gradient of {name}"] = (torch.zeros_like(leaf) if gradient is None else gradient).double()
    return results, found[0]


@guarded
def verify(loss_fn: Callable[..., Any], *inputs: Any, **options: Any) -> Verification:
    """Compares a loss of your own with the reference in float64, on tensors of your own.

    ``loss_fn(*inputs, **options)`` is any function or module that calls this package's losses, an adapter's included:
    its value and its gradients of all floating tensors are compared with those that plain PyTorch gives in float64.

    Returns:
        What was found, a ``Verification``.

    Warns:
        UserWarning: once a process, if a loss multiplies features as they are and these are not normalised; also if
            they are and its logit scale is below 1, because then it is probably a logarithm or a temperature.

    A loss_fn that calls losses in threads of its own must run each thread in a copy of its context:
    ``pool.submit(contextvars.copy_context().run, clip_loss, x, y)``. Asyncio's tasks and ``to_thread`` do so by
    themselves.

    torch's random state is set back afterwards, so random numbers that other threads draw meanwhile come again.

    Raises:
        ValueError: loss_fn calls none of this package's losses, returns no tensor, or is given none.
        RuntimeError: another thread called a loss meanwhile, outside of such a copy. It may be a thread of loss_fn's,
            and was not compared with the reference.
    """
    found: list[hints.Hint | None] = []

    def listen(function: Callable[..., Any], args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        result = function(*args, **given)
        if not torch.compiler.is_compiling():
            found.append(_hint(function, args, given))
        return result

    entry = observing.add(listen, compiled=False)  # it only finds hints, for which no graph should break
    try:
        return compare(loss_fn, inputs, options, draws=True, any_threads=False)
    finally:
        observing.remove(entry)
        hints.warn_once(next(filter(None, found), None))


def _hint(function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> hints.Hint | None:
    """A hint about the arguments of one of this package's losses; None if there is none."""
    bound = inspect.signature(function).bind(*args, **options)
    bound.apply_defaults()
    features = {}
    for name, value in bound.arguments.items():
        for k, each in enumerate(value) if isinstance(value, (tuple, list)) else [(None, value)]:
            many = isinstance(each, Tensor) and each.is_floating_point() and each.dim() > 1
            if many and not name.endswith("mask") and not name.startswith(("guide", "teacher")):
                features[name if k is None else f"{name}[{k}]"] = each
    for mask in ("negatives_mask", "image_mask", "text_mask"):  # masked features may be anything
        kind = mask.removesuffix("_mask")
        for name in (kind, f"{kind}_tokens", f"{kind}_latents", f"{kind}_latents_extra"):
            if name in features and (there := bound.arguments.get(mask)) is not None:
                features[name] = features[name][there.bool()]
    if bound.arguments.get("normalize", False) is not False:
        features = {}
    given = {name: bound.arguments.get(name) for name in ("logit_scale", "temperature")}
    scale, temperature = (t.item() if isinstance(t, Tensor) else t for t in given.values())
    if temperature:
        return hints.hint(features, "1 / temperature", 1 / temperature)
    return hints.hint(features, "logit_scale", 1.0 if scale is None else scale)
