"""FUSED_CONTRASTIVE_AUTOTUNE=1 measures, reports its choice and stores it on disk. Kernels are interpreted."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import processes
import pytest
import torch

from fused_contrastive.backends.triton import configs
from fused_contrastive.core import warn

CODE = """
import torch
from fused_contrastive import clip_loss
x, y = (torch.randn(70, 20).to(torch.bfloat16).requires_grad_() for _ in range(2))
before = torch.get_rng_state()
for budget in (0, 10**6):
    loss = clip_loss(x, y, 5.0, backend="triton", memory_budget=budget)
    loss.backward()
    torch.testing.assert_close(loss, clip_loss(x, y, 5.0, backend="cpp"))
assert torch.equal(before, torch.get_rng_state()), "tuning drew from the caller's random numbers"
"""


def run(cache: Path) -> str:
    environment = {
        "TRITON_INTERPRET": "1", "FUSED_CONTRASTIVE_AUTOTUNE": "1", "XDG_CACHE_HOME": str(cache),
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    result = processes.run(CODE, **environment)
    assert result.returncode == 0, result.stderr
    return result.stderr


def test_tunes_once_and_remembers(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    said = run(tmp_path)
    (file,) = (tmp_path / "fused_contrastive").iterdir()
    chosen = json.loads(file.read_text())
    for kernel in ("statistics", "gradient", "kept"):
        key = f"half {kernel} bfloat16 D=64"
        assert f"tuned {key} on interpreter: Config(block_m=" in said
        assert set(chosen[key]) == set(configs.Config._fields)
    assert "tuned" not in run(tmp_path)


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The module ``tune``, with the last candidate always the fastest, no cache yet and no warning given yet."""
    pytest.importorskip("triton")
    from fused_contrastive.backends.triton import tune

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tune, "_measure", lambda trial, work: {c: -float(i) for i, c in enumerate(trial.candidates)})
    monkeypatch.setattr(warn, "_told", set())
    tune._tuned.cache_clear()
    yield tune
    tune._tuned.cache_clear()


def trial_of(tune: Any, kernel: str = "statistics") -> Any:
    from fused_contrastive.backends.triton import device

    return tune.Trial(device._INTERPRETER, "gemm", kernel, torch.float32, 64)


def tuned(tune: Any, kernel: str = "statistics") -> configs.Config:
    """The configuration that another process would choose."""
    tune._tuned.cache_clear()
    chosen = tune._tuned(trial_of(tune, kernel), None)
    assert chosen == trial_of(tune, kernel).candidates[-1]
    assert all(type(value) is int for value in chosen)
    return chosen


