"""`benchmarks/gpu_day.py` ends in time and writes a page, whatever its stages do; at toy sizes its stages run."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from snippets import ROOT

from benchmarks import gpu_day
from benchmarks.__main__ import chosen, parse
from benchmarks.implementations import REGISTRY
from benchmarks.workloads import WORKLOADS

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="stops processes by POSIX signals")
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU")


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Restores the signal handlers after the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)}
    yield
    signal.alarm(0)
    for number, handler in before.items():
        signal.signal(number, handler)


def a_day(script: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, stages by name and page of a run whose processes run ``script``."""
    monkeypatch.setattr(sys, "argv", [str(script)])
    code = gpu_day.main(["--toy", "--out", str(out), *arguments])
    stages = {stage["stage"]: stage for stage in json.loads((out / "gpu-day.json").read_text())["rows"]}
    return code, stages, (out / "gpu-day.md").read_text()


@pytest.mark.full
@INTERPRETED
def test_toy_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All stages but the last two, which run the same benchmarks as the table."""
    pytest.importorskip("triton")
    asked = ["correctness", "tests", "table", "tune"]
    script = ROOT / "benchmarks/gpu_day.py"
    code, stages, page = a_day(script, tmp_path, monkeypatch, "--minutes", "9", "--stage", *asked)
    assert code == 0, page
    assert list(stages) == asked
    for name, stage in stages.items():
        assert stage["status"] == "done", f"{name}: {stage}"
        assert f"## {name}: done, " in page
    rows = {name: {e["row"] for e in stage["entries"] if "value" in e} for name, stage in stages.items()}
    assert rows["correctness"] == {f"{loss}, memory_budget=0" for loss in gpu_day.LOSSES}
    assert {e["column"] for e in stages["correctness"]["entries"]} == {"bf16"}
    assert set(stages["tests"]["entries"][0]["counts"]) == {"PASSED"}
    measured = {f"nt_xent: {name}" for name in ("ours", "ours, memory_budget=0", "ours, everything kept", "eager")}
    assert rows["table"] >= {"nt_xent: u", *measured, *(f"{row}, forward" for row in measured)}
    assert {"half statistics", "half gradient", "half sums"} <= {row.partition(" bfloat16")[0] for row in rows["tune"]}
    assert "- nt_xent: lightly NTXentLoss: " in page or "nt_xent: lightly NTXentLoss" in rows["table"]
    assert f"torch {torch.__version__}" in page


STAGES = """
import os, subprocess, sys, time
sys.path.insert(0, {root!r})
from benchmarks import gpu_day

def fine(turn):
    yield {{"row": "step", "column": "bf16", "status": "ok", "value": "0.25"}}

def wrong(turn):
    yield from fine(turn)
    yield {{"row": "step", "column": "fp16", "status": "WRONG: dx is off by 1e-1, allowed 1e-3", "value": "99.00"}}

def crashes(turn):
    yield from fine(turn)
    print("the device is lost", flush=True)
    os._exit(7)

def hangs(turn):
    yield from fine(turn)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    yield {{"row": "child", "column": "bf16", "status": "ok", "value": str(child.pid)}}
    time.sleep(1000)

def raises(turn):
    yield from fine(turn)
    raise RuntimeError("no such kernel")

gpu_day.SPARE = 0.5
gpu_day.STAGES.update(correctness=wrong, tests=fine, table=crashes, tune=hangs, million=raises, peers=fine)
sys.exit(gpu_day.main())
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script whose stages fail in every way."""
    monkeypatch.setattr(gpu_day, "LEAST", 1.0)
    monkeypatch.setattr(gpu_day, "SPARE", 0.5)
    path = tmp_path / "script.py"
    path.write_text(STAGES.format(root=str(ROOT)))
    return path


def test_a_stage_that_fails_leaves_the_others(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, stages, page = a_day(script, tmp_path / "made", monkeypatch, "--minutes", "0.25")
    assert code == 1
    status = {name: stage["status"] for name, stage in stages.items()}
    assert status.pop("tune").startswith("failed: stopped after ")
    assert status == {
        "correctness": "done",
        "tests": "done",
        "table": "failed: exited with 7, and said 'the device is lost'",
        "million": "failed: exited with 1, and said 'RuntimeError: no such kernel'",
        "peers": "done",
    }
    for stage in stages.values():  # the entries from before the failure
        assert stage["entries"][0]["value"] == "0.25"
    assert "## table: failed: exited with 7, and said 'the device is lost'" in page
    assert "| step | 0.25 | 99.00 **!** |" in page
    assert "- step: WRONG: dx is off by 1e-1, allowed 1e-3 (fp16)" in page
    child = int(stages["tune"]["entries"][1]["value"])
    for _ in range(100):  # killed, but the process that inherited it may not have reaped it yet
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rsplit(")")[-1].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        pytest.fail("what a stage had started runs on")


def test_the_exit_code_is_that_of_correctness(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, stages, _ = a_day(script, tmp_path / "made", monkeypatch, "--stage", "table", "tests", "--minutes", "0.2")
    assert code == 0
    assert list(stages) == ["tests", "table"]
    code, stages, page = a_day(script, tmp_path / "made", monkeypatch, "--stage", "tests", "--minutes", "0.01")
    assert code == 1
    assert stages["tests"]["status"] == "not started: 0 s left"
    assert "## tests: not started: 0 s left, 0 s" in page


def test_the_suites_have_what_a_gpu_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The filters of each stage leave some problems of the GPU suites, which the toy sizes do not show."""
    asked: dict[str, list[tuple[str, int, int]]] = {}

    def command(turn: gpu_day.Turn, *arguments: str, **environment: str) -> gpu_day.Entry:
        options = parse(arguments[2:])
        asked[options.name] = [(problem.loss, problem.n, problem.d) for problem, _ in chosen(options).timed]
        return {"status": "ok", "said": ""}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_day, "command", command)
    for stage in (gpu_day.table, gpu_day.million, gpu_day.peers):
        list(stage(gpu_day.Turn(0.0, False, None, tmp_path)))
    assert len(asked["gpu-day-table"]) == 27
    assert asked["gpu-day-million"] == [("clip", 2**20, 512)]
    assert asked["gpu-day-peers"] == [("clip", 16384, 512), ("siglip", 16384, 512)]
    known = {one.name for one in REGISTRY if one.loss in ("clip", "siglip")}
    assert known - set(gpu_day.PEERS) == {"torch.compile(eager)", "ours, backend=reference", "ours, everything kept"}


