"""The command line: ``python -m fused_contrastive verify | info``."""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fused_contrastive import info
from fused_contrastive.ops import dispatch
from fused_contrastive.verify import run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fused_contrastive", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="which backends are usable here and why not, vector level, threads, versions")
    verify = commands.add_parser("verify", help="compare every available backend with the float64 oracle")
    verify.add_argument("--backend", nargs="+", choices=list(dispatch.BACKENDS), help="default: all that can run")
    verify.add_argument("--device", help='"cpu", "cuda", "cuda:1", ...; default: the GPU if there is one')
    verify.add_argument("--grid", choices=run.GRIDS, default="quick", help="a random sample of cases, or all of them")
    verify.add_argument("--seed", type=int, default=None, help="of the random inputs; default: new each run, printed")
    verify.add_argument("--features", nargs=2, type=Path, metavar=("A.npy", "B.npy"), help="your own (N, D) features")
    verify.add_argument("--scale", type=float, default=100.0, help="the logit scale for --features (default 100)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    console = Console()
    if options.command == "info":
        info.show(console)
        return 0
    try:
        where = run.target(options.device, options.backend)
    except (RuntimeError, ValueError) as error:
        console.print(str(error), style="red", markup=False)
        return 2
    if options.features:
        try:
            held = run.verify_features(options.features[0], options.features[1], options.scale, where, console)
        except (OSError, TypeError, ValueError) as error:
            console.print(f"--features: {error}", style="red", markup=False)
            return 2
    else:
        seed = options.seed if options.seed is not None else secrets.randbits(32)
        held = run.verify_grid(options.grid, seed, where, console)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