KEY = "gemm statistics float32 D=64"
WHOLE = configs.Config(64, 32, 32, 4, 1, group=2, strip=4)._asdict()
DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "got no JSON (Expecting value"),
    "cut short": (json.dumps({KEY: WHOLE}).encode()[:-9], "got no JSON ("),
    "bytes": (b"\xff\xfe", "got no JSON ('utf-8' codec"),
    "nested": (b"[" * 100_000, "got no JSON (maximum recursion depth"),
    "list": (b"[]", "got a JSON list, expected configurations by kernel"),
    "null": (b"null", "got a JSON NoneType, expected"),
    "entry missing": (json.dumps({KEY: None}).encode(), f"'{KEY}': expected the integers block_m, block_n, "),
    "foreign": (json.dumps({KEY: {"block_m": 64}}).encode(), f"'{KEY}': expected the integers block_m, block_n, "),
    "one more": (json.dumps({KEY: {**WHOLE, "depth": 3}}).encode(), f"'{KEY}': expected the integers block_m"),
    "floats": (json.dumps({KEY: {**WHOLE, "warps": 4.0}}).encode(), f"'{KEY}': expected the integers block_m"),
    "booleans": (json.dumps({KEY: {**WHOLE, "stages": True}}).encode(), f"'{KEY}': expected the integers block_m"),
    "another entry": (json.dumps({"foreign": {"a": 2}}).encode(), "'foreign': expected the integers block_m"),
    "group of 0": (
        json.dumps({KEY: {**WHOLE, "group": 0}}).encode(),
        "group=0, strip=4, split=0, fold=0) for gemm ",
    ),
    "tile of 48": (json.dumps({KEY: {**WHOLE, "block_m": 48}}).encode(), "got Config(block_m=48, block_n=32"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named_once_and_replaced(name: str, tune: Any, recwarn: pytest.WarningsRecorder) -> None:
    data, said = DAMAGED[name]
    path = tune.cache_file(trial_of(tune).device)
    path.parent.mkdir()
    path.write_bytes(data)
    tuned(tune)
    tuned(tune, "gradient")
    (told,) = [str(warning.message) for warning in recwarn]
    assert told.startswith(f"fused_contrastive: FUSED_CONTRASTIVE_AUTOTUNE=1: {path}: ")
    assert said in told
    assert set(json.loads(path.read_text())) == {KEY, "gemm gradient float32 D=64"}
    warn._told.clear()
    tuned(tune)
    assert len(recwarn) == 1
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_whole_file_is_taken_and_kept(tune: Any, recwarn: pytest.WarningsRecorder, monkeypatch: Any) -> None:
    path = tune.cache_file(trial_of(tune).device)
    path.parent.mkdir()
    kept = {"half sums bfloat16 D=512": WHOLE}
    table = trial_of(tune).candidates[0]
    path.write_text(json.dumps({**kept, KEY: table._asdict()}))
    tune._tuned.cache_clear()
    assert tune._tuned(trial_of(tune), None) == table
    tuned(tune, "gradient")
    assert json.loads(path.read_text()).items() >= kept.items()
    assert not recwarn.list


PLACES = {
    "below a file": ("file/cache", "got no readable file (Not a directory)"),
    "in a folder that is a file": ("below", "got no readable file (Not a directory)"),
    "a folder of its name": ("folder", "got no readable file (Is a directory)"),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_place_that_cannot_be_written(
    name: str, tune: Any, tmp_path: Path, recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, said = PLACES[name]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / place))
    (tmp_path / "file").touch()
    path = tune.cache_file(trial_of(tune).device)
    if place == "below":
        (tmp_path / "below").mkdir()
        path.parent.touch()
    elif place == "folder":
        path.mkdir(parents=True)
    for kernel in ("statistics", "gradient", "statistics"):
        tuned(tune, kernel)
    (told,) = [str(warning.message) for warning in recwarn]
    assert f"{path}: {said}" in told
    if place == "folder":
        assert list(path.parent.iterdir()) == [path]


def test_a_full_disk(tune: Any, recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, text: str) -> int:
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    tuned(tune)
    tuned(tune)
    path = tune.cache_file(trial_of(tune).device)
    (told,) = [str(warning.message) for warning in recwarn]
    assert f"{path}: cannot be written (No space left on device); what is chosen is not remembered" in told
    assert list(path.parent.iterdir()) == []


def test_without_a_home_folder(
    tune: Any, tmp_path: Path, recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container whose user id is not in its list of users."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    tuned(tune)
    (told,) = [str(warning.message) for warning in recwarn]
    assert "XDG_CACHE_HOME: got none, and there is no home folder; choices are not remembered" in told
    assert list(tmp_path.iterdir()) == []


def test_threads_that_tune_together_remember_everything(tune: Any, recwarn: pytest.WarningsRecorder) -> None:
    trials = [trial_of(tune)._replace(d=64 << k) for k in range(16)]
    tune._tuned.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda trial: tune._tuned(trial, None), trials))
    path = tune.cache_file(trials[0].device)
    assert set(json.loads(path.read_text())) == {str(trial) for trial in trials}
    assert not recwarn.list
