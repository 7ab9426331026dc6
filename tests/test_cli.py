"""``python -m fused_contrastive``: verify finds errors, info says what can run, temperature draws."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fused_contrastive.__main__ import main
from fused_contrastive.backends import cpp
from fused_contrastive.verification import run


@pytest.fixture(autouse=True)
def few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "QUICK_CASES", 60)


@pytest.fixture
def features(tmp_path: Path) -> list[str]:
    """Two files of 200 pairs."""
    generator = np.random.default_rng()
    x = generator.normal(size=(200, 12)).astype(np.float32)
    np.save(tmp_path / "a.npy", x)
    np.save(tmp_path / "b.npy", x + 0.3 * generator.normal(size=x.shape).astype(np.float32))
    return [str(tmp_path / "a.npy"), str(tmp_path / "b.npy")]


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    for part in (torch.__version__, "backend reference", "backend cpp", "vector level", "threads"):
        assert part in shown


def test_every_command_without_rich(
    features: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output is plain text, with the cells of a table in columns."""
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    figures, files = r"[\d.]+ +" * 4, " ".join(features)
    for command, line in (
        ("info", r"^threads  +\d+ of \d+ CPUs$"),
        ("plan --batch 32768 --dim 768 --world 8", rf"^32,768 +8  gather +{figures}fastest of ours$"),
        (f"verify --backend reference --features {files}", r"^backend    option  +cases  float32 "),
        (f"temperature {files} --no-picture", r"^ +0\.05 +20 +[\d.]+ +[\d.]+ +[\d.]+% "),
    ):
        assert main(command.split()) == 0
        shown = capsys.readouterr().out
        assert re.search(line, shown, re.MULTILINE), shown


def test_verify_holds(capsys: pytest.CaptureFixture[str], seed: int) -> None:
    assert main(["verify", "--device", "cpu", "--backend", "reference", "cpp", "--seed", str(seed)]) == 0
    shown = capsys.readouterr().out
    assert "error budget held: 0 breaches" in shown
    assert f"seed {seed}" in shown


def test_verify_notices_a_wrong_backend(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    right = cpp.BACKEND.stats_forward

    def wrong(spec, x, y):
        result = right(spec, x, y)
        return result._replace(row=result.row + 0.3)

    monkeypatch.setattr(cpp.BACKEND, "stats_forward", wrong)
    assert main(["verify", "--device", "cpu", "--backend", "cpp", "--seed", str(seed)]) == 1
    assert "BREACHED" in capsys.readouterr().out


def test_verify_own_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", np.random.default_rng().normal(size=(20, 12)).astype(np.float32))
    paths = [str(tmp_path / "a.npy"), str(tmp_path / "b.npy")]
    assert main(["verify", "--features", *paths, "--scale", "20"]) == 0
    assert "error budget held" in capsys.readouterr().out


def test_the_first_line_says_which_backends_are_tested(
    features: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It also says why each of the others is not tested; on random cases and on files."""
    monkeypatch.setattr(cpp, "_unavailable", "it was not built")
    monkeypatch.setattr(run, "LOSS_CASES", {"quick": 3})
    said = "on cpu: testing reference; not testing cpp (it was not built); triton ("
    for arguments in ([], ["--features", *features]):
        assert main(["verify", "--device", "cpu", "--backend", "reference", *arguments]) == 0
        assert capsys.readouterr().out.startswith(said)
    assert main(["verify", "--device", "cpu", "--backend", "cpp"]) == 2
    assert "--backend: backend 'cpp' cannot run here: it was not built" in capsys.readouterr().err


def test_why_a_backend_is_not_tested() -> None:
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert "testing cpp; not testing reference (not asked for); triton (" in str(run.Target(cpu, ("cpp",)))
    assert "cpp (it does not take tensors on meta)" in str(run.Target(meta, ("reference",)))
    assert str(run.Target(cpu, ("reference", "cpp", "triton"))).endswith("cpp, triton; no other backend")


def test_temperature(features: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    out = tmp_path / "sweep.png"
    assert main(["temperature", *features, "--mark", "0.07", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    for part in ("200 pairs", "temperature", "hardest 1", "0.005", "0.07"):
        assert part in shown
    data = out.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) > 20_000


def test_temperature_of_one_pair_and_its_negative(tmp_path: Path) -> None:
    """The smallest problem that has a picture: one negative, one temperature."""
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    np.save(tmp_path / "a.npy", np.eye(2))
    out = tmp_path / "sweep.png"
    paths = [str(tmp_path / "a.npy")] * 2
    assert main(["temperature", *paths, "--temperatures", "0.5", "--out", str(out)]) == 0
    assert out.is_file()


def test_temperature_by_scale_without_picture(features: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["temperature", *features, "--scales", "100", "4", "--no-picture"]) == 0
    shown = capsys.readouterr().out
    assert "0.25" in shown
    assert "picture" not in shown


def test_temperature_without_matplotlib(
    features: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "fused_contrastive.evaluation.picture", raising=False)
    monkeypatch.delattr("fused_contrastive.evaluation.picture", raising=False)
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["temperature", *features]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
    assert main(["temperature", *features, "--no-picture"]) == 0


@pytest.mark.parametrize("option", ["--temperatures", "--scales", "--mark"])
@pytest.mark.parametrize("value", ["0", "-0.1", "nan", "inf", "warm"])
def test_temperature_bad_value(
    option: str, value: str, features: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        main(["temperature", *features, f"{option}={value}"])
    assert error.value.code == 2
    assert f"argument {option}: got {value}, expected a finite number above 0" in capsys.readouterr().err


def test_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--batch", "1048576", "--dim", "768", "--world", "256", "--markdown"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| 1,048,576")]
    figures = {row[2]: row for row in rows}
    assert set(figures) == {"gather", "ring", "open_clip", "inf-cl, ring"}
    assert "fastest of ours" in figures["gather"][7]
    assert "does not fit" in figures["open_clip"][7]
    assert float(figures["gather"][4]) < 0.55 * float(figures["open_clip"][4])
    assert main(["plan", "--batch", "4194304", "--dim", "768", "--world", "8", "--memory", "0.1"]) == 1
    assert "fits with neither" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["plan", "--batch", "0", "--dim", "768", "--world", "8"])