def turn(seconds: float = 60.0) -> gpu_day.Turn:
    return gpu_day.Turn(time.monotonic() + seconds, True, None, Path())


@INTERPRETED
def test_a_wrong_value_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    right, calls = WORKLOADS["clip"], iter(range(9))

    def status(ours: Any) -> str:
        monkeypatch.setitem(WORKLOADS, "clip", replace(right, ours=ours))
        return next(gpu_day.correctness(turn()))["status"]  # type: ignore[no-any-return]

    def no_room(*leaves: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("no room for G")

    assert status(right.ours) == "ok"
    assert status(lambda *leaves, **options: 1.1 * right.ours(*leaves, **options)).startswith("WRONG: loss is off by")
    unsteady = status(lambda *leaves, **options: (1 + 1e-6 * next(calls)) * right.ours(*leaves, **options))
    assert unsteady.startswith("WRONG: two runs differ in loss")
    assert status(no_room) == "out of memory: OutOfMemoryError: no room for G"
    assert {entry["status"] for entry in gpu_day.correctness(turn(0))} == {"not started: no time left"}


def test_a_command_that_is_stopped_has_said_something() -> None:
    code = "import time; print('tests/a.py::test_b PASSED [ 50%]', flush=True); time.sleep(1000)"
    ended = gpu_day.command(turn(1.5), "-c", code)
    assert ended["status"].startswith("failed: stopped after ")
    assert "PASSED" in ended["said"]
    assert gpu_day.command(turn(), "-c", "raise SystemExit(3)")["status"] == "failed: exited with 3"


@pytest.mark.parametrize(
    ("lines", "status", "value"),
    [
        (["tests/a.py::b PASSED [ 50%]", "tests/a.py::c[FAILED] PASSED [100%]", "2 passed"], "ok", "2 passed"),
        (["[gw3] [ 50%] FAILED tests/a.py::b", "[gw1] [100%] PASSED tests/a.py::c", "FAILED tests/a.py::b"],
         "failed: exited with 1", "1 failed, 1 passed"),
        (["tests/a.py::b SKIPPED [100%]"], "failed: no test ran", "1 skipped"),
        ([], "failed: stopped after 9 s", ""),
    ],
)  # fmt: skip
def test_counts_of_tests(lines: list[str], status: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = {"status": "ok" if "no test" in status else status, "said": "\n".join(lines)}
    monkeypatch.setattr(gpu_day, "command", lambda *arguments: dict(ended))
    (entry,) = gpu_day.tests(turn())
    assert (entry["status"], entry["value"]) == (status, value)


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_day.main(["--out", str(tmp_path)]) == 2
    assert "needs a GPU, and torch" in capsys.readouterr().out
    (tmp_path / "file").write_text("")
    if gpu_day.cannot_start(toy=True) is None:
        assert gpu_day.main(["--toy", "--out", str(tmp_path / "file")]) == 2
        assert f"--out: got {tmp_path / 'file'}, expected a folder" in capsys.readouterr().out
    for arguments in (["--stage", "tset"], ["--minutes", "0"], ["--minutes", "nan"]):
        with pytest.raises(SystemExit) as error:
            gpu_day.main(arguments)
        assert error.value.code == 2
    monkeypatch.setattr(gpu_day.importlib.util, "find_spec", lambda name: None if name == "triton" else name)
    assert gpu_day.main(["--toy", "--out", str(tmp_path)]) == 2
    assert "gpu_day: needs the package triton" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
