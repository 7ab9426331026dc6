"""What the adapters' losses share."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor

from fused_contrastive.core.spec import BackendName


class Fused:
    """Mixed in before a library's class.

    Attributes:
        backend, memory_budget: see ``contrastive_stats``.
    """

    backend: BackendName = "auto"
    memory_budget: int | Literal["auto"] = "auto"
    bypassed: ClassVar[tuple[str, ...]] = ()  # methods of the library's class that ours does not call

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in cls.bypassed:
            if name in vars(cls):
                raise NotImplementedError(
                    f"{cls.__name__}.{name}: overridden, which is not covered, as the fused loss does not call it: "
                    "subclass the library's own class"
                )

    def _options(self) -> dict[str, Any]:
        return {"memory_budget": self.memory_budget, "backend": self.backend}


def scalar(value: float | Tensor) -> float | Tensor:
    """A number, or a tensor of one element such as FSDP2's of shape (1,) -> a number, or a 0-d tensor."""
    return value.reshape(()) if isinstance(value, Tensor) else value
