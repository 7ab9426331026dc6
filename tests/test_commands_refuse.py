"""Every command's --help, and the arguments and files that it refuses: on stderr, with status 2, and no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fused_contrastive.__main__ import main
from fused_contrastive.core.budget import Deviation
from fused_contrastive.testing import harness

COMMANDS = ("info", "verify", "temperature", "plan")


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The error on stderr, by argparse or by the command. Asserts status 2 and nothing on stdout."""
    try:
        status = main(arguments)
    except SystemExit as error:
        status = error.code
    shown = capsys.readouterr()
    assert status == 2, shown
    assert not shown.out
    assert "error: " in shown.err
    return shown.err


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: python -m fused_contrastive {command}" in shown
    assert {"temperature": "A.npy B.npy", "verify": "--features A.npy B.npy"}.get(command, "") in shown


PLAN = ["plan", "--dim", "8", "--world", "2", "--batch"]
ARGUMENTS = [
    ([], "the following arguments are required: command"),
    (["train"], "argument command: invalid choice: 'train'"),
    (["info", "extra"], "unrecognized arguments: extra"),
    (["verify", "--backend"], "argument --backend: expected at least one argument"),
    (["verify", "--backend", "cuda"], "argument --backend: invalid choice: 'cuda'"),
    (["verify", "--backend", "cpp", "--device", "meta"], "--device: got meta, expected one that computes in float64"),
    (["verify", "--device", "cuda:99"], "--device: got cuda:99, expected one that computes in float64"),
    (["verify", "--device", ""], "--device: got , expected one that computes in float64"),
    (["verify", "--device", "hpu"], "--device: got hpu, expected one that computes in float64"),
    (["verify", "--device", "privateuseone"], "--device: got privateuseone, expected one that computes in float64"),
    (["verify", "--save", "x" * 300], f"--save: got {'x' * 300} (File name too long), expected a folder to write to"),
    (["verify", "--device", "abacus"], "--device: got abacus, expected one that computes in float64"),
    (["verify", "--seed", "-1"], "argument --seed: got -1, expected an integer from 0"),
    (["verify", "--seed", "1e3"], "argument --seed: got 1e3, expected an integer from 0"),
    (["verify", "--seed", str(2**64)], "expected an integer from 0 to 2**64 - 1"),
    (["verify", "--features", "a.npy"], "argument --features: expected 2 arguments"),
    (
        ["verify", "--features", "a.npy", "b.npy", "--scale", "inf"],
        "--scale: got inf, expected a number up to",
    ),
    (["verify", "--features", "a.npy", "b.npy", "--scale", "1e39"], "got 1e39, expected a number up to 3.4e+38"),
    (["verify", "--features", "a.npy", "b.npy", "--grid", "quick"], "--features: got files with --grid or --seed"),
    (["verify", "--scale", "10"], "--scale: got one without --features"),
    (["temperature"], "the following arguments are required: A.npy, B.npy"),
    (["temperature", "a.npy"], "the following arguments are required: B.npy"),
    (
        ["temperature", "a.npy", "b.npy", "--scales", "1e-320"],
        "--scales: got 1e-320, expected a finite number",
    ),
    (["temperature", "a.npy", "b.npy", "--scales", "1", "--temperatures", "1"], "not allowed with argument --scales"),
    (["plan"], "the following arguments are required: --batch, --dim, --world"),
    ([*PLAN, "0"], "argument --batch: got 0, expected an integer of at least 1"),
    ([*PLAN, "²"], "argument --batch: got ², expected an integer of at least 1"),
    ([*PLAN, "1" + 400 * "0"], "expected an integer of at least 1 (and below 2**63)"),
    ([*PLAN, "8", "--bytes", "3"], "argument --bytes: invalid choice: 3"),
]


