"""A breach of the error budget as a script that anyone can run, to go with a report of it."""

from __future__ import annotations

from pathlib import Path

import torch

from fused_contrastive.testing.cases import Case

_HEAD = '''"""{title}

Found with torch {torch}. Exits with 1 while the backend is not within the error budget.
"""

import sys
'''

_CASE = """
import torch

from fused_contrastive.testing import harness
from fused_contrastive.testing.cases import Case
from fused_contrastive.testing.maker import Sizes

sizes = Sizes({n}, {d}, {dtype}, {scale!r}, duplicates={duplicates}, m={m})
case = Case({loss!r}, {variant!r}, sizes, seed={seed}{features})  # the same tensors each time
backend, device = {backend!r}, {device!r}
ours = harness.ours(case, backend, device)
oracle = harness.expected(case, device)  # float64, and eager's error
"""

_FEATURES = """
from pathlib import Path

from fused_contrastive.core.files import load_features

features = load_features(Path({x!r})), load_features(Path({y!r}))
"""

_TAIL = """
deviations = oracle.deviations(ours)
for found in deviations:
    value, exact = harness.farthest(ours[found.quantity], oracle.truth[found.quantity])
    print(f"{{found.quantity:>20}}: {{backend}} {{value:.9g}}, float64 {{exact:.9g}} where they differ most, off by "
          f"{{found.error:.2e}}, {{found.allowed:.2e}} allowed{{'' if found.share <= 1 else '  BREACH'}}")
sys.exit(any(found.share > 1 for found in deviations))
"""


def script(case: Case, backend: str, device: torch.device, features: tuple[Path, Path] | None = None) -> str:
    """The script of one case; ``features`` are the files that x and y were read from, if any."""
    values = {**vars(case.sizes), **vars(case), "features": ""}
    body = _CASE
    if features is not None:
        x, y = (str(path.resolve()) for path in features)
        body, values["features"] = _FEATURES.format(x=x, y=y) + _CASE, ", features=features"
    values |= {"backend": backend, "device": str(device), "title": f"{case}, backend {backend!r} on {device}."}
    return (_HEAD + body + _TAIL).format(torch=torch.__version__, **values)
