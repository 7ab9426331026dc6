"""The rehearsal (tests/rehearsal) passes a few losses, notices illegal launches, and counts instructions correctly."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from snippets import ROOT

sys.path.insert(0, str(ROOT / "tools"))
from machine_code import FastPath, fast_path

FOLDER = ROOT / "tests/rehearsal"
compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
needs_compiler = pytest.mark.skipif(compiler is None, reason="no C compiler for the stand-in: none of cc, gcc, clang")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Triton's cache, so that each kernel is compiled once."""
    return tmp_path_factory.mktemp("kernels")


def rehearse(kernels: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(kernels)}
    command = [sys.executable, str(FOLDER), "--quick", *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


@needs_compiler
@needs_triton
def test_a_few_losses_launch_nothing_illegal(kernels: Path) -> None:
    done = rehearse(kernels)
    launches, descriptors, illegal = done.stdout.splitlines()[-1].split(", ")
    assert (done.returncode, illegal) == (0, "0 illegal"), done.stdout + done.stderr
    assert int(launches.removesuffix(" launches")) > 100
    assert int(descriptors.removesuffix(" descriptors")) > 100


@needs_compiler
@needs_triton
def test_what_is_illegal_fails_and_is_named(kernels: Path) -> None:
    case = "contrastive_stats 600 x 1100 x 64, bf16, nothing kept"
    done = rehearse(kernels, f"--only={case}", "--plant", "grid", "descriptor", "memory", "shared")
    assert (done.returncode, done.stdout.splitlines()[-1][-9:]) == (1, "4 illegal"), done.stdout + done.stderr
    failures = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    for plant, reason, failure in zip(
        ("grid", "descriptor", "memory", "shared"),
        (
            "grid (0,): it did not take place",
            "expected a multiple of 16 bytes",
            "elements after its memory",
            "262144 bytes of shared memory, expected at most 232448",
        ),
        failures,
        strict=True,
    ):
        assert failure.startswith(f"FAILED sm_90, {case}, planted {plant}: ")
        assert reason in failure


def test_without_a_compiler_it_says_so(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "PATH": str(tmp_path), "CC": ""}
    done = subprocess.run([sys.executable, str(FOLDER)], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "needs a C compiler: found none of $CC, cc, gcc and clang" in done.stderr


class Launch(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("count", ctypes.c_uint),
    ]  # fmt: skip


def driver_calls(path: str) -> list[tuple[str, bool]]:
    """Calls of a stand-in for compute capability 9.0, and whether it allows them."""
    driver, found = ctypes.CDLL(path), []

    def launch(name: str, grid: list[int], threads: int = 128, shared: int = 0, limit: int | None = None) -> None:
        function = ctypes.c_void_p()
        driver.cuModuleGetFunction(ctypes.byref(function), None, b"kernel")
        allowed = limit is None or driver.cuFuncSetAttribute(function, 8, limit) == 0
        config = Launch((ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(threads, 1, 1), shared)
        found.append((name, allowed and driver.cuLaunchKernelEx(ctypes.byref(config), function, None, None) == 0))

    launch("largest grid", [2**31 - 1, 65535, 65535])
    launch("no columns", [1, 0, 1])
    launch("too many columns", [1, 65536, 1])
    launch("too many in depth", [1, 1, 65536])
    launch("too many rows", [2**31, 1, 1])
    launch("too many threads", [1, 1, 1], threads=1025)
    launch("shared memory", [1, 1, 1], shared=49152)
    launch("its limit not set", [1, 1, 1], shared=49153)
    launch("all shared memory", [1, 1, 1], shared=232448, limit=232448)
    launch("too high a limit", [1, 1, 1], limit=232449)

    memory = ctypes.create_string_buffer(4096)
    aligned = (ctypes.addressof(memory) + 127) // 128 * 128

    def describe(
        name: str, base: int = aligned, dims: tuple[int, int] = (100, 50), stride: int = 208,
        box: tuple[int, int] = (64, 128), swizzle: int = 3, map_at: int = aligned,
    ) -> None:  # fmt: skip
        status = driver.cuTensorMapEncodeTiled(
            ctypes.c_void_p(map_at), 9, 2, ctypes.c_void_p(base), (ctypes.c_uint64 * 2)(*dims),
            (ctypes.c_uint64 * 1)(stride), (ctypes.c_uint32 * 2)(*box), (ctypes.c_uint32 * 2)(1, 1), 0, swizzle, 0, 0,
        )  # fmt: skip
        found.append((name, status == 0))

    describe("descriptor")
    describe("widest box", box=(256, 256), swizzle=0)
    describe("misaligned", base=aligned + 8)
    describe("misaligned map", map_at=aligned + 32)
    describe("no rows", dims=(100, 0))
    describe("stride between 16 bytes", stride=216)
    describe("stride within a row", stride=192)
    describe("long stride", stride=2**40)
    describe("high box", box=(64, 257))
    describe("box wider than its swizzle", box=(128, 64))
    describe("narrow box", box=(4, 64), swizzle=0)
    return found


@needs_compiler
def test_the_driver_allows_what_is_legal(tmp_path: Path) -> None:
    library = tmp_path / "driver.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, FOLDER / "stand_in.c"], check=True)
    environment = {**os.environ, "STAND_IN_CAPABILITY": "90", "PYTHONPATH": os.pathsep.join(sys.path)}
    code = f"import json, test_rehearsal; print(json.dumps(test_rehearsal.driver_calls({str(library)!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    legal = {"largest grid", "shared memory", "all shared memory", "descriptor", "widest box"}
    assert [(name, name in legal) for name, _ in json.loads(done.stdout)] == [tuple(x) for x in json.loads(done.stdout)]


def sass(*lines: str) -> str:
    """As cuobjdump prints it, each instruction at 16 times its number."""
    rows = (f"   /*{16 * i:04x}*/   {line} ;   /* 0x0123 */\n       /* 0x4567 */\n" for i, line in enumerate(lines))
    return "\t\tFunction : kernel\n" + "".join(rows)


def test_a_tile_counts_from_the_loop_over_d() -> None:
    found = fast_path(
        sass(
            "MOV R1, c[0x0][0x28]",
            "@!P0 BRA 0x50",  # D = 0
            "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24",  # the loop, and its side path at 0xd0
            "@!P1 BRA 0xd0",
            "@P0 BRA 0x20",
            "FADD R2, R2, R3",
            "@P2 BRA P3, 0x90",  # skips the code that only special tiles need
            "MUFU.EX2 R2, R2",
            "FMUL R2, R2, R2",
            "BSSY B0, 0xb0",
            "BSYNC B0",
            "STG.E.128 desc[UR4][R2.64], R4",
            "EXIT",
            "@P1 BRA 0xd0",
            "BRA 0x40",
        )
    )
    assert found == FastPath(before=2, again=None, last=6)  # 0x50, 0x60, 0x90, 0xa0, 0xb0, 0xc0
    assert found.of_tile() == 6


def test_products_that_a_special_tile_makes_again_do_not_count() -> None:
    found = fast_path(
        sass(
            "S2R R0, SR_CTAID.X",
            "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24",
            "@P0 BRA 0x10",
            "@!P1 BRA 0x70",
            "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24",
            "@P0 BRA 0x40",
            "FADD R2, R2, R3",
            "STG.E desc[UR4][R2.64], R4",
            "EXIT",
        )
    )
    assert found == FastPath(before=1, again=None, last=3)


def test_a_strip_counts_its_tiles_and_a_share_of_its_end() -> None:
    found = fast_path(
        sass(
            "MOV R1, c[0x0][0x28]",
            "UMOV UR4, URZ",  # each tile begins here
            "HMMA.16816.F32.BF16 R24, R4, R8, R24",  # the loop over D
            "HMMA.16816.F32.BF16 R28, R4, R8, R28",
            "@P0 BRA 0x20",
            "FADD R2, R2, R3",
            "BRA.U UP1, 0x90",
            "WARPSYNC 0xffffffff",
            "CALL.REL.NOINC 0xd0",
            "FADD R2, R2, R3",
            "@P2 BRA 0x10",
            "STG.E desc[UR4][R2.64], R4",
            "EXIT",
            "RET.REL.NODEC R2 0x0",
        )
    )
    assert found == FastPath(before=2, again=4, last=6)  # 0x50, 0x60, 0x90, 0xa0; or these, 0xb0 and 0xc0
    assert found.of_tile(8) == (7 * 4 + 6) / 8


def test_without_products_the_way_leads_by_a_store() -> None:
    found = fast_path(
        sass(
            "S2R R0, SR_CTAID.X",
            "@P0 EXIT",  # nothing to do
            "@P1 BRA 0x40",
            "MUFU.EX2 R2, R2",
            "LDG.E R2, desc[UR4][R2.64]",
            "UTMASTG.2D [UR8], [UR4]",
            "@!PT BRA 0x0",
            "EXIT",
            "BRA 0x80",
        )
    )
    assert found == FastPath(None, None, last=7)


def test_a_kernel_without_an_end_is_an_error() -> None:
    with pytest.raises(ValueError, match="no way"):
        fast_path(sass("STG.E desc[UR4][R2.64], R4", "BRA 0x0"))
    with pytest.raises(ValueError, match="expected an address in the code"):
        fast_path(sass("BRA 0x990"))
