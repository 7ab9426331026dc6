"""Runs cases through the error budget and sums up what was found in one table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch

from fused_contrastive.core import hints
from fused_contrastive.core.budget import Deviation, largest_finite
from fused_contrastive.core.errors import InputError
from fused_contrastive.core.files import load_pairs
from fused_contrastive.core.spec import BackendName, compute_dtype
from fused_contrastive.core.terminal import Styled, Terminal
from fused_contrastive.ops import dispatch
from fused_contrastive.testing import harness
from fused_contrastive.testing.cases import DIMS, DTYPES, SCALES, SIZES, Case, grid, sample, sample_of_grid
from fused_contrastive.testing.maker import Sizes
from fused_contrastive.testing.registry import LOSSES
from fused_contrastive.verification.script import script

GRIDS = ("quick", "full")
QUICK_CASES = 400
LOSS_CASES = {"quick": 246, "full": 2460}
SCRIPTS = 3  # how many breaches are shown as scripts
SMALL = 2**26  # multiplications of a case, below which plain torch computes on one thread


@dataclass
class Cell:
    """What was found for one backend, option and dtype."""

    cases: int = 0
    checks: int = 0
    breaches: int = 0
    worst: Deviation | None = None
    worst_case: str = ""

    def add(self, case: Case, deviations: Sequence[Deviation]) -> None:
        self.cases += 1
        for deviation in deviations:
            self.checks += 1
            self.breaches += deviation.share > 1
            if self.worst is None or deviation.share > self.worst.share:
                self.worst, self.worst_case = deviation, str(case)

    def shown(self) -> Styled:
        if self.worst is None:
            return Styled("-", "")
        return Styled(f"{self.worst.share:.2f} {self.worst.quantity}", "bold red" if self.breaches else "")


@dataclass
class Report:
    """Cells by (backend, option) and dtype."""

    rows: dict[tuple[str, str], dict[torch.dtype, Cell]] = field(default_factory=dict)
    failed: list[tuple[Case, str]] = field(default_factory=list)  # case, backend

    @property
    def cells(self) -> list[Cell]:
        return [cell for row in self.rows.values() for cell in row.values()]

    @property
    def breaches(self) -> int:
        return sum(cell.breaches for cell in self.cells)

    def add(self, case: Case, backend: str, deviations: Sequence[Deviation]) -> None:
        row = self.rows.setdefault((backend, case.option), {dtype: Cell() for dtype in DTYPES})
        row[case.dtype].add(case, deviations)
        if any(deviation.share > 1 for deviation in deviations):
            self.failed.append((case, backend))

    def simplest(self) -> list[tuple[Case, str]]:
        """The smallest failed case of each backend and option, smaller ones first."""
        best: dict[tuple[str, str], tuple[Case, str]] = {}
        for case, backend in sorted(self.failed, key=lambda failure: failure[0].size):
            best.setdefault((backend, case.option), (case, backend))
        return list(best.values())

    def show(self, terminal: Terminal) -> None:
        columns = ("backend", "option", "cases", *(str(dtype).removeprefix("torch.") for dtype in DTYPES))
        rows: list[tuple[str | Styled, ...]] = [
            (backend, option, str(sum(cell.cases for cell in row.values())), *(cell.shown() for cell in row.values()))
            for (backend, option), row in sorted(self.rows.items())
        ]
        title = "Largest share of the error budget used, and by which value or gradient"
        terminal.table(title, columns, rows, right=(2,))


@dataclass(frozen=True)
class Target:
    """Where to verify, and which backends; a case of a dtype that a backend does not support there is left out."""

    device: torch.device
    backends: tuple[str, ...]

    def backends_for(self, dtype: torch.dtype) -> list[BackendName]:
        supporting = [name for name in self.backends if dispatch.BACKENDS[name].supports(self.device.type, dtype)]
        return cast(list[BackendName], supporting)

    def _left_out(self, name: str) -> str:
        """Why a backend is not tested."""
        if (why := dispatch.BACKENDS[name].unavailable()) is not None:
            return why
        supported = dispatch.BACKENDS[name].supports(self.device.type, torch.float32)
        return "not asked for" if supported else f"it does not take tensors on {self.device.type}"

    def __str__(self) -> str:
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device)
        left_out = [f"{name} ({self._left_out(name)})" for name in dispatch.BACKENDS if name not in self.backends]
        return f"on {device}: testing {', '.join(self.backends)}; " + (
            f"not testing {'; '.join(left_out)}" if left_out else "no other backend"
        )


def target(device: str | None, backends: Sequence[str] | None) -> Target:
    """A GPU unless there is none or another device is named; all backends that can run there unless some are named.

    Raises: InputError if the device cannot compute here, or a backend that was named cannot run there.
    """
    named = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
    try:
        where = torch.device(named)
        torch.ones(1, dtype=torch.float64, device=where).item()  # the oracle's dtype
    except Exception as error:  # each kind of missing device raises its own error
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"--device: got {named}, expected one that computes in float64 here ({why})") from error
    try:
        for name in backends or ():
            dispatch.resolve(name, where, torch.float32)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"--backend: {error}") from error
    usable = [name for name, backend in dispatch.available().items() if backend.supports(where.type, torch.float32)]
    return Target(where, tuple(backends or usable))


@contextmanager
def _threads(size: int, backend: str = "reference") -> Iterator[None]:
    """One thread for plain torch on a small problem: on a busy machine, threads spin while they wait for each other.

    The other backends' kernels are what is verified, and use all threads.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1 if backend == "reference" and size < SMALL else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check(cases: Iterable[Case], where: Target, report: Report) -> None:
    """Every case on every backend; the oracle and eager are evaluated once per case."""
    for case in cases:
        backends = where.backends_for(case.dtype)
        if not backends:
            continue
        with _threads(case.size):
            expectation = harness.expected(case, where.device)
        for backend in backends:
            with _threads(case.size, backend):
                results = harness.ours(case, backend, where.device)
            report.add(case, backend, expectation.deviations(results))


