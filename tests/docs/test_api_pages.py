"""docs/api names each public name once, and the docstrings there say what a caller needs to know."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
from snippets import ROOT

import fused_contrastive

DIRECTIVE = re.compile(r"^::: fused_contrastive\.(\w+)$", re.MULTILINE)
SHAPE = re.compile(r"\([A-Z](?: \* [A-Z])*(?:, (?:[A-Z]|k))*,?\)")  # (N, D), (M,), (V * N,)
ARXIV = re.compile(r"arXiv:\d{4}\.\d{5}")
PUBLIC = {name: getattr(fused_contrastive, name) for name in fused_contrastive.__all__}
LOSSES = sorted(name for name in PUBLIC if name.endswith("_loss"))
MODULES = {
    "ClipLoss": "clip_loss",
    "DistillationLoss": "distillation_loss",
    "FilipLoss": "filip_loss",
    "InfoNCELoss": "info_nce_loss",
    "NTXentLoss": "nt_xent_loss",
    "SigLipLoss": "siglip_loss",
    "SupConLoss": "supcon_loss",
}


def doc(thing: object) -> str:
    """Its own docstring: not the signature that a dataclass or NamedTuple gets without one, nor its parent's."""
    own = vars(thing).get("__doc__") if inspect.isclass(thing) else getattr(thing, "__doc__", None)
    assert own, f"{thing} has no docstring"
    assert not own.startswith(f"{getattr(thing, '__name__', '')}("), f"{thing} has no docstring of its own"
    return inspect.cleandoc(own)


def takes_tensors(thing: Callable[..., Any]) -> bool:
    if inspect.isclass(thing):
        return "Tensor" in str(vars(thing).get("__annotations__", {}))
    return "Tensor" in str(inspect.signature(thing).parameters)


def refuses_input(thing: Callable[..., Any]) -> bool:
    """Whether it checks its input: functions do, and classes with a hand-written check."""
    if not inspect.isclass(thing):
        return True
    own = vars(thing)
    written = "__post_init__" in own or "__init__" in own
    return written and ("__post_init__" in own or not hasattr(thing, "__dataclass_fields__"))


def test_every_public_name_has_one_place() -> None:
    found = [name for page in sorted((ROOT / "docs/api").glob("*.md")) for name in DIRECTIVE.findall(page.read_text())]
    assert sorted(found) == sorted(fused_contrastive.__all__)


@pytest.mark.parametrize("name", sorted(name for name, thing in PUBLIC.items() if takes_tensors(thing)))
def test_shapes(name: str) -> None:
    assert SHAPE.search(doc(PUBLIC[name])), f"{name}: no shape in its docstring"


@pytest.mark.parametrize("name", sorted(name for name, thing in PUBLIC.items() if refuses_input(thing)))
def test_errors(name: str) -> None:
    text = doc(PUBLIC[name])
    assert re.search(r"^Raises:\n    (\w+Error(, )?)+: \w", text, re.MULTILINE), f"{name}: no Raises: section"


@pytest.mark.parametrize("name", LOSSES)
def test_papers(name: str) -> None:
    assert ARXIV.search(doc(PUBLIC[name])), f"{name}: no paper in its docstring"


def test_modules_name_their_function() -> None:
    assert sorted(MODULES) == sorted(name for name in PUBLIC if name.endswith("Loss"))
    for module, function in MODULES.items():
        assert f"``{function}``" in doc(PUBLIC[module])
        forward = doc(PUBLIC[module].forward)
        assert f"``{function}``" in forward
        assert SHAPE.search(forward), f"{module}.forward: no shape in its docstring"


@pytest.mark.parametrize("name", LOSSES)
def test_every_argument_is_described(name: str) -> None:
    text = doc(PUBLIC[name])
    described = re.search(r"^Args:\n(.*?)\n\n", text, re.DOTALL | re.MULTILINE)
    assert described is not None
    named = [each for line in re.findall(r"^    ([\w, ]+):", described[1], re.MULTILINE) for each in line.split(", ")]
    assert named == list(inspect.signature(PUBLIC[name]).parameters)
