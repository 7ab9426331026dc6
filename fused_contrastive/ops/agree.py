"""The agreement of a loss with the other processes, after its own checks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fused_contrastive.core import checks
from fused_contrastive.core.modes import is_plain
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
        is_plain(x, y, *inputs)  # raises under torch.jit.trace and forward-mode AD
        checks.memory_budget(memory_budget)
        dispatch.resolve(backend, x.device, x.dtype)
    return group.agree(name, x, y, options, *inputs, **columns)
