"""The command `bench`: suites, reports, what it refuses, and the registry behind it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fused_contrastive.__main__ import main
from fused_contrastive.bench import (
    command,
    implementations,
    peers,
    plots,
    report,
    run,
    suites,
)
from fused_contrastive.bench.implementations import named
from fused_contrastive.bench.provenance import provenance
from fused_contrastive.bench.workloads import WORKLOADS, Problem

pytestmark = pytest.mark.usefixtures("not_interpreted")


def cli(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fused_contrastive", *arguments],
        capture_output=True, text=True, timeout=600, cwd=cwd, env={**os.environ, **environment},
    )  # fmt: skip


def test_the_toy_suite_is_the_gpu_s_code_under_the_interpreter(tmp_path: Path) -> None:
    """Every file of a report, the Triton backend measured, and a reason for each implementation that is not."""
    pytest.importorskip("triton")
    result = cli(
        "bench", "--suite", "toy", "--out", "made", cwd=tmp_path, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES=""
    )
    assert result.returncode == 0, result.stderr + result.stdout
    made = json.loads((tmp_path / "made/toy.json").read_text())
    assert made["provenance"]["torch"] == torch.__version__
    measured = {(row["loss"], row["dtype"], row["implementation"]) for row in made["rows"] if "both" in row}
    for problem, _ in suites.toy().timed:
        for name in ("ours", "ours, memory_budget=0", "eager"):
            assert (problem.loss, problem.dtype, name) in measured
    for row in made["rows"]:
        assert row["provenance"]["torch"] == torch.__version__
        assert row["status"] == "ok" or len(row["status"]) > 5
        assert ("both" in row or "extra_bytes" in row) == (row["status"] == "ok")
    text = (tmp_path / "made/toy.md").read_text()
    assert "| **ours** |" in text
    assert "- inf_cl: clip: needs cuda" in text
    assert "not measured: inf_cl" in result.stdout


def test_suites_are_made_of_what_exists() -> None:
    for make in suites.SUITES.values():
        suite = make()
        for problem in (*(problem for problem, _ in suite.timed), *suite.memory):
            assert problem.loss in WORKLOADS
            assert problem.dtype in ("fp32", "bf16", "fp16")
        for name in suite.only:
            assert named("clip", name)
    only = command.chosen("cpu", {"losses": ["siglip"]})
    assert {problem.loss for problem, _ in only.timed} == {"siglip"}
    assert [problem.loss for problem in only.memory] == ["siglip"]


def test_filters_leave_what_was_asked() -> None:
    filters = {"losses": ["clip", "siglip"], "implementations": ["ours", "siglip_kernel"], "n": [4096, 16384]}
    only = command.chosen("gpu", {**filters, "d": [512], "dtype": ["bf16"]})
    asked = [Problem(loss, n, 512, "bf16", "cuda") for loss in ("clip", "siglip") for n in (4096, 16384)]
    assert [problem for problem, _ in only.timed] == only.memory == asked
    assert only.only == ("ours", "siglip_kernel")
    only = command.chosen("gpu", {"implementations": ["siglip_kernel"]})
    assert {problem.loss for problem, _ in only.timed} == {"siglip"}
    assert command.chosen("million", {"implementations": ["ours, memory_budget=0", "ours"]}).only == (
        "ours, memory_budget=0",
    )
    assert command.chosen("gpu", {}) == suites.gpu()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_suite_for_a_gpu_says_that_there_is_none(tmp_path: Path) -> None:
    result = cli("bench", "--suite", "gpu", cwd=tmp_path)
    assert result.returncode == 2
    assert "--suite gpu: needs a GPU, and torch sees none here" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_every_implementation_is_registered_once() -> None:
    keys = [(i.loss, i.name) for i in implementations.REGISTRY]
    assert len(keys) == len(set(keys))
    assert {"open_clip ClipLoss", "inf_cl", "memeff", "2 x cut_cross_entropy"} <= {
        n for loss, n in keys if loss == "clip"
    }


def test_a_library_s_module_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a library's __init__ cannot be imported its module is, unchanged, and no bare package stays behind."""
    folder = tmp_path / "half_a_library" / "loss"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("import nowhere_to_be_found")
    (folder / "__init__.py").write_text("")
    (folder / "own.py").write_text("from half_a_library.loss.helper import value")
    (folder / "helper.py").write_text("value = 3")
    monkeypatch.syspath_prepend(tmp_path)
    assert peers.module_alone("half_a_library.loss.own").value == 3
    assert not [name for name in sys.modules if name.startswith("half_a_library")]
    with pytest.raises(ImportError, match="nowhere_to_be_found"):
        __import__("half_a_library")
    with pytest.raises(ImportError, match="No module named 'no_such_library'"):
        peers.module_alone("no_such_library.loss")