@pytest.mark.parametrize(("arguments", "said"), ARGUMENTS, ids=[" ".join(arguments)[:60] for arguments, _ in ARGUMENTS])
def test_arguments(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in refusal(arguments, capsys)
    assert list(tmp_path.iterdir()) == []


def header(shape: str, dtype: str = "<f4") -> bytes:
    """The header of a .npy file."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


A = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)
ARRAYS = {
    "rows.npy": (A[:7], "got 7 rows, expected 20"),
    "more_rows.npy": (np.vstack((A, A)), "got 40 rows, expected 20"),
    "narrow.npy": (A[:, :3], "got D = 3, expected 8"),
    "double.npy": (A.astype(np.float64), "got dtype torch.float64, expected torch.float32"),
    "long_double.npy": (A.astype(np.longdouble), "of shape (20, 8), expected float16, float32 or float64 numbers"),
    "integers.npy": (A.astype(np.int64), "got int64 of shape (20, 8), expected float16, float32 or float64 numbers"),
    "complex.npy": (A.astype(np.complex64), "got complex64 of shape (20, 8)"),
    "fields.npy": (np.zeros((20, 8), [("x", "f4")]), "of shape (20, 8), expected"),
    "objects.npy": (A.astype(object), "got no array (Object arrays cannot be loaded"),
    "vector.npy": (A[0], "got float32 of shape (8,), expected"),
    "images.npy": (A[None], "got float32 of shape (1, 20, 8), expected"),
    "no_rows.npy": (A[:0], "got an empty batch of shape (0, 8)"),
    "no_columns.npy": (A[:, :0], "got an empty batch of shape (20, 0)"),
    "nan.npy": (
        np.where(np.arange(20)[:, None] == 3, np.nan, A),
        "got NaN or infinite values in 1 of 20 rows",
    ),
    "inf.npy": (np.where(A > 0, np.inf, A), "got NaN or infinite values in 20 of 20 rows, the first of them row 0"),
}
BYTES = {
    "empty.npy": (b"", "got no array"),
    "text.npy": (b"1.0, 2.0\n", "got no array"),
    "cut_short.npy": (header("(20, 8)") + bytes(40), "got no array"),
    "bad_header.npy": (header("(20"), "got no array"),
    "negative.npy": (header("(-20, 8)"), "got no array"),
    "huge.npy": (header("(1000000000000, 512)"), "got an array that memory does not hold"),
    "wider_than_int64.npy": (header("(10000000000000, 10000000000000)"), "got "),
    "zip.npy": (b"PK\x03\x04" + bytes(50), "got no array (File is not a zip file)"),
}


def file_named(name: str, folder: Path) -> tuple[Path, str]:
    """Writes a file that cannot be used with A; returns its path and the expected error."""
    path, said = folder / name, ""
    if name in ARRAYS:
        array, said = ARRAYS[name]
        np.save(path, array.astype(np.float32) if name in ("nan.npy", "inf.npy") else array)
    elif name in BYTES:
        data, said = BYTES[name]
        path.write_bytes(data)
    elif name == "archive.npz":
        np.savez(path, A)
    elif name == "tensor.pt":
        torch.save(torch.from_numpy(A), path)
    elif name == "folder.npy":
        path.mkdir()
    return path, said or {
        "folder.npy": "got no readable file (Is a directory)", "missing.npy": "got no readable file (No such file"
    }.get(name, "got an archive (.npz, or torch.save's)")  # fmt: skip


NAMES = (*ARRAYS, *BYTES, "archive.npz", "tensor.pt", "folder.npy", "missing.npy")


@pytest.mark.parametrize("command", [["verify", "--features"], ["temperature", "--no-picture"]], ids=lambda c: c[0])
@pytest.mark.parametrize("name", NAMES)
def test_feature_files(name: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The error names the file, whether it is the first or the second argument."""
    np.save(tmp_path / "a.npy", A)
    path, said = file_named(name, tmp_path)
    error = refusal([*command, str(tmp_path / "a.npy"), str(path)], capsys)
    assert said in error
    assert str(path) in error
    assert str(tmp_path) in refusal([*command, str(path), str(tmp_path / "a.npy")], capsys)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read all files")
def test_a_file_without_permission(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "a.npy", A)
    (tmp_path / "a.npy").chmod(0)
    assert "Permission denied" in refusal(["verify", "--features", *[str(tmp_path / "a.npy")] * 2], capsys)


def test_one_row_has_no_negatives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "a.npy", A[:1])
    assert "got 1 row, expected at least 2" in refusal(["verify", "--features", *[str(tmp_path / "a.npy")] * 2], capsys)


