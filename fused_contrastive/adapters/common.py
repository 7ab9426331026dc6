"""What the adapters' losses share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.torch_version import TorchVersion  # compares like packaging, which may not be installed

from fused_contrastive.core import checks
from fused_contrastive.core.spec import BackendName
from fused_contrastive.ops.problem import autocast


@contextmanager
def importing(distribution: str, tested: str, least: str | None = None) -> Iterator[None]:
    """Goes around a library's imports: an ImportError there names the version found and the versions tested.

    Args:
        distribution: its name for pip.
        tested: the versions that the conformance tests were run with.
        least: the first version that has what the adapter calls.

    Raises:
        ImportError: an older version than ``least``, or one that lacks a name that is imported.
    """
    try:
        found = version(distribution)
    except PackageNotFoundError:
        found = None  # not installed, or run from its sources
    expected = f"expected {f'{least} or later' if least else tested} (tested with {tested}): pip install {distribution}"
    if found and least and TorchVersion(found) < least:
        raise ImportError(f"{distribution}: got version {found}, {expected}")
    try:
        yield
    except ImportError as error:
        got = f"got version {found}" if found else "is not installed"
        kind = ModuleNotFoundError if isinstance(error, ModuleNotFoundError) else ImportError
        raise kind(f"{distribution}: {got}, {expected}. {error}", name=error.name, path=error.path) from error


def not_covered(adapter: str, library: Any, reasons: Mapping[str, str] | None = None) -> Callable[[str], Any]:
    """An adapter module's ``__getattr__``: importing another class of the library raises NotImplementedError.

    Args:
        adapter: the ``__name__`` of the adapter's module.
        library: the library's module of losses.
        reasons: for a class's name, why it is not covered and what to use instead.
    """
    package = library.__name__.partition(".")[0]

    def get(name: str) -> Any:
        theirs = getattr(library, name, None)
        if not isinstance(theirs, type) or theirs.__module__.partition(".")[0] != package:
            raise AttributeError(f"module {adapter!r} has no attribute {name!r}")
        reason = (reasons or {}).get(name, f"use {library.__name__}.{name}")
        raise NotImplementedError(f"{name}: a class of {package} that is not covered: {reason}")

    return get


class Fused:
    """A mix-in that stands before a library's class.

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


def check_pair(x_name: str, x: object, y_name: str, y: object) -> None:
    """Two sets of features (rows, D) that can be multiplied after autocast; errors name them as the caller does."""
    checks.features(x_name, x)
    checks.features(y_name, y)
    assert isinstance(x, Tensor)
    assert isinstance(y, Tensor)
    checks.feature_pair(x_name, autocast(x[:1]), y_name, autocast(y[:1]))
