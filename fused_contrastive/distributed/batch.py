"""``GlobalBatch``: over which processes a batch is spread, and how their gradients are combined."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist

from fused_contrastive.core import checks

EXCHANGES = ("auto", "gather", "ring")
GRADIENTS = ("mean", "sum")


@dataclass(frozen=True)
class GlobalBatch:
    """A batch spread over the processes of a group, each of which calls the loss with its own rows.

    Attributes:
        group: a ``torch.distributed`` process group; None is the default one.
        exchange: how a process sees the others' columns. "gather" holds all N of them; "ring" holds two processes'
            columns at a time and passes them on while it computes; "auto" gathers while that takes at most an eighth of
            the smallest device's memory.
        gradients: what becomes of the processes' gradients. "mean": they are averaged, as DDP and FSDP do, so each is
            multiplied by the number of processes; "sum": they are summed. Either way the result is the gradient of the
            loss of the whole batch.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """

    group: dist.ProcessGroup | None = None
    exchange: Literal["auto", "gather", "ring"] = "auto"
    gradients: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        if self.group is not None and not isinstance(self.group, dist.ProcessGroup):
            raise TypeError(f"group: got {type(self.group).__name__}, expected a ProcessGroup of torch.distributed")
        checks.one_of("exchange", self.exchange, EXCHANGES)
        checks.one_of("gradients", self.gradients, GRADIENTS)

    @classmethod
    def of(cls, group: object) -> GlobalBatch:
        """What a ``group`` argument stands for."""
        if isinstance(group, cls):
            batch = group
        elif isinstance(group, dist.ProcessGroup):
            batch = cls(group)
        else:
            raise TypeError(
                f"group: got {type(group).__name__}, expected a torch.distributed.ProcessGroup, a GlobalBatch or None"
            )
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("group: torch.distributed is not initialised: call init_process_group first")
        return batch
