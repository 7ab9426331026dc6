"""The pytest plugin of library_tests.py: it puts our classes into the libraries, and counts their calls."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SETTINGS = "LIBRARY_TESTS"  # the environment variable that tells the plugin what to do
COUNTED = {  # what of our classes does the work
    "forward", "compute_loss", "create_indices_tuple", "compute_loss_from_embeddings", "calculate_loss",
    "fused_colbert_scores",
}  # fmt: skip
_outcomes: dict[str, tuple[str, str]] = {}
_calls: dict[str, Counter[str]] = {}
_built: set[str] = set()  # tests that made an object of ours
_test = ""
_launched = "LOCAL_RANK" in os.environ  # Lightning starts the command again for its second process


def pytest_load_initial_conftests() -> None:
    """Before the library's conftest."""
    mode, name = _settings()["mode"], _settings()["adapter"]
    if mode == "theirs":
        return
    package = f"fused_contrastive.adapters.{name}"
    adapter = importlib.import_module(package)
    getattr(adapter, f"patch_{name}")()
    for module in [module for name, module in sys.modules.items() if name.startswith(package)]:
        for owner, attribute, method in list(_counted_methods(module, mode == "covered")):
            setattr(owner, attribute, method)


def pytest_runtest_logstart(nodeid: str) -> None:
    global _test
    _test = nodeid


def pytest_runtest_setup() -> None:
    """lightly draws from numpy's unseeded generator."""
    import numpy as np
    import torch

    seed = _settings()["seed"]
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def pytest_runtest_logreport(report: Any) -> None:
    if report.failed:
        _outcomes.setdefault(report.nodeid, ("failed", _error(report)))
    elif report.skipped:
        _outcomes.setdefault(report.nodeid, ("skipped", ""))
    elif report.when == "teardown":
        _outcomes.setdefault(report.nodeid, ("passed", ""))


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        _outcomes[report.nodeid] = ("failed", _error(report))


def pytest_sessionfinish() -> None:
    if not _launched:
        Path(_settings()["report"]).write_text(
            json.dumps({"outcomes": _outcomes, "calls": _calls, "built": sorted(_built)})
        )


def _settings() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(os.environ[SETTINGS])
    return found


def _error(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr).strip().rpartition("\n")[2]
    return " ".join(text.split())


def _counted_methods(adapter: Any, covered: bool) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """Owner, name and replacement of what our classes define, counting the calls, and of their constructors.

    ``covered``: a call that raises NotImplementedError is given to the library's method.
    """
    for name, value in vars(adapter).items():
        if name in COUNTED and inspect.isfunction(value):
            yield adapter, name, _counted(name, value, None)
        if not isinstance(value, type) or value.__module__ != adapter.__name__:
            continue
        ours = [base for base in value.__mro__ if base.__module__ == adapter.__name__]
        theirs = next((base for base in value.__mro__ if base not in ours and base.__name__ == name), None)
        for attribute in {"__init__"}.union(*(vars(base) for base in ours)):
            owner = next(base for base in value.__mro__ if attribute in vars(base))
            function = vars(owner)[attribute]
            if inspect.isfunction(function) and (owner in ours or attribute == "__init__"):
                library = getattr(theirs, attribute, None) if covered else None
                yield value, attribute, _counted(attribute, function, library)


def _counted(name: str, ours: Callable[..., Any], theirs: Callable[..., Any] | None) -> Callable[..., Any]:
    is_method = "." in ours.__qualname__

    @functools.wraps(ours)
    def call(first: Any, *args: Any, **options: Any) -> Any:
        if theirs is not None and "_uncovered" in vars(first):
            return theirs(first, *args, **options)
        try:
            result = ours(first, *args, **options)
        except NotImplementedError:
            if theirs is None:
                raise
            if name == "__init__":
                vars(first)["_uncovered"] = True
            return theirs(first, *args, **options)
        if name == "__init__":
            _built.add(_test)
        if name in COUNTED:
            _calls.setdefault(_test, Counter())[type(first).__name__ if is_method else name] += 1
        return result

    return call
