"""Compiles what the Triton backend launches, for GPUs that are not there: a table in Markdown, or JSON.

    python tools/configurations.py             # docs/triton-configurations.md
    python tools/configurations.py --json      # for the tests
    python tools/configurations.py --rules     # with rules that the page leaves out

Small problems run on CPU tensors that pass for those of a GPU. Triton compiles each kernel for the arguments that it
would be launched with, and does not launch it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from fused_contrastive.backends.triton import at_once, device, launch, max_sim_launch, prefixes_launch
from fused_contrastive.core.prefixes import Prefixes, PrefixNeeds
from fused_contrastive.core.spec import Needs, RowLoss, StatsSpec, Upstream, for_backward
from fused_contrastive.core.tokens import MaxSimUpstream, TokenSpec
from machine_code import count

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Shared memory a block may use, and how the matrix units are called in PTX or AMD's assembly.
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
MATRIX_INSTRUCTION = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
SOURCES = ("half", "tf32", "gemm")
N, D = 512, 64  # two of the largest tiles
PAGE_KINDS = ["statistics", "prefixes"]  # the kernels that docs/triton-configurations.md lists
VECTORS = ("prepare", "merge", "finish")  # kernels that walk vectors or features, and have no tiles


class Gpu:
    """Triton's driver for a GPU that only has an architecture."""

    arch = "sm_90"

    def get_current_device(self) -> int:
        return list(TARGETS).index(self.arch)  # Triton caches kernels by device

    def get_current_stream(self, device: object = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.arch]


