"""A flag is True or False: every public function and module raises for 1, "no" and the like, on every backend."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from every_function import FUNCTIONS, MODULES, OTHERS, PUBLIC, RESULTS

import fused_contrastive as fc

NOT_FLAGS = [0, 1, 0.0, "no", "False", np.bool_(True), torch.tensor(True), [], None]


def flags(function: Callable[..., Any]) -> list[str]:
    """Parameters that are annotated with bool, or whose default is one."""
    return [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if re.search(r"\bbool\b", str(parameter.annotation)) or isinstance(parameter.default, bool)
    ]


ENTRIES = [(name, flag) for name in (*FUNCTIONS, *MODULES) for flag in flags(PUBLIC[name])]


def optional(name: str, flag: str) -> bool:
    return "None" in str(inspect.signature(PUBLIC[name]).parameters[flag].annotation)


def test_whatever_is_public_is_here() -> None:
    assert set(PUBLIC) == {*FUNCTIONS, *MODULES, *RESULTS, *OTHERS}
    assert len(ENTRIES) > 20
    for name in set(OTHERS) - {"monitor"}:  # whose own tests try its flag
        assert not flags(PUBLIC[name])
    for name in MODULES:
        assert set(flags(PUBLIC[name].forward)) <= {"metrics"}, "options of a module belong to its constructor"


@pytest.mark.parametrize(
    "module",
    [
        fc.ClipLoss(),
        fc.SigLipLoss(),
        fc.InfoNCELoss(),
        fc.NTXentLoss(normalize=True),
    ],
)
def test_metrics_of_a_module_s_call_is_true_or_false(module: torch.nn.Module) -> None:
    x = torch.eye(4)
    with pytest.raises(TypeError, match=r"^metrics: got 1, expected True or False"):
        module(
            x,
            x,
            logit_scale=1.0,
            metrics=1,
            **({"logit_bias": 0.0} if isinstance(module, fc.SigLipLoss) else {}),
        )


@pytest.mark.parametrize(("name", "flag"), ENTRIES)
def test_a_flag_is_true_or_false(name: str, flag: str) -> None:
    function, arguments = PUBLIC[name], FUNCTIONS[name] if name in FUNCTIONS else MODULES[name][0]
    for value in (True, False):
        function(**{**arguments, flag: value})
    for value in NOT_FLAGS:
        if value is None and optional(name, flag):
            continue
        with pytest.raises(TypeError, match=rf"^{flag}: got {re.escape(repr(value))}, expected True or False$"):
            function(**{**arguments, flag: value})


@pytest.mark.parametrize(("name", "flag"), [entry for entry in ENTRIES if entry[0] in FUNCTIONS])
def test_on_every_backend(name: str, flag: str, backend: str) -> None:
    """The flag is checked before the backend is called, whichever backend it is."""
    arguments = {k: v.to(torch.get_default_device()) if hasattr(v, "to") else v for k, v in FUNCTIONS[name].items()}
    with pytest.raises(TypeError, match=f"^{flag}: got 1, expected True or False$"):
        PUBLIC[name](**{**arguments, flag: 1, "backend": backend})
