"""Comparing two reports of the benchmarks: a slowdown is shown, noise is not."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.workloads import BenchProblem


def made_up(
    seed: int, slower: float = 1.0, drift: float = 0.0, name: str = "ours", ours: bool = True
) -> dict[str, Any]:
    """A report of rounds that spread by a twentieth, one in ten twice as long. ``drift`` slows everything but u."""
    draw = random.Random(seed)
    rows = []
    for n in (128, 1024, 4096):
        u = [draw.gauss(1, 0.02) for _ in range(25)]
        for one, is_ours, factor in ((name, ours, slower if n == 1024 else 1.0), ("eager", False, 1.0)):
            rounds = [
                (1 + drift) * factor * 3 * draw.gauss(1, 0.05) * (2 if draw.random() < 0.1 else 1) for _ in range(25)
            ]
            row = {**asdict(BenchProblem("clip", n, 512)), "implementation": one, "ours": is_ours, "status": "ok"}
            rows.append({**row, "rounds": rounds, "u_rounds": u, "u_seconds": 2e-3})
    return {"command": "", "provenance": {"machine": "made up"}, "rows": rows}


@pytest.fixture
def compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def compare(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> tuple[int, str]:
        """Writes a folder of reports for each side and compares them."""
        for name, reports in (("old", old), ("new", new)):
            (tmp_path / name).mkdir(exist_ok=True)
            for k, report in enumerate(reports):
                (tmp_path / name / f"{k}.json").write_text(json.dumps(report))
            (tmp_path / name / "9.partial.json").write_text("{")
        code = main(["compare", str(tmp_path / "old"), str(tmp_path / "new")])
        shown = capsys.readouterr()
        return code, shown.out + shown.err

    return compare


@pytest.mark.parametrize("seed", range(5))
def test_a_slowdown_is_flagged_and_noise_is_not(seed: int, compared: Any) -> None:
    code, text = compared([made_up(seed)], [made_up(seed + 100, slower=1.3)])
    assert code == 1
    assert "| clip N = 1024, D = 512, fp32: ours | " in text
    assert "1 of ours slower" in text
    code, text = compared([made_up(seed)], [made_up(seed + 200, drift=0.03)])
    assert code == 0, text
    assert "0 of ours slower" in text


@pytest.mark.parametrize(("name", "ours"), [("another", False), ("ours, backend=reference", True)])
def test_a_slower_peer_or_reference_is_shown_and_no_failure(name: str, ours: bool, compared: Any) -> None:
    code, text = compared([made_up(1, name=name, ours=ours)], [made_up(2, slower=1.6, name=name, ours=ours)])
    assert code == 0
    assert f"1024, D = 512, fp32: {name}" in text
    assert "1 slower, 0 faster; 0 of ours slower" in text


def test_too_few_rounds_are_not_compared(compared: Any) -> None:
    new = made_up(2, slower=1.5)
    for row in new["rows"]:
        if row["n"] == 1024 or not row["ours"]:
            row |= {"rounds": row["rounds"][:3], "u_rounds": row["u_rounds"][:3]}
    code, text = compared([made_up(1)], [new])
    assert code == 0
    assert "2 rows of 5 rounds and more on both sides" in text
    assert compared([made_up(1)], [{**new, "rows": []}])[0] == 2


def test_the_rounds_of_a_folder_are_put_together(compared: Any, tmp_path: Path) -> None:
    whole = made_up(4, slower=1.3)
    part = {**whole, "rows": [row for row in whole["rows"] if row["ours"]]}
    code, text = compared([made_up(1), made_up(2)], [made_up(3, slower=1.3), part])
    assert code == 1, text
    assert "1 of ours slower" in text
    _, text = compared([made_up(1), {**made_up(5), "provenance": {"machine": "another"}}], [whole])
    assert "machine: ['another', 'made up'] and ['made up'], so u itself differs" in text


def test_what_can_no_longer_be_measured_is_a_regression(compared: Any) -> None:
    new = made_up(2)
    del new["rows"][0]["rounds"]
    new["rows"][0]["status"] = "not timed: 31 s a call"
    code, text = compared([made_up(1)], [new])
    assert code == 1
    assert "no longer measured: clip N = 128, D = 512, fp32: ours: not timed: 31 s a call" in text


def test_what_is_no_report_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.json"
    row = '{"loss": "clip", "implementation": "ours", "ours": true, "status": "ok"}'
    for text in ("{", "3", '{"rows": 3}', '{"command": "", "provenance": {}, "rows": [' + row + "]}", None):
        path.unlink() if text is None else path.write_text(text)
        for arguments in (["compare", str(path), str(path)], ["--show", str(path)]):
            assert main(arguments) == 2
            assert f"error: {path}: got no report of the benchmarks (" in capsys.readouterr().err
    assert main(["compare", str(tmp_path), str(tmp_path)]) == 2
    assert "got a folder without reports" in capsys.readouterr().err
