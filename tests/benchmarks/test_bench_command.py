"""`python -m benchmarks`: suites, reports, bad arguments, and the registry behind it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from snippets import ROOT

from benchmarks import __main__ as command
from benchmarks import implementations, peers, plots, run, suites
from benchmarks.__main__ import chosen, main, parse
from benchmarks.implementations import named
from benchmarks.workloads import BenchProblem
from fused_contrastive.core.errors import InputError

pytestmark = pytest.mark.usefixtures("not_interpreted")


@pytest.mark.full
def test_the_toy_suite_is_the_gpu_s_code_under_the_interpreter(tmp_path: Path) -> None:
    """It writes every file of a report, measures the Triton backend, and says why an implementation is not measured."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    arguments = [sys.executable, "-m", "benchmarks", "--suite", "toy", "--out", str(tmp_path / "made")]
    names = ["ours", "ours, memory_budget=0", "ours, everything kept", "eager"]
    arguments += ["--losses", "clip", "siglip", "--implementations", *names, "inf_cl"]  # test_gpu_day.py runs NT-Xent
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=600, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr + result.stdout
    made = json.loads((tmp_path / "made/toy.json").read_text())
    assert made["provenance"]["torch"] == torch.__version__
    measured = {(row["loss"], row["dtype"], row["implementation"]) for row in made["rows"] if "both" in row}
    for problem, _ in chosen(parse(arguments[3:])).timed:
        for name in names:
            assert (problem.loss, problem.dtype, name) in measured
    for row in made["rows"]:
        assert row["provenance"]["torch"] == torch.__version__
        assert ("both" in row or "extra_bytes" in row) == (row["status"] == "ok")
    text = (tmp_path / "made/toy.md").read_text()
    assert "| **ours** |" in text
    assert "- inf_cl: clip: needs cuda" in text
    assert text in result.stdout


def test_suites_name_what_exists() -> None:
    for make in suites.SUITES.values():
        suite = make()
        for problem in suite.problems:
            assert problem.torch_dtype
        losses = {problem.loss for problem in suite.problems}
        assert set(suite.only) <= {one.name for one in implementations.REGISTRY if one.loss in losses}
    keys = [(one.loss, one.name) for one in implementations.REGISTRY]
    assert len(keys) == len(set(keys))
    assert {("clip", "open_clip ClipLoss"), ("clip", "inf_cl"), ("siglip", "siglip_kernel")} <= set(keys)


def filtered(*arguments: str) -> suites.Suite:
    return chosen(parse(arguments))


def test_filters_leave_what_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    only = filtered(
        *("--suite", "gpu", "--losses", "clip", "siglip", "--n", "4096", "16384", "--d", "512", "--dtype", "bf16"),
        *("--implementations", "ours", "siglip_kernel"),
    )
    asked = [BenchProblem(loss, n, 512, "bf16", "cuda") for loss in ("clip", "siglip") for n in (4096, 16384)]
    assert [problem for problem, _ in only.timed] == only.memory == asked
    assert only.only == ("ours", "siglip_kernel")
    only = filtered("--suite", "gpu", "--implementations", "siglip_kernel")
    assert {problem.loss for problem in only.problems} == {"siglip"}
    assert filtered("--suite", "gpu") == suites.gpu()
    with pytest.raises(InputError, match=r"--suite million: the filters leave nothing of it; it has clip N = 1048576"):
        filtered("--suite", "million", "--implementations", "ours")


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "file").touch()
    for arguments, said in (
        (["--suite", "gpu"], "--suite gpu: needs a GPU, and torch sees none here"),
        (["--n", "9", "77"], "--suite quick: the filters leave nothing of it; it has clip N = 8, D = 512, fp32; "),
        (["--name", "a/b"], "--name: got 'a/b', expected a file's name"),
        (["--out", str(tmp_path / "file")], f"--out: got {tmp_path / 'file'}, expected a folder"),
    ):
        assert main(arguments) == 2
        assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_interrupted_run_leaves_the_earlier_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it had measured is written to another file. A report's name may have dots in it."""
    monkeypatch.setitem(suites.SUITES, "quick", lambda: suites.Suite([(BenchProblem("clip", 48, 24), 0.0)], []))
    monkeypatch.setattr(run, "REGISTRY", [named("clip", "ours")])
    arguments, path = ["--out", str(tmp_path), "--name", "v0.1.2"], tmp_path / "v0.1.2.json"
    assert main(arguments) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"v0.1.2.json", "v0.1.2.md"}
    before = path.read_text()

    def cut_short(suite: Any, say: Any, keep: Any) -> None:
        keep([{"implementation": "ours", "status": "ok"}])
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run_suite", cut_short)
    with pytest.raises(KeyboardInterrupt):
        main(arguments)
    assert path.read_text() == before
    assert len(json.loads((tmp_path / "v0.1.2.partial.json").read_text())["rows"]) == 1
    assert main(["--show", str(path)]) == 0
    assert main(["compare", str(path), str(path)]) == 0


@pytest.mark.parametrize("of_ours", [True, False])
def test_the_exit_status_is_ours(
    of_ours: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is 1 if something of ours was wrong or failed, and everything is written first; a peer may fail."""
    wrong = implementations.Implementation(
        "broken", "clip", lambda problem: lambda x, y, scale: (x + y).sum() * scale, ours=of_ours
    )
    monkeypatch.setitem(suites.SUITES, "quick", lambda: suites.Suite([(BenchProblem("clip", 48, 24), 0.0)], []))
    monkeypatch.setattr(run, "REGISTRY", [wrong, named("clip", "ours")])
    assert main(["--out", str(tmp_path)]) == (1 if of_ours else 0)
    statuses = [row["status"] for row in json.loads((tmp_path / "quick.json").read_text())["rows"]]
    assert statuses[0].startswith("WRONG: ")
    assert statuses[1] == "ok"
    assert "| **ours** |" in (tmp_path / "quick.md").read_text()
    assert ("broken, clip N = 48, D = 24, fp32: WRONG: loss" in capsys.readouterr().out) == of_ours


def test_a_library_s_module_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a library's __init__ cannot be imported, a module of it still can; no empty package stays in sys.modules."""
    folder = tmp_path / "half_a_library" / "loss"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("import nowhere_to_be_found")
    (folder / "__init__.py").write_text("")
    (folder / "own.py").write_text("from half_a_library.loss.helper import value")
    (folder / "helper.py").write_text("value = 3")
    monkeypatch.syspath_prepend(tmp_path)
    assert peers.module_alone("half_a_library.loss.own").value == 3
    assert not [name for name in sys.modules if name.startswith("half_a_library")]
    with pytest.raises(ImportError, match="No module named 'no_such_library'"):
        peers.module_alone("no_such_library.loss")


def test_pictures(tmp_path: Path) -> None:
    """Lines need two sizes; bars need two implementations with both time and memory at CLIP's largest N."""
    pytest.importorskip("matplotlib")
    base = {"loss": "clip", "dtype": "fp32", "d": 16, "status": "ok", "seconds": 1.0}
    made = [{**base, "n": n, "implementation": "ours", "extra_bytes": 2**20} for n in (64, 128)]
    assert plots.draw(made, tmp_path / "lines.png") == [tmp_path / "lines.png"]
    assert plots.draw(made[:1], tmp_path / "none.png") == plots.bars(made, tmp_path / "none.png") == []
    made.append({**made[1], "implementation": "eager"})
    assert plots.bars(made, tmp_path / "bars.png") == [tmp_path / "bars.png"]
    assert {path.name for path in tmp_path.iterdir()} == {"lines.png", "bars.png"}
