"""Fifteen minutes with a GPU, in one command: whether the package is right there, how fast it is, what would be faster.

    python benchmarks/gpu_day.py --minutes 8 [--stage correctness tests table tune million peers] [--out FOLDER]

Each stage runs in processes of its own, which append what they find to a file as JSON lines; gpu-day.json and
gpu-day.md are rewritten whenever there are more lines. A stage that hangs is stopped; if one crashes or is stopped, the
page says so and has what the stage found before. ``--toy`` is the same at toy sizes on a CPU, in Triton's interpreter.

Exit code: 0 if the stages correctness and tests passed, or were not asked for; 1 if not; 2 if nothing was started.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # run as a script, it must import this clone's packages, not the modules of this folder
    sys.path[0] = str(ROOT)

Entry = dict[str, Any]  # "row", "column" and "status"; mostly a "value" if the status is "ok"; perhaps more
LEAST = 8.0  # seconds that must be left for a stage to be started
SPARE = 3.0  # seconds kept for ending a process and writing the page
LOSSES = ("clip", "siglip", "info_nce", "nt_xent", "supcon", "max_sim")
PEERS = (
    "ours", "ours, memory_budget=0", "ours, metrics=True", "eager", "2 x F.linear_cross_entropy",
    "2 x cut_cross_entropy", "2 x liger_kernel", "inf_cl", "memeff", "open_clip ClipLoss",
    "open_clip SigLipLoss", "siglip_kernel",
)  # fmt: skip


class Turn(NamedTuple):
    """The arguments of a stage's process."""

    until: float  # the end of its time, by time.monotonic
    toy: bool
    part: str | None
    out: Path

    @property
    def device(self) -> str:
        return "cpu" if self.toy else "cuda"

    def left(self) -> float:
        return self.until - time.monotonic()


def correctness(turn: Turn) -> Iterator[Entry]:
    """Compares one step of each loss and dtype with float64, and with a second run, which must have the same bits."""
    import torch

    from benchmarks import run

    for dtype in [turn.part or "bf16"]:
        torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
        for loss in LOSSES:
            for kept in (0,) if turn.toy else (0, "auto"):
                entry: Entry = {"row": f"{loss}, memory_budget={kept}", "column": dtype}
                if turn.left() > 0:
                    run.attempt(entry, functools.partial(checked, turn, loss, dtype, kept))
                else:
                    entry["status"] = "not started: no time left"
                yield entry


def checked(turn: Turn, loss: str, dtype: str, kept: int | str) -> Entry:
    """For one loss, the largest share of its allowed error that the value or a gradient uses."""
    import torch

    from benchmarks.check import evaluate, last_truths
    from benchmarks.workloads import WORKLOADS, BenchProblem

    n, d = (20, 20) if turn.toy else (2100, 512)
    if loss == "max_sim":
        n, d = (2, 16) if turn.toy else (96, 128)
    truth = last_truths(BenchProblem(loss, n, d, dtype.replace("tf32", "fp32"), turn.device))
    ours = functools.partial(WORKLOADS[loss].ours, backend="triton", memory_budget=kept)
    results, again = evaluate(ours, truth.leaves), evaluate(ours, truth.leaves)
    shares = {name: error / truth.allowed[name] for name, error in truth.errors(results).items()}
    worst = max(shares, key=lambda name: shares[name])
    found = {"value": f"{shares[worst]:.2f}", "worst": worst}
    if (wrong := truth.wrong(results)) is not None:
        return found | {"status": wrong}
    if differing := [name for name in results if not torch.equal(results[name], again[name])]:
        return found | {"status": f"WRONG: two runs differ in {', '.join(differing)}"}
    return found


def command(turn: Turn, *arguments: str, **environment: str) -> Entry:
    """Runs Python with these arguments; the entry has how it ended and what it printed."""
    with tempfile.TemporaryFile("w+") as output:
        words = [sys.executable, *arguments]
        process = subprocess.Popen(words, stdout=output, stderr=output, cwd=ROOT, env=os.environ | environment)
        seconds = max(1.0, turn.left())
        try:
            code = process.wait(seconds)
            status = f"failed: exited with {code}" if code else "ok"
        except subprocess.TimeoutExpired:
            process.kill()
            status = f"failed: stopped after {seconds:.0f} s"
        output.seek(0)
        return {"row": "the command", "column": "as a whole", "status": status, "said": output.read()}


