"""What the shipped Triton configurations compile to, on a machine without a GPU: a table in Markdown, or JSON.

    python benchmarks/configurations.py            # the table in docs/triton-configurations.md
    python benchmarks/configurations.py --json

Each kernel twice: plain, and with every option (targets, bias, ids, excluded self-pairs). Registers and spills come
from the cuobjdump in Triton's own package, and from the assembly for AMD.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_contrastive.backends.triton import backward, configs, forward, sigmoid

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Shared memory a block may use, and how the matrix units are called in PTX or AMD's assembly.
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
MATRIX_INSTRUCTION = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
INTEGERS = [
    *("M", "N", "D", "stride_x", "stride_y", "stride_given", "stride_kept", "stride_references", "stride_out"),
    *("row_begin", "row_end", "col_begin", "col_end"),
]


# What a row of the table is for, by reduction.
FUNCTIONS = {
    "statistics": {"softmax": forward.tile_statistics},
    "sums": {"softplus": sigmoid.sigmoid_statistics},
    "gradient": {"softmax": backward.tile_gradient, "softplus": sigmoid.sigmoid_gradient},
    "kept": {"softmax": backward.tile_gradient, "softplus": sigmoid.sigmoid_gradient},
}


def signature(arch: str, source: str, kernel: str, config: configs.Config, every_option: bool) -> dict[str, Any]:
    """Triton's types of all arguments; None for an absent tensor."""
    half, given = source == "half", source == "given"
    features = "bf16" if half else "fp32"
    tma = arch in ("sm_90", "sm_100") and not given

    def rows_of(block: int) -> str:
        return f"tensordesc<{features}[{block},{config.block_k}]>" if tma else f"*{features}"

    def optional(kind: str) -> str | None:
        return kind if every_option else None

    keeps = kernel == "kept" or (kernel in ("statistics", "sums") and not given)
    return {
        "x": rows_of(config.block_m), "y": rows_of(config.block_n), "given": "*fp32" if given else None,
        "scale": "*fp32", "targets": optional("*i64"), "col_bias": optional("*fp32"), "row_ids": optional("*i64"),
        "col_ids": optional("*i64"), "pos": "*fp64", "row_max": "*fp32", "row_sum": "*fp32", "col_max": "*fp32",
        "col_sum": "*fp32", "kept": ("*bf16" if half else "*fp32") if keeps else None,
        "references": "*fp32" if keeps and half else None, "row": "*fp64", "col": "*fp64", "g_row": "*fp64",
        "g_col": "*fp64", "largest": None, "out": f"*{features}", **dict.fromkeys(INTEGERS, "i32"),
    }  # fmt: skip


def compile_one(arch: str, source: str, kernel: str, config: configs.Config, every_option: bool, reduction: str) -> Any:
    function = FUNCTIONS[kernel][reduction]
    types = signature(arch, source, kernel, config, every_option)
    constants = {
        "SELF": every_option, "UPPER": every_option, "EQUAL_IDS": "negate" if reduction == "softplus" else "exclude",
        "ROWS": True, "COLS": True, "FAST": source == "half", "TMA": "tensordesc" in types["x"],
        "PRECISION": "tf32" if source == "tf32" else "ieee", "TOP": 1.0, **config.options,
    }  # fmt: skip
    chosen, values, aligned = {}, {}, {}
    for position, name in enumerate(function.arg_names):
        kind = types.get(name)
        if kind is None:
            chosen[name], values[name] = "constexpr", constants.get(name)
            continue
        chosen[name] = kind
        if kind.startswith("*") or name in ("D", "stride_x", "stride_y", "stride_given", "stride_kept", "stride_out"):
            aligned[(position,)] = [["tt.divisibility", 16]]
    options = {name: value for name, value in config.options.items() if name.islower()}
    return triton.compile(ASTSource(function, chosen, values, aligned), target=TARGETS[arch], options=options)


def registers(compiled: Any, arch: str) -> tuple[int, int]:
    """Registers per thread, and registers stored to memory for want of room."""
    if arch == "gfx942":
        text = compiled.asm["amdgcn"]
        return tuple(int(re.search(rf"\.{name}:\s*(\d+)", text)[1]) for name in ("vgpr_count", "vgpr_spill_count"))
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    return int(re.search(r"REG:(\d+)", usage)[1]), len(re.findall(r"\bSTL\b", code))


def narrow_offsets(compiled: Any) -> list[str]:
    """Where a row stride of x or y is multiplied in 32 bits, or the corner of a tile is reached by such a product."""
    lines = compiled.asm["ttir"].splitlines()
    return [
        line.strip()
        for line in lines
        if re.search(r"(splat|muli) .*%stride_[xy]\b.* : i32", line)
        or (re.search(r"%corner\S* = tt.addptr %(given|kept|out)\b", line) and not re.search(r", i64\b", line))
    ]


def measure(architectures: list[str]) -> Iterator[dict[str, Any]]:
    for (arch, source, kernel), config in configs.CONFIGS.items():
        if arch not in architectures:
            continue
        for every_option, reduction in itertools.product((False, True), FUNCTIONS[kernel]):
            compiled = compile_one(arch, source, kernel, config, every_option, reduction)
            text = compiled.asm["amdgcn" if arch == "gfx942" else "ptx"]
            used, spilled = registers(compiled, arch)
            yield {
                "arch": arch,
                "source": source,
                "kernel": kernel,
                "reduction": reduction,
                "options": "every" if every_option else "none",
                "tile": f"{config.block_m} x {config.block_n} x {config.block_k}",
                "warps": config.warps,
                "stages": config.stages,
                "shared": compiled.metadata.shared,
                "shared_limit": SHARED_LIMIT[arch],
                "registers": used,
                "spilled": spilled,
                "matrix_instruction": MATRIX_INSTRUCTION[arch],
                "matrix_instructions": text.count(MATRIX_INSTRUCTION[arch]),
                "narrow_offsets": narrow_offsets(compiled),
            }


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [PAGE.format(version=triton.__version__)]
    for row in rows:
        count = row["matrix_instructions"]
        cells = (
            *(row[name] for name in ("arch", "source", "kernel", "reduction", "options", "tile", "warps", "stages")),
            f"{row['shared']:,} of {row['shared_limit']:,}",
            *(row[name] for name in ("registers", "spilled")),
            f"{count} {row['matrix_instruction']}" if count else "none needed",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


PAGE = """\
# What the Triton configurations compile to

Triton {version}, compiled without a GPU; remake with `make configurations`. None of it has been timed on a GPU yet.

- source: products from half-precision features (bf16 here), from float32 features as tf32, or given by the vendor GEMM
  (float32 at full precision).
- kernel: the forward's statistics, or sums of softplus; the backward's gradient, from products made again or given, or
  from kept tiles.
- reduction: the softmax's log-sum-exps, or the sums of softplus that SigLIP needs.
- options: none, or targets, col_bias, ids, exclude_self and one triangle alone at once.
- spilled: stores of registers to memory for want of room, counted in the code. With every option at once some
  configurations have them; without, none may.

| arch | source | kernel | reduction | options | tile | warps | stages | shared | registers | spilled | matrix units |
| --- | --- | --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | --- |"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--arch", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    options = parser.parse_args()
    rows = list(measure(options.arch))
    print(json.dumps(rows) if options.json else markdown(rows), end="")


if __name__ == "__main__":
    main()
