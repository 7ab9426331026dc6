"""Comparing two reports of the benchmark: a slowdown is told, noise is not."""

from __future__ import annotations

import io
import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fused_contrastive.__main__ import main
from fused_contrastive.bench import compare, read
from fused_contrastive.bench.workloads import Problem


def made_up(seed: int, slower: float = 1.0, drift: float = 0.0) -> dict[str, Any]:
    """A report of noisy rounds: a spread of a twentieth, one in ten twice as long. ``drift`` is of all but u."""
    draw = random.Random(seed)
    rows = []
    for n in (128, 1024, 4096):
        u = [draw.gauss(1, 0.02) for _ in range(25)]
        for name in ("ours", "eager"):
            factor = (slower if name == "ours" and n == 1024 else 1.0) * (1 + drift)
            rounds = [factor * 3 * draw.gauss(1, 0.05) * (2 if draw.random() < 0.1 else 1) for _ in range(25)]
            rows.append({
                **asdict(Problem("clip", n, 512)), "implementation": name, "ours": name == "ours", "status": "ok",
                "rounds": rounds, "u_rounds": u, "u_seconds": 2e-3 * (1 + drift / 3),
            })  # fmt: skip
    return {"command": "", "provenance": {"machine": "made up"}, "rows": rows}


def without(made: dict[str, Any], name: str) -> dict[str, Any]:
    return {**made, "rows": [row for row in made["rows"] if row["implementation"] != name]}


def compared(tmp_path: Path, old: dict[str, Any], new: dict[str, Any]) -> tuple[int, str]:
    for name, made in (("old", old), ("new", new)):
        (tmp_path / f"{name}.json").write_text(json.dumps(made))
    console = Console(record=True, width=160, file=io.StringIO())
    code = compare.compare(tmp_path / "old.json", tmp_path / "new.json", compare.TOLERANCE, console)
    return code, console.export_text()


def test_a_slower_reference_is_told_but_no_failure(tmp_path: Path) -> None:
    reports = made_up(5), made_up(105, slower=1.6)
    for made in reports:
        for row in made["rows"]:
            if row["ours"]:
                row["implementation"] = "ours, backend=reference"
    code, text = compared(tmp_path, *reports)
    assert code == 0, text
    assert "1024, D = 512, fp32: ours, backend=reference" in text
    assert "0 of ours slower" in text


@pytest.mark.parametrize("seed", range(5))
def test_a_slowdown_is_flagged_and_noise_is_not(seed: int, tmp_path: Path) -> None:
    code, text = compared(tmp_path, made_up(seed), made_up(seed + 100, slower=1.3))
    assert code == 1
    assert "clip N = 1024, D = 512, fp32: ours" in text
    assert "1 of ours slower" in text
    code, text = compared(tmp_path, made_up(seed), made_up(seed + 200, drift=0.03))
    assert code == 0, text
    assert "0 of ours slower" in text


def test_a_speed_up_or_a_slower_peer_is_told_but_no_failure(tmp_path: Path) -> None:
    code, text = compared(tmp_path, made_up(1, slower=1.5), made_up(2))
    assert code == 0
    assert "0 slower, 1 faster" in text
    reports = made_up(1), made_up(2, slower=1.5)
    for made in reports:
        for row in made["rows"]:
            if row["ours"]:
                row |= {"ours": False, "implementation": "another"}
    code, text = compared(tmp_path, *reports)
    assert code == 0
    assert "1024, D = 512, fp32: another" in text
    assert "1 slower, 0 faster" in text


