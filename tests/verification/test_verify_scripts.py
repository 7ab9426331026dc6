"""The script that ``verify`` prints for a breach repeats it in a separate process, as long as the backend is broken."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import processes
import pytest
import torch

from fused_contrastive.__main__ import main
from fused_contrastive.backends import cpp
from fused_contrastive.testing.cases import Case
from fused_contrastive.testing.maker import Sizes
from fused_contrastive.verification import run
from fused_contrastive.verification.script import script

# Makes the gradients of the C++ backend three times too large.
BREAK = """
from fused_contrastive.backends.cpp import BACKEND
from fused_contrastive.core.spec import Gradients
right_backward, right_loss = BACKEND.stats_backward, BACKEND.row_loss
def wrong_backward(*args, **options):
    return Gradients(*(None if g is None else 3 * g for g in right_backward(*args, **options)))
def wrong_loss(*args):
    loss, ranks = right_loss(*args)
    return 3 * loss - 2 * loss.detach(), ranks
BACKEND.stats_backward, BACKEND.row_loss = wrong_backward, wrong_loss
"""


def run_script(path: Path, broken: bool) -> subprocess.CompletedProcess[str]:
    start = f"import runpy\n{BREAK if broken else ''}\nrunpy.run_path({str(path)!r}, run_name='__main__')"
    return processes.run(start)


def assert_repeats(path: Path) -> None:
    """Asserts that the script exits with 1 and names the breach if the backend is broken, and else with 0."""
    text = path.read_text()
    imports = [line for line in text.splitlines() if line.startswith(("import ", "from "))]
    assert {line.split()[1].split(".")[0] for line in imports} <= {
        "sys", "dataclasses", "pathlib", "torch", "fused_contrastive"
    }  # fmt: skip
    result = run_script(path, broken=True)
    assert result.returncode == 1, result.stdout + result.stderr
    assert not result.stderr
    assert "BREACH" in result.stdout
    assert "cpp" in result.stdout
    assert "float64" in result.stdout
    result = run_script(path, broken=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "BREACH" not in result.stdout


CASES = {
    "clip": Case("clip", "decoupled smoothed", Sizes(17, 64, torch.bfloat16, 14.3), 2**31 + 7),
    "loss": Case("nt_xent", "three views", Sizes(17, 3, torch.float64, 14.3, duplicates=True), 11),
}


@pytest.mark.parametrize("name", CASES)
def test_script_of_a_case(name: str, tmp_path: Path) -> None:
    path = tmp_path / "breach.py"
    path.write_text(script(CASES[name], "cpp", torch.device("cpu")))
    assert str(CASES[name]) in path.read_text()
    assert_repeats(path)


def test_script_of_own_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script finds the files from any folder, and compares them."""
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", np.random.default_rng().normal(size=(20, 4)).astype(np.float32))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "breach.py"
    case = Case("clip", "plain", Sizes(20, 4, torch.float32, 2.0), 0)
    path.write_text(script(case, "cpp", torch.device("cpu"), (Path("a.npy"), Path("b.npy"))))
    monkeypatch.undo()
    assert_repeats(path)
    (tmp_path / "a.npy").unlink()
    assert "a.npy" in run_script(path, broken=False).stderr


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stats_backward", "row_loss"):  # monkeypatch restores them
        monkeypatch.setattr(cpp.BACKEND, name, getattr(cpp.BACKEND, name))
    exec(BREAK, {})


@pytest.fixture
def few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "QUICK_CASES", 40)
    monkeypatch.setattr(run, "LOSS_CASES", {"quick": 20})


def test_verify_prints_and_saves(
    broken: None, few_cases: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    saved = tmp_path / "new" / "folder"
    assert main(["verify", "--device", "cpu", "--backend", "cpp", "--seed", str(seed), "--save", str(saved)]) == 1
    shown = capsys.readouterr().out
    paths = sorted(saved.iterdir())
    assert [path.name for path in paths] == ["breach_1.py", "breach_2.py", "breach_3.py"]
    assert shown.count("sys.exit(") == 3
    for path in paths:
        assert path.read_text() in shown
    assert "more cases breach the budget, whose scripts are not shown" in shown
    assert_repeats(paths[2])


def test_scripts_are_of_the_smallest_cases_of_each_option(broken: None) -> None:
    sizes = (64, 7, 17)
    cases = [Case("clip", option, Sizes(n, 3, torch.float32, 1.0), 0) for n in sizes for option in ("plain", "sum")]
    report = run.Report()
    run.check(cases, run.target("cpu", ["cpp", "reference"]), report)
    assert len(report.failed) == 6
    assert [(case.sizes.n, case.option, backend) for case, backend in report.simplest()] == [
        (7, "clip plain", "cpp"), (7, "clip sum", "cpp"),
    ]  # fmt: skip


def test_nothing_is_printed_or_saved_where_the_budget_holds(
    few_cases: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "folder"
    assert main(["verify", "--device", "cpu", "--backend", "cpp", "--save", str(saved)]) == 0
    assert "sys.exit(" not in capsys.readouterr().out
    assert not saved.exists()


def test_save_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file"
    path.touch()
    assert main(["verify", "--device", "cpu", "--backend", "cpp", "--save", str(path)]) == 2
    assert "expected a folder" in capsys.readouterr().err.replace("\n", "")
