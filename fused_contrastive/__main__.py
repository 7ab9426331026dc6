"""The command line: ``python -m fused_contrastive verify | temperature | plan | info``."""

from __future__ import annotations

import argparse
import io
import math
import os
import secrets
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from fused_contrastive import info
from fused_contrastive.backends import cpp
from fused_contrastive.core import checks
from fused_contrastive.core.errors import InputError
from fused_contrastive.core.terminal import Terminal
from fused_contrastive.distributed import plan, show_plan
from fused_contrastive.evaluation import temperature
from fused_contrastive.ops import dispatch
from fused_contrastive.verification import run

LARGEST = float(torch.finfo(torch.float32).max)
FAILED = 3
CLOSED_PIPE = 128 + 13  # the status a shell reports for a program that SIGPIPE ended


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fused_contrastive", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="which backends are usable here and why not, vector level, threads, versions")
    verify = commands.add_parser("verify", help="compare every available backend with the float64 oracle")
    verify.add_argument("--backend", nargs="+", choices=list(dispatch.BACKENDS), help="default: all that can run")
    verify.add_argument("--device", help='"cpu", "cuda", "cuda:1", ...; default: the GPU if there is one')
    verify.add_argument("--grid", choices=run.GRIDS, help="a random sample of cases (quick, the default), or all")
    verify.add_argument("--seed", type=seed, help="seed of the random cases; default: a new one, which is printed")
    verify.add_argument("--features", nargs=2, type=Path, metavar=("A.npy", "B.npy"), help="your own (N, D) features")
    verify.add_argument("--scale", type=finite, help="the logit scale for --features, 1 / temperature (default 100)")
    verify.add_argument("--save", type=Path, metavar="DIR", help="write scripts that repeat breaches to this folder")
    sweep = commands.add_parser(
        "temperature",
        help="how far each temperature concentrates the gradient on hard negatives: a table and a picture",
    )
    # Two arguments, because argparse cannot print the help of one whose two values have different names.
    sweep.add_argument("x", type=Path, metavar="A.npy", help="(N, D) features")
    sweep.add_argument("y", type=Path, metavar="B.npy", help="(N, D) features; row i is the partner of row i of A.npy")
    values = sweep.add_mutually_exclusive_group()
    values.add_argument("--temperatures", nargs="+", type=positive, metavar="T", help="default: 0.005 to 1")
    values.add_argument("--scales", nargs="+", type=positive, metavar="S", help="the same, given as logit scales 1 / T")
    sweep.add_argument("--mark", type=positive, metavar="T", help="the model's own temperature, which is marked")
    picture = sweep.add_mutually_exclusive_group()
    picture.add_argument("--out", type=Path, default=Path("temperature.png"), help="picture (default %(default)s)")
    picture.add_argument("--no-picture", action="store_true", help="the table alone, which needs no matplotlib")
    planned = commands.add_parser("plan", help="what a batch over many GPUs costs each of them, by a model")
    planned.add_argument(
        "--batch", nargs="+", type=count, required=True, metavar="N", help="rows of all processes together"
    )
    planned.add_argument("--dim", type=count, required=True, metavar="D", help="numbers in a row of features")
    planned.add_argument("--world", nargs="+", type=count, required=True, metavar="W", help="processes, one GPU each")
    planned.add_argument("--bytes", type=int, choices=(2, 4), default=2, help="bytes a number (default %(default)s)")
    planned.add_argument(
        "--tflops", type=positive, default=600.0, help="TFLOP/s of half-precision products (default %(default)s)"
    )
    planned.add_argument("--gbytes", type=positive, default=40.0, help="GB/s that a GPU sends (default %(default)s)")
    planned.add_argument("--memory", type=positive, default=20.0, help="GB left for the loss (default %(default)s)")
    planned.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    return parser


def count(text: str) -> int:
    """An integer of at least 1, or argparse's error that names the option."""
    if not text.isdecimal() or not 1 <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"got {text}, expected an integer of at least 1 (and below 2**63)")
    return int(text)


def seed(text: str) -> int:
    """An integer that torch takes for a seed, or argparse's error that names the option."""
    if not text.isdecimal() or int(text) >= 2**64:
        raise argparse.ArgumentTypeError(f"got {text}, expected an integer from 0 to 2**64 - 1")
    return int(text)


def finite(text: str) -> float:
    """A number that float32 holds, or argparse's error that names the option."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= LARGEST:
        raise argparse.ArgumentTypeError(f"got {text}, expected a number up to {LARGEST:.2g}, float32's largest")
    return value


def positive(text: str) -> float:
    """A finite number above 0, or argparse's error that names the option."""
    try:
        value = float(text)
        checks.positive("value", value)
        checks.positive("its inverse", 1 / value)  # a temperature's inverse is its logit scale
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text}, expected a finite number above 0") from None
    return value


def _verify(options: argparse.Namespace, terminal: Terminal) -> int:
    if options.features is None and options.scale is not None:
        raise InputError("--scale: got one without --features, expected both; random cases have their own scales")
    if options.features is not None and (options.grid is not None or options.seed is not None):
        raise InputError(
            "--features: got files with --grid or --seed, which are of random cases, expected one of the two"
        )
    where = run.target(options.device, options.backend)
    if options.save is not None:
        try:
            os.stat(options.save)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:  # a name that is too long
            raise InputError(f"--save: got {options.save} ({error.strerror}), expected a folder to write to") from error
        above = next(path for path in (options.save, *options.save.absolute().parents) if os.path.exists(path))
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise InputError(f"--save: got {options.save}, expected a folder that can be written")
    if options.features is not None:
        scale = 100.0 if options.scale is None else options.scale
        held = run.verify_features(options.features[0], options.features[1], scale, where, terminal, options.save)
    else:
        drawn = secrets.randbits(32) if options.seed is None else options.seed
        held = run.verify_grid(options.grid or "quick", drawn, where, terminal, options.save)
    return 0 if held else 1


def _run(options: argparse.Namespace, terminal: Terminal) -> int:
    if cpp.BACKEND.unavailable() is None:
        try:
            cpp.vector_level()  # reads FUSED_CONTRASTIVE_CPU_LEVEL
        except ValueError as error:
            raise InputError(str(error)) from error
    if options.command == "info":
        info.show(terminal)
        return 0
    if options.command == "verify":
        return _verify(options, terminal)
    if options.command == "temperature":
        chosen = options.temperatures or [1 / scale for scale in options.scales or ()] or temperature.TEMPERATURES
        out = None if options.no_picture else options.out
        temperature.run(options.x, options.y, chosen, out, options.mark, terminal)
        return 0
    machine = plan.Machine(1e12 * options.tflops, 1e9 * options.gbytes, 1e9 * options.memory)
    return show_plan.run(options.batch, options.world, options.dim, options.bytes, machine, options.markdown, terminal)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status.

    0: all is well; 1: the command found something wrong; 2: bad arguments or files; 3: the command itself failed, after
    a traceback; 141: the pipe that it prints to was closed.
    """
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # tables have signs that not every encoding has
    try:
        return _run(options, Terminal())
    except InputError as error:
        print(f"python -m fused_contrastive {options.command}: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes what is left to print when it ends
        return CLOSED_PIPE
    except Exception:  # Python's own status would be 1
        traceback.print_exc()
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
