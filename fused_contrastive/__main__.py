"""The command line: ``python -m fused_contrastive verify | bench | compare | temperature | plan | info``."""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fused_contrastive import info
from fused_contrastive.bench import command as bench
from fused_contrastive.core import checks
from fused_contrastive.distributed import plan, show_plan
from fused_contrastive.evaluation import temperature
from fused_contrastive.ops import dispatch
from fused_contrastive.verification import run


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
    verify.add_argument("--save", type=Path, metavar="DIR", help="write scripts that repeat breaches to this folder")
    bench.add_parsers(commands, positive)
    sweep = commands.add_parser(
        "temperature",
        help="how far each temperature concentrates the gradient on hard negatives: a table and a picture",
    )
    sweep.add_argument("features", nargs=2, type=Path, metavar=("A.npy", "B.npy"), help="(N, D) features, row by row")
    values = sweep.add_mutually_exclusive_group()
    values.add_argument("--temperatures", nargs="+", type=positive, metavar="T", help="default: 0.005 to 1")
    values.add_argument("--scales", nargs="+", type=positive, metavar="S", help="the same as logit scales, 1 / T")
    sweep.add_argument("--mark", type=positive, metavar="T", help="the model's own temperature, to be marked")
    picture = sweep.add_mutually_exclusive_group()
    picture.add_argument("--out", type=Path, default=Path("temperature.png"), help="picture (default %(default)s)")
    picture.add_argument("--no-picture", action="store_true", help="the table alone, which needs no matplotlib")
    planned = commands.add_parser("plan", help="what a batch over many GPUs costs each of them, by a model")
    planned.add_argument(
        "--batch", nargs="+", type=count, required=True, metavar="N", help="rows of all processes together"
    )
    planned.add_argument("--dim", type=count, required=True, metavar="D", help="features")
    planned.add_argument("--world", nargs="+", type=count, required=True, metavar="W", help="processes, one GPU each")
    planned.add_argument("--bytes", type=int, choices=(2, 4), default=2, help="of a feature (default %(default)s)")
    planned.add_argument(
        "--tflops", type=positive, default=600.0, help="of half-precision products (default %(default)s)"
    )
    planned.add_argument(
        "--gbytes", type=positive, default=40.0, help="a second that a GPU sends (default %(default)s)"
    )
    planned.add_argument("--memory", type=positive, default=20.0, help="GB left for the loss (default %(default)s)")
    planned.add_argument("--markdown", action="store_true", help="a table for a page")
    return parser


def count(text: str) -> int:
    """An integer of at least 1, or argparse's error that names the option."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected an integer of at least 1")
    return int(text)


def positive(text: str) -> float:
    """A finite number above 0, or argparse's error that names the option."""
    try:
        value = float(text)
        checks.positive("value", value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text}, expected a finite number above 0") from None
    return value


def _temperature(options: argparse.Namespace, console: Console) -> int:
    chosen = options.temperatures or [1 / scale for scale in options.scales or ()] or temperature.TEMPERATURES
    out = None if options.no_picture else options.out
    try:
        temperature.run(options.features[0], options.features[1], chosen, out, options.mark, console)
    except ModuleNotFoundError as error:
        why = f"the picture needs the package {error.name!r}: pip install matplotlib, or --no-picture for the table"
        console.print(f"temperature: {why}", style="red", markup=False)
        return 2
    except (OSError, TypeError, ValueError) as error:
        console.print(f"temperature: {error}", style="red", markup=False)
        return 2
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    console = Console()
    if options.command == "info":
        info.show(console)
        return 0
    if options.command in ("bench", "compare"):
        return bench.run(options, arguments, console)
    if options.command == "plan":
        machine = plan.Machine(1e12 * options.tflops, 1e9 * options.gbytes, 1e9 * options.memory)
        return show_plan.run(
            options.batch, options.world, options.dim, options.bytes, machine, options.markdown, console
        )
    if options.command == "temperature":
        return _temperature(options, console)
    try:
        where = run.target(options.device, options.backend)
    except (RuntimeError, ValueError) as error:
        console.print(str(error), style="red", markup=False)
        return 2
    if options.save is not None and options.save.exists() and not options.save.is_dir():
        console.print(f"--save: got {options.save}, which is a file, expected a folder", style="red", markup=False)
        return 2
    if options.features:
        try:
            held = run.verify_features(
                options.features[0], options.features[1], options.scale, where, console, options.save
            )
        except (OSError, TypeError, ValueError) as error:
            console.print(f"--features: {error}", style="red", markup=False)
            return 2
    else:
        seed = options.seed if options.seed is not None else secrets.randbits(32)
        held = run.verify_grid(options.grid, seed, where, console, options.save)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