TOO_LARGE = {
    "products": (A * np.float32(1e20), "1e-30", "got differences of logits up to "),
    "differences": (A / np.linalg.norm(A, axis=1, keepdims=True), "-3e38", "got differences of logits up to 6e+38"),
    "float64": (A.astype(np.float64) * 1e200, "1", "expected values up to float64's largest, 1.8e+308"),
    "gradients": ((A * 1000).astype(np.float16), "1000", "expected values up to float16's largest, 6.6e+04"),
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_values_past_the_dtype_are_no_breach(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An infinity that is right is no breach, but bad input."""
    features, scale, said = TOO_LARGE[name]
    np.save(tmp_path / "a.npy", features)
    paths = [str(tmp_path / "a.npy")] * 2
    assert main(["verify", "--backend", "reference", "--features", *paths, f"--scale={scale}"]) == 2
    error = capsys.readouterr().err
    assert "error: --features, --scale: got " in error
    assert said in error


def test_more_rows_than_the_comparison_can_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The comparison would need 16 TB of float64 similarities."""
    np.save(tmp_path / "a.npy", np.ones((3 * 2**19, 1), np.float32))
    assert main(["verify", "--backend", "reference", "--features", *[str(tmp_path / "a.npy")] * 2]) == 2
    assert "--features: got 1572864 rows, expected fewer: memory does not hold" in capsys.readouterr().err


def test_features_of_a_dtype_that_the_backend_does_not_take(
    triton_kernels: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "a.npy", A.astype(np.float64))
    error = refusal(["verify", "--backend", "triton", "--features", *[str(tmp_path / "a.npy")] * 2], capsys)
    assert "--features: got torch.float64, expected a dtype that triton takes" in error


@pytest.mark.parametrize("dtype", [">f4", "<f2"])
def test_features_of_either_byte_order_and_precision(
    dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "a.npy", (A / np.linalg.norm(A, axis=1, keepdims=True)).astype(dtype))
    assert main(["verify", "--backend", "reference", "--features", *[str(tmp_path / "a.npy")] * 2]) == 0
    assert "error budget held: 0 breaches in " in capsys.readouterr().out


@pytest.mark.parametrize("place", ["file", "file/below/it"])
def test_a_folder_that_cannot_be_written(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends before it computes anything."""
    (tmp_path / "file").touch()
    error = refusal(["verify", "--save", str(tmp_path / place)], capsys)
    assert f"--save: got {tmp_path / place}, expected a folder" in error


def test_a_picture_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing folder is noticed before the work; a bad format or file only when matplotlib raises."""
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    np.save(tmp_path / "a.npy", A)
    (tmp_path / "folder.png").mkdir()
    for name in ("nowhere/sweep.png", "sweep.doc", "folder.png"):
        assert main(["temperature", *[str(tmp_path / "a.npy")] * 2, "--out", str(tmp_path / name)]) == 2
        assert f"--out: got {tmp_path / name}" in capsys.readouterr().err


def test_scripts_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The results and the scripts are printed before the error that names --save."""
    np.save(tmp_path / "a.npy", A)
    monkeypatch.setattr(harness.Expected, "deviations", lambda *_: [Deviation("loss", 1.0, 0.0, 0.1)])
    for number in (1, 2, 3):
        (tmp_path / "scripts" / f"breach_{number}.py").mkdir(parents=True)
    arguments = ["verify", "--backend", "reference", "--features", *[str(tmp_path / "a.npy")] * 2]
    assert main([*arguments, "--save", str(tmp_path / "scripts")]) == 2
    shown = capsys.readouterr()
    assert "error budget BREACHED: " in shown.out
    assert "sys.exit(" in shown.out
    assert f"error: --save: got {tmp_path / 'scripts'} (Is a directory), expected a folder to write to" in shown.err
    assert main(arguments) == 1


def test_a_command_that_fails_has_a_status_of_its_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's status for an exception is 1, which here means a breach."""

    def broken(*_: object) -> None:
        raise RuntimeError("the backend fell over")

    monkeypatch.setattr(harness, "expected", broken)
    assert main(["verify", "--device", "cpu", "--backend", "reference"]) == 3
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.endswith("RuntimeError: the backend fell over\n")


def cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fused_contrastive", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})


def test_a_vector_level_that_there_is_not() -> None:
    pytest.importorskip("fused_contrastive._C", reason="backend cpp cannot run here")
    result = cli("info", FUSED_CONTRASTIVE_CPU_LEVEL="sse")
    assert result.returncode == 2
    assert "error: FUSED_CONTRASTIVE_CPU_LEVEL: got 'sse', expected baseline" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_encoding_without_the_signs_of_tables() -> None:
    result = cli("plan", "--batch", "8", "--dim", "8", "--world", "2", PYTHONIOENCODING="ascii")
    assert result.returncode == 0, result.stderr
    assert "gather" in result.stdout


@pytest.mark.skipif(os.name != "posix", reason="pipes end otherwise elsewhere")
@pytest.mark.parametrize("hidden", ["nothing", "rich"])
def test_a_pipe_that_nobody_reads(hidden: str) -> None:
    """The status is the one that a shell reports for SIGPIPE; rich alone would exit with 1."""
    code = f"import sys; sys.modules[{hidden!r}] = None; from fused_contrastive.__main__ import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "info"]
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(write)
    assert result.returncode == 141
    assert not result.stderr