def verify_grid(which: str, seed: int, where: Target, terminal: Terminal, save: Path | None = None) -> bool:
    """Prints the table for a grid of cases, and scripts that repeat breaches; True if there are none.

    ``save``: a folder for these scripts.
    """
    quick = which == "quick"
    cases = list(sample_of_grid(QUICK_CASES, seed) if quick else grid(DTYPES, SIZES, DIMS, SCALES, seed))
    losses = list(sample(LOSS_CASES[which], seed))
    terminal.say(str(where))
    terminal.say(f"{len(cases)} cases of the primitive and CLIP, {len(losses)} of all losses, seed {seed}")
    report = Report()
    check(terminal.progress([*cases, *losses], "verify"), where, report)
    return _conclude(report, where, terminal, save)


def _without_limits() -> list[str]:
    """CLIP's options that given features can have: as many rows of both, and similarities are not compared."""
    compared = {"absolute_margin", "relative_margin", "guide", "unequal"}
    return [name for name, options in LOSSES["clip"].options.items() if compared.isdisjoint(options)]


def verify_features(
    x_path: Path, y_path: Path, scale: float, where: Target, terminal: Terminal, save: Path | None = None
) -> bool:
    """The same for the CLIP loss on a user's own features, (N, D) arrays of one shape.

    Raises: InputError for files that cannot be read as pairs, have too many rows or too large values, or have a dtype
        that no backend takes.
    """
    x, y = load_pairs(x_path, y_path)
    if not where.backends_for(x.dtype):
        raise InputError(f"--features: got {x.dtype}, expected a dtype that {', '.join(where.backends)} takes")
    norms = (torch.linalg.vector_norm(t, dim=1, dtype=torch.float64).max().item() for t in (x, y))
    _refuse_overflow("differences of logits", 2 * max(1.0, abs(scale)) * math.prod(norms), compute_dtype(x.dtype))
    terminal.say(str(where))
    if (hint := hints.hint({str(x_path): x, str(y_path): y}, "--scale", scale)) is not None:
        terminal.say(f"hint: {hint.text}", style="yellow")
    sizes = Sizes(len(x), x.shape[1], x.dtype, scale)
    cases = [Case("clip", option, sizes, seed=0, features=(x, y)) for option in _without_limits()]
    report = Report()
    with _fitting(len(x)):
        check(cases, where, report)
        for case in {case for case, _ in report.failed}:
            for name, truth in harness.expected(case, where.device).truth.items():
                dtype = x.dtype if name.endswith("_features") else compute_dtype(x.dtype)
                _refuse_overflow(name, largest_finite(truth), dtype)
    return _conclude(report, where, terminal, save, (x_path, y_path))


def _refuse_overflow(what: str, largest: float, dtype: torch.dtype) -> None:
    """Raises InputError if values overflow: infinities or NaN are right there, and a comparison would say nothing."""
    if not largest <= (most := torch.finfo(dtype).max):
        held = f"{str(dtype).removeprefix('torch.')}'s largest, {most:.2g}"
        raise InputError(f"--features, --scale: got {what} up to {largest:.2g}, expected values up to {held}")


@contextmanager
def _fitting(n: int) -> Iterator[None]:
    """The comparison stores N x N matrices, which our losses do not: too many rows are bad input."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error):
            raise InputError(
                f"--features: got {n} rows, expected fewer: memory does not hold the {n} x {n} similarities in "
                "float64 that a backend is compared with"
            ) from error
        raise


def _conclude(
    report: Report, where: Target, terminal: Terminal, save: Path | None, features: tuple[Path, Path] | None = None
) -> bool:
    report.show(terminal)
    for cell in report.cells:
        if cell.breaches:
            terminal.say(f"breach {cell.worst_case}: {cell.worst}", style="red")
    unsaved = _show_scripts(report, where, terminal, save, features)
    checks = sum(cell.checks for cell in report.cells)
    verdict, style = ("BREACHED", "red") if report.breaches else ("held", "green")
    terminal.say(f"error budget {verdict}: {report.breaches} breaches in {checks} values and gradients", style)
    if unsaved is not None:
        raise InputError(f"--save: got {save} ({unsaved.strerror}), expected a folder to write to") from unsaved
    return report.breaches == 0


def _show_scripts(
    report: Report, where: Target, terminal: Terminal, save: Path | None, features: tuple[Path, Path] | None
) -> OSError | None:
    """Prints and saves the scripts of some breaches; returns the error of saving them, if there was one."""
    unsaved: OSError | None = None
    shown = report.simplest()[:SCRIPTS]
    for number, (case, backend) in enumerate(shown, start=1):
        text = script(case, backend, where.device, features)
        terminal.say(f"\n# ---- repeats breach {number}")
        terminal.say(text)
        if save is not None:
            path = save / f"breach_{number}.py"
            try:
                save.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
            except OSError as error:
                unsaved = error
                continue
            terminal.say(f"# saved as {path}")
    if len(report.failed) > len(shown):
        terminal.say(f"{len(report.failed) - len(shown)} more cases breach the budget, whose scripts are not shown")
    return unsaved