def test_too_few_rounds_are_told(tmp_path: Path) -> None:
    new = made_up(2, slower=1.5)
    for row in new["rows"]:
        if row["n"] == 1024 or (row["n"] == 4096 and not row["ours"]):  # slow peers are seldom timed
            row |= {"rounds": row["rounds"][:3], "u_rounds": row["u_rounds"][:3]}
    code, text = compared(tmp_path, made_up(1), new)
    assert code == 0
    assert "3 rows of 5 rounds and more on both sides" in text


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ({"u_rounds": None}, "rounds without 'u_rounds'"),
        ({"u_seconds": None}, "rounds without 'u_seconds'"),
        ({"u_rounds": [1.0]}, "25 rounds and 1 of u"),
        ({"rounds": "x"}, "rounds 'x'"),
        ({"rounds": [0.0] * 25}, "a time of 0.0"),
        ({"rounds": [[]] * 25}, "a time of []"),
        ({"u_seconds": "x"}, "a time of 'x'"),
        ({"u_rounds": [float("inf")] * 25}, "a time of inf"),
    ],
)
def test_a_report_that_cannot_be_compared_is_refused(
    damage: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of an earlier version, or a damaged one."""
    old = made_up(1)
    old["rows"][0] = {name: value for name, value in (old["rows"][0] | damage).items() if value is not None}
    (tmp_path / "old.json").write_text(json.dumps(old))
    (tmp_path / "new.json").write_text(json.dumps(made_up(2)))
    assert main(["compare", str(tmp_path / "old.json"), str(tmp_path / "new.json")]) == 2
    assert f"old.json: got {told}, expected" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("slower", [1.0, 1.3])
def test_a_side_may_be_a_folder(slower: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rounds of its reports are put together."""
    made = {
        "old": [made_up(1), made_up(2)],
        "new": [made_up(3, slower=slower), without(made_up(4, slower=slower), "eager")],
    }
    for name, reports in made.items():
        (tmp_path / name).mkdir()
        for k, report in enumerate(reports):
            (tmp_path / name / f"{k}.json").write_text(json.dumps(report))
        (tmp_path / name / "2.partial.json").write_text("{")
    code = main(["compare", str(tmp_path / "old"), str(tmp_path / "new")])
    text = " ".join(capsys.readouterr().out.split())
    assert code == (1 if slower > 1 else 0), text
    assert f"{int(slower > 1)} of ours slower" in text
    (tmp_path / "empty").mkdir()
    assert main(["compare", str(tmp_path / "old"), str(tmp_path / "empty")]) == 2
    assert "empty: got a folder without reports" in " ".join(capsys.readouterr().err.split())
    other = {**made_up(5), "provenance": {"machine": "another"}}
    (tmp_path / "old" / "other.json").write_text(json.dumps(other))
    main(["compare", str(tmp_path / "old"), str(tmp_path / "new")])
    assert "machine: ['another', 'made up'] and ['made up'], so u itself differs" in " ".join(
        capsys.readouterr().out.split()
    )


def test_what_can_no_longer_be_measured_is_a_regression(tmp_path: Path) -> None:
    new = made_up(2)
    del new["rows"][0]["rounds"]
    new["rows"][0]["status"] = "not timed: 31 s a call"
    code, text = compared(tmp_path, made_up(1), new)
    assert code == 1
    assert "no longer measured: clip N = 128, D = 512, fp32: ours: not timed: 31 s a call" in text


def test_compare_refuses_what_is_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text('{"rows": 3}')
    with pytest.raises(ValueError, match=r"a.json: got no JSON.*expected a report of `bench`"):
        read.load(tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"b.json: got JSON without rows"):
        read.load(tmp_path / "b.json")
    (tmp_path / "c.json").write_text(json.dumps({"command": "", "provenance": {}, "rows": [3]}))
    with pytest.raises(ValueError, match=r"c.json: got no row, but 3, expected a report"):
        read.load(tmp_path / "c.json")
    (tmp_path / "d.json").write_text(json.dumps({"command": "", "provenance": [], "rows": []}))
    with pytest.raises(ValueError, match=r"d.json: got provenance \[\], expected a report"):
        read.load(tmp_path / "d.json")
    assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / "nowhere.json")]) == 2
    assert "a.json: got no JSON" in " ".join(capsys.readouterr().err.split())
    empty = {"command": "", "provenance": {}, "rows": []}
    assert compared(tmp_path, empty, empty)[0] == 2
