"""``python -m fused_contrastive``: verify tells right from wrong, info tells what can run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fused_contrastive.__main__ import main
from fused_contrastive.backends import cpp
from fused_contrastive.verify import run


@pytest.fixture(autouse=True)
def few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "QUICK_CASES", 60)


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    for part in (torch.__version__, "backend reference", "backend cpp", "vector level", "threads"):
        assert part in shown


def test_verify_holds(capsys: pytest.CaptureFixture[str], seed: int) -> None:
    assert main(["verify", "--device", "cpu", "--backend", "reference", "cpp", "--seed", str(seed)]) == 0
    shown = capsys.readouterr().out
    assert "error budget held: 0 breaches" in shown
    assert f"seed {seed}" in shown


def test_verify_notices_a_wrong_backend(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    right = cpp.stats_forward

    def wrong(spec, x, y):
        result = right(spec, x, y)
        return result._replace(row=result.row + 0.3)

    monkeypatch.setattr(cpp, "stats_forward", wrong)
    assert main(["verify", "--device", "cpu", "--backend", "reference", "cpp", "--seed", str(seed)]) == 1
    assert "BREACHED" in capsys.readouterr().out


def test_verify_own_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", np.random.default_rng().normal(size=(50, 12)).astype(np.float32))
    paths = [str(tmp_path / "a.npy"), str(tmp_path / "b.npy")]
    assert main(["verify", "--features", *paths, "--scale", "20"]) == 0
    assert "error budget held" in capsys.readouterr().out


def test_verify_a_backend_that_cannot_run_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--device", "meta", "--backend", "cpp"]) == 2
    assert "got 'cpp' for torch.float32 features on meta" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize("array", [np.zeros((3, 2, 1), np.float32), np.zeros((3, 2), np.int64)], ids=["rank", "dtype"])
def test_verify_bad_features(array: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "a.npy", array)
    assert main(["verify", "--features", str(tmp_path / "a.npy"), str(tmp_path / "a.npy")]) == 2
    assert "expected floats of shape (N, D)" in capsys.readouterr().out.replace("\n", " ")


def test_verify_missing_file(tmp_path: Path) -> None:
    assert main(["verify", "--features", str(tmp_path / "a.npy"), str(tmp_path / "b.npy")]) == 2