def test_a_report_survives_an_interrupted_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    report.write_json({"a": 1, "rows": [1]}, path)
    whole = Path.write_text

    def cut_short(self: Path, text: str) -> None:
        whole(self, text[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", cut_short)
    with pytest.raises(KeyboardInterrupt):
        report.write_json({"a": 1, "rows": [2]}, path)
    assert json.loads(path.read_text()) == {"a": 1, "rows": [1]}


def test_an_interrupted_run_leaves_the_earlier_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it measured beside it. Names with dots are names."""
    monkeypatch.setitem(suites.SUITES, "quick", lambda: suites.Suite([(Problem("clip", 48, 24), 1.0)], []))
    monkeypatch.setattr(run, "REGISTRY", [named("clip", "ours")])
    arguments = ["bench", "--out", str(tmp_path), "--name", "v0.1.2"]
    assert main(arguments) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"v0.1.2.json", "v0.1.2.md"}
    before = (tmp_path / "v0.1.2.json").read_text()

    def cut_short(suite: Any, console: Console, keep: Any, speed: float) -> None:
        keep([{"implementation": "ours", "status": "ok"}])
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run_suite", cut_short)
    with pytest.raises(KeyboardInterrupt):
        main(arguments)
    assert (tmp_path / "v0.1.2.json").read_text() == before
    assert len(json.loads((tmp_path / "v0.1.2.partial.json").read_text())["rows"]) == 1
    assert main(["bench", "--show", str(tmp_path / "v0.1.2.json")]) == 0
    assert main(["compare", str(tmp_path / "v0.1.2.json"), str(tmp_path / "v0.1.2.json")]) == 0


@pytest.mark.parametrize("of_ours", [True, False])
def test_the_exit_status_is_ours(
    of_ours: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """1 where something of ours was wrong or failed, after everything was written; a peer may fail."""

    def wrong(problem: Problem) -> Any:
        return lambda x, y, scale: (x + y).sum() * scale

    broken = implementations.Implementation("broken", "clip", wrong, ours=of_ours)
    monkeypatch.setitem(suites.SUITES, "quick", lambda: suites.Suite([(Problem("clip", 48, 24), 0.0)], []))
    monkeypatch.setattr(run, "REGISTRY", [broken, named("clip", "ours")])
    assert main(["bench", "--out", str(tmp_path)]) == (1 if of_ours else 0)
    statuses = [row["status"] for row in json.loads((tmp_path / "quick.json").read_text())["rows"]]
    assert statuses[0].startswith("WRONG: ")
    assert statuses[1] == "ok"
    assert "| **ours** |" in (tmp_path / "quick.md").read_text()
    said = " ".join(capsys.readouterr().out.split())
    assert ("broken, clip N = 48, D = 24, fp32: WRONG: loss" in said) == of_ours
    assert main(["bench", "--show", str(tmp_path / "quick.json")]) == 0


def test_bad_arguments_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("")
    (tmp_path / "old.json").write_text('{"command": "", "provenance": {}, "rows": [{"loss": "clip"}]}')
    for arguments, said in (
        (["bench", "--losses", "max_sim"], "--losses: got max_sim, expected some of clip, info_nce, nt_xent"),
        (["bench", "--n", "9", "77"], "--n: got 9, 77, expected some of 8, 128, 1024, 2048, 4096: --suite quick"),
        (["bench", "--d", "3"], "--d: got 3, expected some of 512, 256: --suite quick"),
        (["bench", "--dtype", "bf16"], "--dtype: got bf16, expected some of fp32: --suite quick"),
        (
            ["bench", "--losses", "siglip", "--n", "8"],
            "--n: got 8, expected some of 1024: --suite quick --losses siglip",
        ),
        (
            ["bench", "--suite", "million", "--implementations", "ours"],
            "--implementations: got ours, expected some of 'ours, memory_budget=0': --suite million",
        ),
        (["bench", "--out", str(file)], f"--out: got {file}, expected a folder"),
        (
            ["bench", "--show", str(tmp_path / "old.json")],
            "got no 'dtype', expected a report of this version's `bench`",
        ),
    ):
        assert main(arguments) == 2
        assert said in " ".join(capsys.readouterr().err.split())


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "not a clone" in provenance()["fused_contrastive"]


def test_bars_of_clip_at_the_largest_n(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whoever has both time and memory there; without two of them, no picture."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(pyplot, "close", lambda figure: None)

    def rows(n: int, name: str, **known: float) -> list[dict[str, Any]]:
        base = {"loss": "clip", "dtype": "fp32", "d": 16, "n": n, "implementation": name, "status": "ok"}
        return [{**base, quantity: value} for quantity, value in known.items()]

    made = [
        *rows(64, "ours", seconds=1.0, extra_bytes=2**20), *rows(64, "eager", seconds=3.0, extra_bytes=5 * 2**20),
        *rows(64, "slow", seconds=9.0), *rows(128, "ours", seconds=1.0),
    ]  # fmt: skip
    assert plots.draw_largest(made, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 0
    time, memory = pyplot.gcf().axes
    assert [label.get_text() for label in time.get_yticklabels()] == ["ours", "eager"]
    assert [[bar.get_width() for bar in axis.patches] for axis in (time, memory)] == [[1, 3], [1, 5]]
    assert not plots.draw_largest(made[-2:], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
