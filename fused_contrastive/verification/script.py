"""A breach of the error budget as a script that anyone can run: what a report of it should bring along."""

from __future__ import annotations

from pathlib import Path

import torch

from fused_contrastive.testing.cases import Case
from fused_contrastive.testing.family import FamilyCase

_HEAD = '''"""{title}

Found with torch {torch}. Exits with 1 while the backend is not within the error budget.
"""

import sys
'''

_STATS = """
import torch

from fused_contrastive.testing import budget
from fused_contrastive.testing.cases import Case

case = Case({dtype}, m={m}, n={n}, d={d}, scale={scale!r}, option={option!r}, seed={seed})
backend, device = {backend!r}, torch.device({device!r})
inputs = case.inputs()  # the same tensors each time
{features}inputs = inputs.on(device)
ours = budget.evaluate(budget.ours(case, backend), inputs)
oracle = budget.expected(case, inputs)  # float64, and eager's error
deviations = budget.deviations(case, backend, inputs, oracle, ours)
"""

_FEATURES = """
from dataclasses import replace
from pathlib import Path

from fused_contrastive.core.files import load_features

inputs = replace(inputs, x=load_features(Path({x!r})), y=load_features(Path({y!r})))
"""

_FAMILY = """
import torch

from fused_contrastive.testing import budget, family

sizes = family.Sizes({n}, {d}, {dtype}, {scale!r}, duplicates={duplicates})
case = family.FamilyCase({loss!r}, {variant!r}, sizes, seed={seed})  # the same tensors each time
backend, device = {backend!r}, torch.device({device!r})
ours = family.ours(case, backend, device)
oracle = family.expected(case, device)  # float64, and eager's error
deviations = family.deviations(case, backend, device, ours, oracle)
"""

_TAIL = """
for found in deviations:
    value, exact = budget.farthest(ours[found.quantity], oracle.truth[found.quantity])
    print(f"{{found.quantity:>20}}: {{backend}} {{value:.9g}}, float64 {{exact:.9g}} where they differ most, off by "
          f"{{found.error:.2e}}, {{found.allowed:.2e}} allowed{{'' if found.share <= 1 else '  BREACH'}}")
sys.exit(any(found.share > 1 for found in deviations))
"""


def script(
    case: Case | FamilyCase, backend: str, device: torch.device, features: tuple[Path, Path] | None = None
) -> str:
    """The script of one case; ``features`` are the files that x and y were read from, if any."""
    common = {"backend": backend, "device": str(device), "d": 0, "title": f"{case}, backend {backend!r} on {device}."}
    if isinstance(case, FamilyCase):
        body, values = _FAMILY, {**vars(case.sizes), "loss": case.loss, "variant": case.variant, "seed": case.seed}
    else:
        body, values = _STATS, {**vars(case), "features": ""}
        if features is not None:
            x, y = (str(path.resolve()) for path in features)
            values["features"] = _FEATURES.format(x=x, y=y)
    return (_HEAD + body + _TAIL).format(torch=torch.__version__, **{**common, **values})
