"""What all adapters share (version errors, classes that are not covered, patches), on libraries that the tests make."""

from __future__ import annotations

import importlib.metadata
import sys
import types
from collections.abc import Iterator

import pytest

from fused_contrastive.adapters import common
from fused_contrastive.adapters.patching import Patch


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution "alib" of version 1.9.0, and none of another name."""

    def version(name: str) -> str:
        if name != "alib":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.9.0"

    monkeypatch.setattr(common, "version", version)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("distribution", "least", "message"),
    [
        ("alib", "1.10", "alib: got version 1.9.0, expected 1.10 or later (tested with 2.0.0): pip install alib"),
        (
            "alib",
            "1.9",
            "alib: got version 1.9.0, expected 1.9 or later (tested with 2.0.0): pip install alib. No modu",
        ),
        ("alib", None, "alib: got version 1.9.0, expected 2.0.0 (tested with 2.0.0): pip install alib. No module na"),
        (
            "blib",
            "1.10",
            "blib: is not installed, expected 1.10 or later (tested with 2.0.0): pip install blib. No mod",
        ),
    ],
)
def test_an_import_that_fails_names_the_versions(distribution: str, least: str | None, message: str) -> None:
    with pytest.raises(ImportError) as raised, common.importing(distribution, tested="2.0.0", least=least):
        import a_module_that_nobody_has  # noqa: F401
    assert str(raised.value).startswith(message)


@pytest.mark.usefixtures("installed")
def test_a_version_that_is_new_enough_imports() -> None:
    for least in (None, "1.9", "1.9.0"):
        with common.importing("alib", tested="2.0.0", least=least):
            pass
    with common.importing("blib", tested="2.0.0", least="1.9"):  # run from its sources: it has no version metadata
        pass


@pytest.fixture
def package() -> Iterator[types.ModuleType]:
    """A library "alib" whose module of losses has two names, as when one of them is deprecated."""
    losses = types.ModuleType("alib.losses")
    losses.Loss = type("Loss", (), {"__module__": "alib.losses"})
    losses.OtherLoss = type("OtherLoss", (), {"__module__": "alib.losses"})
    losses.foreign = int
    names = {"alib": types.ModuleType("alib"), "alib.losses": losses, "alib.old_losses": losses}
    sys.modules.update(names)
    yield losses
    for name in names:
        del sys.modules[name]


def test_classes_that_are_not_covered_say_so(package: types.ModuleType) -> None:
    get = common.not_covered("adapters.alib", package, {"OtherLoss": "it is another"})
    with pytest.raises(NotImplementedError, match="OtherLoss: a class of alib that is not covered: it is another"):
        get("OtherLoss")
    with pytest.raises(NotImplementedError, match=r"Loss: a class of alib that is not covered: use alib\.losses\.Loss"):
        get("Loss")
    for name in ("foreign", "Losses"):
        with pytest.raises(AttributeError, match=f"module 'adapters.alib' has no attribute '{name}'"):
            get(name)


def test_a_module_under_two_names_is_patched_once(package: types.ModuleType) -> None:
    ours, theirs = type("Ours", (package.Loss,), {}), package.Loss
    for _ in range(2):
        with Patch() as patch:
            patch.replace_everywhere("alib", {theirs: ours})
            assert package.Loss is ours
        assert package.Loss is theirs
