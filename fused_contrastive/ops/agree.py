"""The agreement of a loss with the other processes, after its own checks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_contrastive.core import checks
from fused_contrastive.core.modes import is_plain, refuse_fake
from fused_contrastive.distributed.agreement import Agreed, Call, Group
from fused_contrastive.ops import dispatch


def agree(
    group: Group, name: str, x: Tensor, y: Tensor, options: dict[str, Any], *inputs: object,
    memory_budget: int | str, backend: str, **columns: Any,
) -> Agreed | None:  # fmt: skip
    """``Call.agree`` for the ``group`` of a function that is ``collective``; None without a group.

    Makes the last checks first, because a later refusal leaves the others waiting: the inner functions check
    ``memory_budget`` and ``backend`` only when they are called.
    """
    if group is None:
        return None
    assert isinstance(group, Call)
    if group.agreed is None:
        is_plain(x, y, *inputs)  # raises for what an operator could not compute with
        refuse_fake("group", x, y, *inputs)
        _refuse_inference(name, x, y, *inputs)
        checks.memory_budget(memory_budget)
        dispatch.resolve(backend, x.device, x.dtype)
    return group.agree(name, x, y, options, *inputs, **columns)


def _refuse_inference(name: str, *values: object) -> None:
    """A tensor made in ``torch.inference_mode()``, where a gradient is asked: autograd refuses to save it."""
    tensors = [t for t in values if isinstance(t, Tensor)]
    if torch.compiler.is_dynamo_compiling() or not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return
    for k, t in enumerate(tensors):
        if t.is_inference():
            which = ("the features of the rows", "the features of the columns")[k] if k < 2 else "another input"
            raise RuntimeError(
                f"{name}: got {which}, of shape {tuple(t.shape)}, from torch.inference_mode() while a gradient is "
                "asked, expected a tensor from torch.no_grad(), or its clone()"
            )