def compile_only() -> dict[str, Any]:
    """Makes Triton compile kernels without launching them, from now on. Returns where it puts them, by their hash."""
    compiled: dict[str, Any] = {}
    run = jit.JITFunction.run

    def compile_it(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled[kernel.hash] = kernel
        return kernel

    driver.set_active(Gpu())
    jit.JITFunction.run = compile_it
    return compiled


def pretend(arch: str) -> None:
    """Makes CPU tensors pass for tensors of this architecture."""
    Gpu.arch = arch
    device.stand_in = lambda _: device.Device("cpu", arch, arch, arch in ("sm_90", "sm_100"), 132)
    device.of.cache_clear()


def step(spec: StatsSpec, dtype: torch.dtype) -> None:
    x, y = (torch.zeros(N, D, dtype=dtype) for _ in range(2))
    saved = launch.forward(spec, x, y)
    pos, row, col = (torch.zeros(shape, dtype=torch.float64) for shape in spec.shapes(N, N))
    upstream = Upstream(pos, row, col if spec.want_col else None)
    spec, saved, upstream = for_backward(spec, saved, upstream)
    launch.backward(spec, x, y, saved, upstream, Needs(True, True, True, False))


def statistics(source: str, every_option: bool) -> None:
    """Each kernel of the statistics and of G, as a softmax and a sum of softplus launch them."""
    dtype = torch.bfloat16 if source == "half" else torch.float32
    torch.set_float32_matmul_precision("high" if source == "tf32" else "highest")
    ids = torch.zeros(N, dtype=torch.int64)
    spec = StatsSpec(torch.tensor(1.0))
    sums = spec._replace(want_col=False, statistic="softplus", equal_ids="negate", col_bias=torch.zeros(()))
    if every_option:
        spec = spec._replace(
            targets=ids,
            col_bias=torch.zeros(N),
            row_ids=ids,
            col_ids=ids,
            exclude_self=True,
            upper=True,
            want_col=False,
        )
        sums = sums._replace(row_ids=ids, col_ids=ids, col_bias=torch.zeros(N))
    for kept_rows in (0, N):
        step(spec._replace(kept_rows=kept_rows), dtype)
    step(sums, dtype)
    x = torch.zeros(N, D, dtype=dtype)
    at_once.loss_and_gradients(sums, x, x, RowLoss(), Needs(True, True, True, False))


RULES = ("5 ids, no positives", "limits", "guide", "apart", "add", "teacher", "references")


def with_rule(source: str, rule: str) -> None:
    """The kernels of the statistics and of G for a problem with one of the rules."""
    dtype = torch.bfloat16 if source == "half" else torch.float32
    torch.set_float32_matmul_precision("high" if source == "tf32" else "highest")
    ids, limit, guide = torch.zeros(N, 5, dtype=torch.int64), torch.zeros(N), torch.zeros(N, D)
    fields: dict[str, Any] = {
        "5 ids, no positives": {"row_ids": ids, "col_ids": ids, "paired": False},
        "limits": {"row_limit": limit, "col_limit": limit},
        "guide": {"row_limit": limit, "col_limit": limit, "row_guide": guide, "col_guide": guide},
        "apart": {"row_ids": ids[:, 0], "col_ids": ids[:, 0], "equal_ids": "apart"},
        "add": {"row_ids": ids[:, 0], "col_ids": ids[:, 0], "equal_ids": "add"},
        "references": {"row_reference": limit, "col_reference": limit},
        "teacher": {"row_guide": guide, "col_guide": guide, "statistic": "teacher", "paired": False},
    }[rule]
    spec = StatsSpec(torch.tensor(1.0), **fields)
    step(spec, dtype)
    if rule in ("5 ids, no positives", "apart", "references"):
        sums = spec._replace(want_col=False, statistic="softplus", col_bias=torch.zeros(()))
        step(sums if rule == "apart" else sums._replace(equal_ids="negate"), dtype)


def late_interaction(source: str, tokens: int, masked: bool, own: int = 0, smooth: float = 0.0) -> None:
    """max_sim's kernels for items of so many tokens; masked: lengths, and both directions where they can be."""
    dtype = torch.bfloat16 if source == "half" else torch.float32
    torch.set_float32_matmul_precision("high" if source == "tf32" else "highest")
    x, y = torch.zeros(4, tokens, D, dtype=dtype), torch.zeros(4 * (own or 1), 40, D, dtype=dtype)
    lengths = [torch.full((len(t),), t.shape[1]) for t in (x, y)] if masked else [None, None]
    both = masked and not own and not smooth
    spec = TokenSpec(*lengths, both, 0 if smooth else 4, own, smooth)
    saved = max_sim_launch.forward(spec, x, y)
    g = torch.zeros(4, own or 4)
    upstream = MaxSimUpstream(g, g if both else None)
    max_sim_launch.backward(spec, x, y, saved, upstream, (masked, True))


def nested(source: str, normalized: bool, every_option: bool) -> None:
    """Launches the kernels of nested prefixes, forward and backward, with three prefixes."""
    dtype = torch.bfloat16 if source == "half" else torch.float32
    torch.set_float32_matmul_precision("high" if source == "tf32" else "highest")
    dims, ids = (D, 2 * D, 4 * D), torch.zeros(N, dtype=torch.int64)
    x = torch.zeros(N, dims[-1], dtype=dtype)
    factors = torch.zeros(len(dims), N) if normalized else None
    spec = StatsSpec(torch.tensor(1.0))
    if every_option:
        spec = spec._replace(targets=ids, row_ids=ids, col_ids=ids)
    of = Prefixes(dims, factors, factors)
    saved = prefixes_launch.forward(spec, of, x, x)
    upstream = Upstream(saved.pos, saved.row, saved.col)
    prefixes_launch.backward(spec, of, x, x, saved, upstream, PrefixNeeds(True, True, True))


def measure(
    architectures: list[str], kinds: list[str], sources: list[str], every_option: list[bool], rules: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    compiled = compile_only()
    for arch in architectures:
        pretend(arch)
        for source in sources:
            if (arch, source) == ("gfx942", "tf32"):
                continue
            if "statistics" in kinds:
                for every in every_option if source == "half" else [False]:
                    statistics(source, every)
                    yield from rows(compiled, arch, source, "every" if every else "none")
            for rule in rules:
                with_rule(source, rule)
                yield from rows(compiled, arch, source, rule)
            if "prefixes" in kinds:
                with_every = source == "half" and True in every_option
                for options in ("none", "normalized", *(("every",) if with_every else ())):
                    nested(source, options != "none", options == "every")
                    yield from rows(compiled, arch, source, options)
            if "max_sim" in kinds:  # 32: FILIP's and ColBERT's queries; 128: an item fills a tile; 200: it needs two
                all_of_them = True in every_option
                sizes = ((32, False), *(((32, True), (128, True), (200, True)) if all_of_them else ()))
                for tokens, masked in sizes:
                    late_interaction(source, tokens, masked)
                    yield from rows(compiled, arch, source, f"{tokens} tokens{', every' if masked else ''}")
                for own, smooth in ((2, 0.1), *(((2, 0.0), (0, 0.1)) if all_of_them else ())):
                    late_interaction(source, 32, True, own, smooth)
                    yield from rows(
                        compiled, arch, source, f"32 tokens{', own' if own else ''}{', smooth' if smooth else ''}"
                    )


def rows(compiled: dict[str, Any], arch: str, source: str, options: str) -> Iterator[dict[str, Any]]:
    """A row for each kernel with tiles that was compiled since the last call."""
    for kernel in list(compiled.values()):
        row = {**described(kernel, arch), "arch": arch, "source": source, "options": options}
        if row["kernel"] not in VECTORS:
            yield row
    compiled.clear()


def described(kernel: Any, arch: str) -> dict[str, Any]:
    text = kernel.asm["amdgcn" if arch == "gfx942" else "ptx"]
    if arch == "gfx942":
        names = {"registers": "vgpr_count", "spilled": "vgpr_spill_count"}
        found = {key: int(re.search(rf"\.{name}:\s*(\d+)", text)[1]) for key, name in names.items()}
        found |= {"kernel": kernel.src.fn.__name__, "stores": {}}
    else:
        found = count(kernel, arch)
        if arch != "sm_90":  # where the counts were compared with others by hand
            found.pop("instructions_per_logit", None)
    constants = {kernel.src.fn.arg_names[path[0]]: v for path, v in kernel.src.constants.items() if len(path) == 1}
    tile = constants.get("TILE")
    kernel_name = found["kernel"]
    reads = {"sigmoid_gradient": ("gemm_products", "slopes"), "gradient_of_kept": ("kept",)}.get(
        kernel_name, ("gemm_products",)
    )
    there = {argument.split(".")[0] for argument, kind in kernel.src.signature.items() if kind != "constexpr"}
    stores = {"sigmoid_statistics": "slopes", "strip_statistics": "kept", "exact_statistics": "kept"}.get(kernel_name)
    keeps = stores in there or (kernel_name == "sigmoid_statistics" and "products_to" in there)
    late_interaction = kernel.src.fn.__module__.endswith("max_sim")
    gathers = late_interaction and kernel_name == "gradient"  # it multiplies to add up the other side's tokens alone
    return {
        **found,
        "multiplies": "index_other" in there if gathers else not there.intersection(reads),
        "kernel": ("max_sim " if late_interaction else "") + kernel_name + (", keeping" if keeps else ""),
        "tile": "" if tile is None else f"{tile.block_m} x {tile.block_n} x {tile.block_k}",
        "warps": kernel.metadata.num_warps,
        "stages": kernel.metadata.num_stages,
        "shared": kernel.metadata.shared,
        "shared_limit": SHARED_LIMIT[arch],
        "matrix_instruction": MATRIX_INSTRUCTION[arch],
        # Tiles of fewer than 64 rows, such as few tokens of one item, take the older instruction.
        "matrix_instructions": text.count(MATRIX_INSTRUCTION[arch]) or text.count("mma.sync"),
        "matrix_kinds": sorted(set(re.findall(re.escape(MATRIX_INSTRUCTION[arch]) + r"[\w.:]*", text))),
        "narrow_offsets": narrow_offsets(kernel),
    }


def narrow_offsets(kernel: Any) -> list[str]:
    """Where a row stride of x or y is multiplied in 32 bits, or the corner of a tile is reached by such a product."""
    lines = kernel.asm["ttir"].splitlines()
    return [
        line.strip()
        for line in lines
        if re.search(r"(splat|muli) .*%stride_[xy]\b.* : i32", line)
        or (re.search(r"%corner\S* = tt.addptr %\w+\b", line) and not re.search(r", i64\b", line))
    ]


def markdown(found: list[dict[str, Any]]) -> str:
    lines = [PAGE.format(version=triton.__version__)]
    for row in found:
        products = row["matrix_instructions"]
        stores = ", ".join(f"{number} {name}" for name, number in row["stores"].items())
        cells = (
            *(row[name] for name in ("arch", "source", "kernel", "options", "tile", "warps", "stages")),
            f"{row['shared']:,} of {row['shared_limit']:,}",
            *(row[name] for name in ("registers", "spilled")),
            f"{products} {row['matrix_instruction']}" if products else "none needed",
            row.get("instructions_per_logit", ""),
            stores,
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


PAGE = """\
# What the Triton configurations compile to

Triton {version}, compiled without a GPU; remake with `make configurations`. None of it has been timed on a GPU yet.

- source: products from half-precision features (bf16 here), from float32 features as tf32, or given by the vendor GEMM
  (float32 at full precision).
- kernel: as in `fused_contrastive/backends/triton/`; "keeping": it stores exponentials, sigmoids or products as well.
- options: none (except the one bias that SigLIP has); or, for half precision, "every": targets, col_bias, ids,
  exclude_self and one triangle at once. For nested prefixes (`prefix_` kernels) "every" is normalized, targets and ids.
- spilled: stores of registers to memory because there are too few, counted in the code. With every option at once some
  configurations have them; without, only the exact kernels of half precision may, which redo the few tiles that one
  exponential per logit cannot serve ([The Triton backend](triton.md)).
- per logit, on sm_90: instructions that a thread issues for one logit of a tile without positives or edges, from the
  end of the loop over D to the end of the tile. The last reduction of a strip is divided among its tiles. The `prefix_`
  kernels have it for one logit of one prefix; with `prefix_gradients` it includes adding up two prefixes' tiles.
- stores: to global memory; UTMASTG is the tensor memory accelerator's, of a whole tile or a part of it.

| arch | source | kernel | options | tile | warps | stages | shared | registers | spilled | matrix units | per logit |\
 stores |
| --- | --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | --- | ---: | --- |"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--arch", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--kind", nargs="+", choices=("statistics", "prefixes", "max_sim"), default=PAGE_KINDS)
    parser.add_argument("--source", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--plain", action="store_true", help="each kernel once, without options")
    parser.add_argument("--rules", action="store_true", help="the kernels with RULES, and no others")
    options = parser.parse_args()
    every_option = [False] if options.plain else [False, True]
    kinds, rules = ([], RULES) if options.rules else (options.kind, ())
    found = list(measure(options.arch, kinds, options.source, every_option, rules))
    print(json.dumps(found) if options.json else markdown(found), end="")


if __name__ == "__main__":
    main()