def tests(turn: Turn) -> Iterator[Entry]:
    which = "tests/backends/triton/test_triton_parts.py" if turn.toy else "tests/backends/triton/test_gpu.py"
    several = {"xdist": ["-n", str(min(12, os.cpu_count() or 1))], "pytest_timeout": ["--timeout", "120"]}
    options = [word for name, words in several.items() if importlib.util.find_spec(name) for word in words]
    ended = command(turn, "-m", "pytest", "-v", "-p", "no:cacheprovider", *options, which)
    # Results are counted in each test's own line, which has a percentage, because a stopped run has no summary.
    lines = [line for line in ended["said"].splitlines() if "%]" in line]
    counts = Counter(word for line in lines for word in re.findall(r"(?<=\s)(?:PASSED|FAILED|ERROR|SKIPPED)\b", line))
    value = ", ".join(f"{count} {word.lower()}" for word, count in counts.items())
    if ended["status"] == "ok" and not counts["PASSED"]:
        ended["status"] = "failed: no test ran"
    yield ended | {"row": which, "value": value, "counts": counts}


# argv: the device; this process and how many share the candidates; N; each D.
TUNE = """
import sys, torch
from fused_contrastive import clip_loss, siglip_loss
from fused_contrastive.backends.triton import tune
part, parts, n, *sizes = map(int, sys.argv[2:])
if parts > 1:
    tune.CANDIDATES.update({name: some[part::parts] for name, some in tune.CANDIDATES.items()})
for d in sizes:
    x, y = (torch.nn.functional.normalize(torch.randn(n, d, device=sys.argv[1]), dim=1).bfloat16() for _ in range(2))
    for budget in (0, 2**50):
        for loss in (clip_loss, siglip_loss):
            loss(x.requires_grad_(), y.requires_grad_(), 10.0, memory_budget=budget, backend="triton").backward()
"""


def tune(turn: Turn) -> Iterator[Entry]:
    """The package's own tuning, with an empty cache of its own.

    Other processes compile the candidates into Triton's cache first.
    """
    parts = 1 if turn.toy else min(16, os.cpu_count() or 1)
    sizes = ("20", "20") if turn.toy else ("8192", "512", "1024")
    with tempfile.TemporaryDirectory() as folder:

        def environment(part: int | str) -> dict[str, str]:
            return {"FUSED_CONTRASTIVE_AUTOTUNE": "1", "XDG_CACHE_HOME": f"{folder}/{part}"}

        def compiling(part: int) -> subprocess.Popen[bytes]:
            arguments = [sys.executable, "-c", TUNE, turn.device, str(part), str(parts), *sizes[:2]]
            nowhere = subprocess.DEVNULL
            return subprocess.Popen(arguments, stdout=nowhere, stderr=nowhere, env=os.environ | environment(part))

        for process in [compiling(part) for part in range(parts) if parts > 1]:
            try:
                process.wait(max(0.0, turn.left() - 30))
            except subprocess.TimeoutExpired:
                process.kill()
        ended = command(turn, "-c", TUNE, turn.device, "0", "1", *sizes, **environment("all"))
    yield ended
    for found in re.finditer(r"^fused_contrastive: tuned (.*?): (.*)$", ended["said"], re.MULTILINE):
        yield {"row": found[1], "column": "tuned", "status": "ok", "value": found[2]}


def bench(turn: Turn, stage: str, toy: str, *arguments: str) -> Iterator[Entry]:
    """The rows of a suite of the benchmarks; if it was stopped, those that it had measured."""
    name = f"gpu-day-{stage}"
    files = [turn.out / f"{name}.json", turn.out / f"{name}.partial.json"]
    for file in files:
        file.unlink(missing_ok=True)
    where = ("--suite", "toy", "--losses", toy) if turn.toy else ()
    yield command(turn, "-m", "benchmarks", "--out", str(turn.out), "--name", name, *arguments, *where)
    for row in next((json.loads(file.read_text())["rows"] for file in files if file.exists()), []):
        entry = {"row": f"{row['loss']}: {row['implementation']}", "column": f"{row['n']} x {row['d']}"}
        entry["status"] = row["status"]
        if "both" in row:
            u = f"{1e3 * row['u_seconds']:.2f} ms, {row['unit_tflops']:.0f} TFLOP/s"
            yield entry | {"row": f"{row['loss']}: u", "value": u, "seconds": row["u_seconds"]}
            yield entry | {"row": f"{entry['row']}, forward", "value": f"{row['forward']['median']:.2f} u"}
            entry |= {"value": f"{row['both']['median']:.2f} u", "seconds": row["seconds"]}
        if "extra_bytes" in row:
            entry |= {"row": f"{entry['row']}, memory", "value": f"{row['extra_bytes'] / 2**20:.0f} MB"}
        yield entry


