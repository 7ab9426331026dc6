"""max_sim's Triton kernels, compiled for each architecture on a machine that has none of them.

Run as a script, it prints what they compile to as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
# Features and how they are multiplied; exact float32 has no matrix instructions on NVIDIA.
SOURCES = {"half": ("bf16", "ieee"), "tf32": ("fp32", "tf32"), "given": ("fp32", "ieee")}
# Kernel, tokens of x in a tile (32: the queries of FILIP and ColBERT; 128: one item is a tile), and options.
CASES = [
    ("maxima", 32, "none"),  # no masks, one direction, no gradient
    ("maxima", 32, "every"),  # masks, both directions, argmaxima
    ("maxima", 128, "every"),
    ("maxima", 128, "in parts"),  # and items of x longer than a tile
    ("gradient", 32, "none"),  # no masks, the argmaxima of the other side
    ("gradient", 32, "every"),
]


def pointers(features: str, options: str) -> dict[str, str]:
    """Types of the tensors that are there."""
    there = {
        **dict.fromkeys(("x", "y", "other"), f"*{features}"),
        **dict.fromkeys(("x_sums", "out", "g_other"), "*fp32"),
        "index_other": "*u8",
    }
    if options != "none":
        there |= dict.fromkeys(("x_lengths", "y_lengths", "own_lengths", "other_lengths"), "*i64")
        there |= dict.fromkeys(("argmax_x", "argmax_y", "index_own"), "*u8")
        there |= dict.fromkeys(("y_sums", "g_own"), "*fp32")
    if options == "in parts":
        there |= {"part_best": "*fp32", "part_index": "*i32"}
    return there


def compile_one(arch: str, source: str, kernel: str, block: int, options: str) -> Any:
    import triton
    from triton.compiler import ASTSource

    import configurations
    from fused_contrastive.backends.triton import max_sim, max_sim_launch

    features, precision = SOURCES[source]
    tiles = max_sim_launch.tiles(arch, source)
    chosen = tiles.of_maxima if kernel == "maxima" else tiles.of_gradient
    there = pointers(features, options)
    if kernel == "gradient" and precision == "tf32":
        precision = "tf32x3"
    constants = {**chosen, "TB": block, "BOTH": options != "none", "PRECISION": precision}
    function = max_sim.maxima if kernel == "maxima" else max_sim.gradient
    tensors = pointers(features, "in parts")
    types, values, aligned = {}, {}, {}
    for position, name in enumerate(function.arg_names):
        if name in there:
            types[name] = there[name]
        elif name in tensors or name in constants:
            types[name], values[name] = "constexpr", constants.get(name)
        else:
            types[name] = "i32"
        if name in there or name in ("D", "stride_x", "stride_y", "stride_other"):
            aligned[(position,)] = [["tt.divisibility", 16]]
    flags = {name: value for name, value in chosen.items() if name.islower()}
    return triton.compile(
        ASTSource(function, types, values, aligned), target=configurations.TARGETS[arch], options=flags
    )


def measure() -> Iterator[dict[str, Any]]:
    import configurations

    for arch in ARCHITECTURES:
        for source in SOURCES:
            if (arch, source) == ("gfx942", "tf32"):
                continue
            for kernel, block, options in CASES:
                compiled = compile_one(arch, source, kernel, block, options)
                text = compiled.asm["amdgcn" if arch == "gfx942" else "ptx"]
                registers, spilled = configurations.registers(compiled, arch)
                yield {
                    "arch": arch,
                    "source": source,
                    "name": f"{arch} {source} {kernel}, {block} tokens, options {options}",
                    "registers": registers,
                    "spilled": spilled,
                    "shared": compiled.metadata.shared,
                    "shared_limit": configurations.SHARED_LIMIT[arch],
                    "matrix_instructions": text.count(configurations.MATRIX_INSTRUCTION[arch]),
                }


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """In a process of its own: here, Triton interprets."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])
    result = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=1200, env=environment)
    assert result.returncode == 0, result.stderr
    rows: list[dict[str, Any]] = json.loads(result.stdout)
    return rows


def test_every_architecture_is_there(compiled: list[dict[str, Any]]) -> None:
    assert {row["arch"] for row in compiled} == set(ARCHITECTURES)


def test_shared_memory_fits(compiled: list[dict[str, Any]]) -> None:
    for row in compiled:
        assert row["shared"] <= row["shared_limit"], row


def test_no_registers_spill(compiled: list[dict[str, Any]]) -> None:
    for row in compiled:
        assert row["spilled"] == 0, row


def test_matrix_units_are_used(compiled: list[dict[str, Any]]) -> None:
    for row in compiled:
        exact = row["source"] == "given" and row["arch"] != "gfx942"
        assert (row["matrix_instructions"] > 0) != exact, row


if __name__ == "__main__":
    print(json.dumps(list(measure())))
