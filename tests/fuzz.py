"""`make fuzz`: random arguments of every public function, and random problems against float64, for some minutes.

Each number is a seed. An odd number is a call with up to four of its arguments replaced by hostile ones, on the C++
backend and the reference: both must return, with close results if the values are ordinary, or both must raise a
documented error that names an argument. An even number is a problem of a loss or primitive, which must keep the error
budget. The calls run in a separate process, so that a crash or a call that does not end is a finding, too.

    python tests/fuzz.py [--minutes 5] [--seed N] [--only NUMBER]
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import inspect
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from every_function import FUNCTIONS, PUBLIC
from torch import Tensor

from fused_contrastive.testing import cases, harness
from fused_contrastive.testing.cases import MEMBERS, OPTIONS, Case
from fused_contrastive.testing.maker import Sizes

LIMIT = 60  # seconds for one number
KINDS = ("raised", "returned", "compared", "problems")
ERRORS = (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError)
DTYPES = [torch.float32] * 6 + [
    torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64,
]  # fmt: skip
SHAPES: list[tuple[int, ...]] = [
    (), (1,), (6,), (7,), (6, 4), (6, 5), (7, 4), (1, 4), (0, 4), (6, 0), (6, 1), (6, 3, 4), (6, 2, 4), (2, 6, 4),
    (6, 3), (6, 6), (40, 4), (300, 4), (6, 3, 4, 1), (5, 7, 4),
]  # fmt: skip
OTHERS: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, -(2**63), 0.0, 0.5, 1.0, -1.5, 1e-30, 1e30, float("nan"),
    float("inf"), "mean", "sum", "none", "auto", "in", "out", "skip", "row", "both", "x_clip", "", [], [1], ["row"], (),
    (1, 5), {}, object(), np.float32(2), np.arange(6), torch.Size([6]),
]  # fmt: skip
LAYOUTS = ["strided", "transposed", "expanded", "offset", "negated", "zeros", "sparse"]
ORDINARY = ("normal", "unit", "ints", "ones")


def values(rng: random.Random, shape: tuple[int, ...]) -> tuple[Tensor, str]:
    kind = rng.choice([*ORDINARY, *ORDINARY, "zeros", "nan", "inf", "huge", "tiny", "any integer"])
    t = torch.randn(shape)
    if kind == "unit" and t.dim():
        t = torch.nn.functional.normalize(t, dim=-1)
    elif kind in ("ints", "any integer"):
        t = torch.randint(-2, 8, shape).float() * (1 if kind == "ints" else 2.0**61)
    elif kind == "ones":
        t = torch.ones(shape)
    elif kind in ("nan", "inf") and t.numel():
        t.view(-1)[rng.randrange(t.numel())] = float(kind) * rng.choice([1, -1])
    elif kind in ("zeros", "huge", "tiny"):
        t = t * {"zeros": 0.0, "huge": 1e30, "tiny": 1e-40}[kind]
    return t, kind


def tensor(rng: random.Random, fitting: Any) -> tuple[Tensor, bool]:
    """A random tensor, half of the time with the shape of the fitting one, and whether its values are ordinary."""
    shape = tuple(fitting.shape) if isinstance(fitting, Tensor) and rng.random() < 0.5 else rng.choice(SHAPES)
    t, kind = values(rng, shape)
    t = t.to(rng.choice(DTYPES))
    layout = rng.choice(["plain"] * 8 + LAYOUTS)
    if layout == "strided" and t.dim():
        t = torch.stack((t, t), dim=-1)[..., 0]
    elif layout == "transposed" and t.dim() > 1:
        t = t.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "expanded" and t.dim():
        t = t[:1].expand(shape)
    elif layout == "offset" and t.dim():
        t = torch.cat((t, t))[len(t) :]
    elif layout == "negated":
        t = torch._neg_view(t)
    elif layout == "zeros":
        t = torch._efficientzerotensor(shape, dtype=t.dtype)
    elif layout == "sparse" and t.dim():
        t = t.to_sparse()
    return t, kind in ORDINARY


def drawn(number: int) -> tuple[str, dict[str, Any], bool]:
    """A public function, its arguments, and whether its tensors have ordinary values."""
    rng = random.Random(number)
    torch.manual_seed(number)
    name = rng.choice([name for name in FUNCTIONS if name not in ("verify", "diagnose")])  # these take no backend
    parameters = [p for p in inspect.signature(PUBLIC[name]).parameters if p not in ("backend", "group")]
    arguments, ordinary = dict(FUNCTIONS[name]), True
    for parameter in rng.sample(parameters, rng.randint(0, min(4, len(parameters)))):
        if rng.random() < 0.6:
            arguments[parameter], plain = tensor(rng, arguments.get(parameter))
            ordinary &= plain
        else:
            arguments[parameter] = rng.choice(OTHERS)
    for parameter, value in arguments.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.layout == torch.strided:
            arguments[parameter] = value.detach().requires_grad_(rng.random() < 0.3 and not value._is_zerotensor())
    return name, arguments, ordinary


def tensors(value: Any) -> list[Tensor]:
    """The tensors in the results of a call."""
    if isinstance(value, Tensor):
        return [value]
    return [t for each in value for t in tensors(each)] if isinstance(value, (tuple, list)) else []


def outcome(name: str, arguments: dict[str, Any], backend: str) -> BaseException | list[Tensor]:
    """What the call raises, or its results and gradients."""
    torch.manual_seed(0)  # draws are compared
    try:
        found = tensors(PUBLIC[name](**arguments, backend=backend))
        leaves = [t for t in arguments.values() if isinstance(t, Tensor) and t.requires_grad]
        recorded = [t for t in found if t.requires_grad]
        if leaves and recorded:
            total = torch.stack([t.double().nan_to_num(0, 0, 0).sum() for t in recorded]).sum()
            found += [g for g in torch.autograd.grad(total, leaves, allow_unused=True) if g is not None]
        return [t.detach() for t in found]
    except Exception as error:
        return error


def api(number: int) -> tuple[str, str | None]:
    """Makes one call; returns its description, and what is wrong with its outcome."""
    name, arguments, ordinary = drawn(number)
    shown = f"{name}({', '.join(f'{k}={describe(v)}' for k, v in arguments.items())})"
    names = (*arguments, "backend")
    results = [outcome(name, arguments, backend) for backend in ("cpp", "reference")]
    for result in results:
        if isinstance(result, BaseException):
            if not isinstance(result, ERRORS):
                return "raised", f"{shown}: {type(result).__name__}: {result}"
            if isinstance(result, (TypeError, ValueError)) and not any(p in str(result) for p in names):
                return "raised", f"{shown}: names no argument: {result}"
    ours, theirs = results
    if isinstance(ours, BaseException) or isinstance(theirs, BaseException):
        if isinstance(ours, BaseException) != isinstance(theirs, BaseException):
            return "raised", f"{shown}: cpp {describe(ours)}, reference {describe(theirs)}"
        return "raised", None
    if not ordinary:
        return "returned", None
    for a, b in zip(ours, theirs, strict=True):
        dtypes = {t.dtype for t in arguments.values() if isinstance(t, Tensor)}
        tolerance = 3e-2 if {torch.bfloat16, torch.float16} & dtypes else 1e-3
        largest = b.double().nan_to_num(0, 0, 0).abs().max().item() if b.numel() else 0.0
        near = tolerance * largest + 1e-30
        if a.shape != b.shape or not torch.allclose(a.double(), b.double(), tolerance, near, equal_nan=True):
            some = [t.flatten()[:6].tolist() for t in (a, b)]
            return "compared", f"{shown}: cpp {describe(a)} {some[0]}, reference {some[1]}"
    return "compared", None


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"<{str(value.dtype)[6:]} {tuple(value.shape)} {value.layout} {value.device.type}>"
    return f"{type(value).__name__}: {value}" if isinstance(value, BaseException) else repr(value)


def size(rng: random.Random, least: int, most: int) -> int:
    return int(least * (most / least) ** rng.random())  # small ones as often as large ones


def problem(number: int) -> tuple[str, str | None]:
    """Compares the C++ backend with float64 on a random problem."""
    rng = random.Random(number)
    if rng.random() < 0.5:
        loss, variant = rng.choice(OPTIONS)
        n, d, scale = size(rng, 2, 300), size(rng, 1, 100), rng.choice((0.5, 14.3, 100.0))
        sizes = Sizes(n, d, rng.choice(cases.DTYPES), scale, rng.random() < 0.1)
    else:
        loss = rng.choice(("contrastive_stats", "contrastive_stats", "clip"))
        variant = rng.choice(list(MEMBERS[loss].options))
        n, d = size(rng, 1 + ("decoupled" in variant), 600), size(rng, 1, 600)
        rows = size(rng, 1, 300) if loss == "contrastive_stats" else None
        sizes = Sizes(n, d, rng.choice(cases.DTYPES), rng.choice(cases.SCALES), m=rows)
    case = Case(loss, variant, sizes, number)
    found = harness.deviations(case, "cpp")
    breach = [each for each in found if each.share > 1]
    return "problems", f"{case}: {breach}" if breach else None


def work(first: int) -> Iterator[str]:
    """Prints lines for the parent process: the number that begins, and then its outcome."""
    warnings.simplefilter("ignore")
    for number in range(first, 2**63):
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        torch.set_num_threads(2 if number % 16 < 2 else 1)
        yield f"begin {number}"
        what, wrong = api(number) if number % 2 else problem(number)
        yield f"{what} {wrong or ''}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=random.randrange(2**40))
    parser.add_argument("--only", type=int, help="one number, in this process, and what it does")
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only is not None:
        warnings.simplefilter("ignore")
        print(*(api if given.only % 2 else problem)(given.only))
        return 0
    if given.work is not None:
        for line in work(given.work):
            print(line.replace("\n", " "), flush=True)
    print(f"fuzz: seed {given.seed}, {given.minutes} minutes", flush=True)
    counts: collections.Counter[str] = collections.Counter()
    findings, number, end = 0, given.seed, time.monotonic() + 60 * given.minutes
    while time.monotonic() < end:
        command = [sys.executable, __file__, "--work", str(number)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
            said: list[str] = []
            for line in child.stdout or ():
                kind, _, wrong = line.strip().partition(" ")
                if kind == "begin":
                    number, said = int(wrong), []
                    if time.monotonic() >= end:
                        child.kill()
                elif kind in KINDS:
                    counts[kind] += 1
                    findings += bool(wrong)
                    if wrong:
                        print(f"{wrong}\n    repeat: python tests/fuzz.py --only {number}", flush=True)
                else:
                    said.append(line.rstrip())
        if time.monotonic() < end:
            findings += 1
            print(f"the process ended with {child.returncode}", *said[-30:], sep="\n")
            print(f"    repeat: python tests/fuzz.py --only {number}", flush=True)
        number += 1
    print(f"fuzz: {dict(counts)}, {findings} findings", flush=True)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