def table(turn: Turn) -> Iterator[Entry]:
    return bench(turn, "table", "nt_xent", "--suite", "gpu-table")


def million(turn: Turn) -> Iterator[Entry]:
    return bench(turn, "million", "siglip", "--suite", "million", "--implementations", "ours, memory_budget=0")


def peers(turn: Turn) -> Iterator[Entry]:
    filters = "--losses clip siglip --n 16384 --d 512 --dtype bf16" if not turn.toy else ""
    return bench(turn, "peers", "siglip", "--suite", "gpu", *filters.split(), "--implementations", *PEERS)


STAGES: dict[str, Callable[[Turn], Iterator[Entry]]] = {
    "correctness": correctness, "tests": tests, "table": table, "tune": tune, "million": million, "peers": peers
}  # fmt: skip
SHARES = {"correctness": 12, "tests": 25, "table": 18, "tune": 18, "million": 15, "peers": 12}  # percent of the time
PARTS = {"correctness": ["bf16", "fp16", "fp32", "tf32"]}  # run in parallel, because most of the time is compiling


def work(options: argparse.Namespace) -> int:
    """What a stage's process runs: writes the stage's entries as JSON lines."""
    for entry in STAGES[options.work](Turn(options.until - SPARE, options.toy, options.part, options.out)):
        if "said" in entry:
            entry = entry | {"said": entry["said"][-6000:]}
        with options.lines.open("a") as file:
            file.write(json.dumps(entry) + "\n")
    return 0


