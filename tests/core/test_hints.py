"""Features that are not normalised, and a temperature or logarithm given as the scale, cause one hint and no error."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_contrastive as fc
from fused_contrastive.__main__ import main
from fused_contrastive.core import warn


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warn, "_told", set())


def unit(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return F.normalize(torch.randn(*shape), dim=-1).to(dtype)


def told(call: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert all(warning.filename == __file__ for warning in caught)  # the caller's line
    return [str(warning.message) for warning in caught]


def test_diagnose_warns_once_of_each_kind() -> None:
    x, y = unit(20, 8), unit(20, 8)
    (norms,) = told(lambda: fc.diagnose(x, 3 * y, 20.0))
    assert norms.startswith("y: got rows of norm 3 to 3, expected 1")
    (scale,) = told(lambda: fc.diagnose(x, y, torch.tensor(0.07)))
    assert scale.startswith("scale: got 0.07 with features of norm 1, expected 1 / temperature")
    assert told(lambda: fc.diagnose(x, 3 * y, 0.07)) == told(lambda: fc.diagnose(x, y, 0.07)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_normalised_features_are_right_in_every_dtype(dtype: torch.dtype) -> None:
    x, y = unit(50, 64, dtype=dtype), unit(50, 64, dtype=dtype)
    assert told(lambda: fc.diagnose(x, y, 1.0)) == []
    assert told(lambda: fc.verify(fc.clip_loss, x, y, 1.0)) == []
    assert len(told(lambda: fc.verify(fc.clip_loss, x, 1.1 * y, 1.0))) == 1


X, Y = unit(12, 8), unit(12, 8)
LABELS = torch.arange(12) % 3
PADDED = torch.cat((unit(4, 2, 8), torch.zeros(4, 1, 8)), dim=1)
MASK = torch.tensor([True, True, False]).expand(4, 3)
PADDED_WITH_SEVENS = torch.where(MASK.repeat(3, 1)[..., None], PADDED.repeat(3, 1, 1), 7.0)
QUIET = {
    "fillers among negatives": lambda: fc.verify(
        fc.info_nce_loss, X, Y, negatives=PADDED_WITH_SEVENS, negatives_mask=MASK.repeat(3, 1), logit_scale=14.0
    ),
    "a mask of numbers": lambda: fc.verify(
        fc.filip_loss, PADDED_WITH_SEVENS, X[:, None], 14.0, image_mask=MASK.repeat(3, 1).float()
    ),
    "clip": lambda: fc.verify(fc.clip_loss, X, Y, 14.0),
    "module": lambda: fc.verify(fc.SigLipLoss(), X, Y, 10.0, -10.0),
    "normalises": lambda: fc.verify(fc.nt_xent_loss, 3 * X, Y, normalize=True),
    "asked to": lambda: fc.verify(fc.info_nce_loss, 3 * X, Y, logit_scale=20.0, normalize=True),
    "a temperature below 1": lambda: fc.verify(fc.supcon_loss, X, LABELS, temperature=0.1),
    "padding": lambda: fc.verify(fc.filip_loss, unit(4, 5, 8), PADDED, 20.0, text_mask=MASK),
    "compiled": lambda: fc.verify(torch.compile(fc.clip_loss, fullgraph=True, backend="eager"), X, 3 * Y, 14.0),
}
HINTS = {
    "clip": (lambda: fc.verify(fc.clip_loss, X, 3 * Y, 14.0), "text_features: got rows of norm 3 to 3"),
    "module": (lambda: fc.verify(fc.SigLipLoss(), 2 * X, Y, 10.0, -10.0), "image_features: got rows of norm 2 to 2"),
    "views": (
        lambda: fc.verify(fc.nt_xent_loss, X, Y, views=[2 * Y], normalize=False),
        "views[0]: got rows of norm 2",
    ),
    "labels": (lambda: fc.verify(fc.supcon_loss, 2 * X, LABELS), "features: got rows of norm 2 to 2"),
    "negatives": (
        lambda: fc.verify(fc.info_nce_loss, X, Y, logit_scale=20.0, negatives=2 * Y),
        "negatives: got rows of norm 2 to 2",
    ),
    "inside": (lambda: fc.verify(lambda x, y: 2 * fc.clip_loss(2 * x, y, 14.0), X, Y), "image_features: got rows"),
    "logarithm": (lambda: fc.verify(fc.clip_loss, X, Y, torch.tensor(-2.66)), "logit_scale: got -2.66 with features"),
    "temperature": (
        lambda: fc.verify(fc.info_nce_loss, 2 * X, Y, logit_scale=0.07, normalize=True),
        "logit_scale: got 0.07 with features of norm 1",
    ),
}


@pytest.mark.parametrize("name", QUIET)
def test_verify_says_nothing(name: str) -> None:
    assert told(QUIET[name]) == []


@pytest.mark.parametrize("name", HINTS)
def test_verify_warns_once(name: str) -> None:
    call, said = HINTS[name]
    (hint,) = told(call)
    assert hint.startswith(said)
    assert told(call) == []


@pytest.mark.parametrize(
    ("factor", "scale", "said"),
    [
        (1, "100", None),
        (1, "1", None),
        (1, "0.07", "hint: --scale: got 0.07 with features of norm 1"),
        (1, "-4.6", "hint: --scale: got -4.6 with features of norm 1"),
        (5, "0.07", "b.npy: got rows of norm 5 to 5, expected 1"),
    ],
)
def test_the_command_prints_a_hint(
    factor: int, scale: str, said: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(tmp_path / "a.npy"), str(tmp_path / "b.npy")]
    for path, features in zip(paths, (X, factor * Y), strict=True):
        np.save(path, features.numpy())
    assert main(["verify", "--backend", "reference", "--features", *paths, f"--scale={scale}"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("hint: ") == (said is not None)
    assert (said or "") in shown


def test_the_default_that_will_change_is_told_once() -> None:
    (warning,) = told(lambda: (fc.nt_xent_loss(X, 3 * Y), fc.NTXentLoss()(X, Y)))
    assert warning.startswith("nt_xent_loss: normalize is not given; it is True now, and will be False")
    assert torch.equal(fc.nt_xent_loss(X, 3 * Y), fc.nt_xent_loss(X, 3 * Y, normalize=True))