def run_stage(stage: str, until: float, options: argparse.Namespace, tell: Callable[[list[Entry]], None]) -> str:
    """Starts a stage, passes what it finds to ``tell``, and returns "done", or how it failed or was stopped."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.getenv("PYTHONPATH")]))}
    if options.toy:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        lines, log = Path(folder) / "lines", Path(folder) / "log"
        arguments = [sys.executable, sys.argv[0], "--work", stage, "--until", str(until), "--lines", str(lines)]
        arguments += ["--out", str(options.out.resolve()), *(["--toy"] if options.toy else [])]
        parts = [] if options.toy else PARTS.get(stage, [])
        started = time.monotonic()
        with log.open("w") as output:
            processes = [
                subprocess.Popen(every, stdout=output, stderr=output, env=environment, start_new_session=True)
                for every in ([*arguments, "--part", part] for part in parts or [""])
            ]
        try:
            while any(process.poll() is None for process in processes) and time.monotonic() < until:
                time.sleep(0.1)
                tell(read(lines))
        finally:
            late = [process for process in processes if process.poll() is None]
            for process in processes:  # the group also has the processes that this one started
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            for process in late:
                with contextlib.suppress(subprocess.TimeoutExpired):  # a process stuck in the driver does not end
                    process.wait(SPARE)
        tell(read(lines))
        if late:
            return f"failed: stopped after {time.monotonic() - started:.0f} s"
        if codes := [process.returncode for process in processes if process.returncode]:
            said = log.read_text(errors="replace").strip().splitlines() or ["nothing"]
            return f"failed: exited with {codes[0]}, and said {said[-1]!r}"
        return "done"


def read(lines: Path) -> list[Entry]:
    """All complete lines; the last one may still be being written."""
    text = lines.read_text() if lines.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def passed(stage: dict[str, Any]) -> bool:
    entries = stage["entries"]
    return stage["status"] == "done" and bool(entries) and all(entry["status"] == "ok" for entry in entries)


def markdown(made: dict[str, Any]) -> str:
    """A table for each stage, the reasons for what is missing in it, and the last output of a command that failed."""
    from benchmarks import report

    lines = ["# A day with a GPU", "", f"`{made['command']}`", "", f"{made['line']}.", ""]
    for stage in made["rows"]:
        entries: list[Entry] = stage["entries"]
        lines += [f"## {stage['stage']}: {stage['status']}, {stage['seconds']:.0f} s", ""]
        cells = {
            (e["row"], e["column"]): e["value"] + " **!**" * (e["status"] != "ok") for e in entries if "value" in e
        }
        if cells:
            rows, columns = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))
            body = [[row, *(cells.get((row, column), "") for column in columns)] for row in rows]
            lines += report.table(["", *columns], body)
        why: dict[str, list[str]] = {}
        for entry in (entry for entry in entries if entry["status"] != "ok"):
            why.setdefault(f"{entry['row']}: {entry['status']}", []).append(entry["column"])
        lines += [f"- {what} ({'; '.join(columns)})" for what, columns in why.items()]
        lines += [""] * bool(why)
        for entry in (entry for entry in entries if entry["status"] != "ok" and "said" in entry):
            lines += ["```text", *entry["said"].splitlines()[-30:], "```", ""]
    return "\n".join(lines)


def run(options: argparse.Namespace, arguments: list[str]) -> int:
    from benchmarks import report
    from benchmarks.provenance import line, provenance

    deadline, found = time.monotonic() + 60 * options.minutes - SPARE, provenance()
    stages: list[dict[str, Any]] = []
    made: dict[str, Any] = {"command": shlex.join(["python", "benchmarks/gpu_day.py", *arguments])}
    made |= {"provenance": found, "line": line(found), "rows": stages}

    def write() -> None:
        report.write_json(made, options.out / "gpu-day.json")
        (options.out / "gpu-day.md").write_text(markdown(made))

    def tell(found: list[Entry]) -> None:
        if len(found) > len(stages[-1]["entries"]):
            stages[-1] |= {"entries": found, "seconds": time.monotonic() - begun}
            write()

    chosen = [stage for stage in STAGES if stage in options.stage]
    for number, stage in enumerate(chosen):
        begun = time.monotonic()
        left = deadline - begun
        stages.append({"stage": stage, "status": "running", "seconds": 0.0, "entries": []})
        write()
        if left < LEAST:
            stages[-1]["status"] = f"not started: {max(0.0, left):.0f} s left"
        else:
            share = SHARES[stage] / sum(SHARES[later] for later in chosen[number:])
            stages[-1]["status"] = run_stage(stage, begun + max(LEAST, left * share), options, tell)
        stages[-1]["seconds"] = time.monotonic() - begun
        write()
        print(f"{stage}: {stages[-1]['status']}, {stages[-1]['seconds']:.0f} s", flush=True)
    print(markdown(made))
    return 0 if all(passed(row) for row in stages if row["stage"] in ("correctness", "tests")) else 1


def cannot_start(toy: bool) -> str | None:
    for package in ("torch", "triton"):
        if importlib.util.find_spec(package) is None:
            return f"needs the package {package}"
    import torch

    if not toy and not torch.cuda.is_available():
        return f"needs a GPU, and torch {torch.__version__} sees none here (--toy runs on a CPU)"
    return None


def positive(text: str) -> float:
    if not 0 < (value := float(text)) < 1e4:
        raise argparse.ArgumentTypeError(f"got {text}, expected a number of minutes above 0")
    return value


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=positive, default=8.0, help="minutes for all stages (default %(default)s)")
    parser.add_argument("--stage", nargs="+", choices=list(STAGES), default=list(STAGES), help="default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", metavar="FOLDER")
    parser.add_argument("--toy", action="store_true", help="toy sizes on the CPU, by Triton's interpreter")
    for name, kind in (("work", str), ("part", str), ("until", float), ("lines", Path)):  # for a stage's process
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work:
        return work(options)
    if (why := cannot_start(options.toy)) is not None:
        print(f"gpu_day: {why}")
        return 2
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"--out: got {options.out}, expected a folder ({error.strerror})")
        return 2
    for number in (signal.SIGTERM, signal.SIGALRM):  # SystemExit lets run_stage stop its processes
        signal.signal(number, lambda *_: sys.exit(1))
    signal.alarm(int(60 * options.minutes + 3 * SPARE))
    return run(options, arguments)


if __name__ == "__main__":
    sys.exit(main())
