"""The libraries' own loss tests, with their classes and with ours.

    python tests/conformance/library_tests.py --checkout lightly=clone@REF --checkout open_clip=clone@REF ...

NAME=PATH@REF is a clone, bare or not, and a commit of it (HEAD without @REF): PyPI's source distributions leave these
tests out. Only ``tests`` is taken from it, so that the installed library is tested, and the library's sources where
SUITES says so. Each file runs in a pytest of its own, three times at most: with the library's classes; with ours, by
``patch_*()`` before the test modules are imported; and, where ours raised NotImplementedError, with ours for what they
cover and the library's for the rest, so that the assertions behind it are reached. This module is the plugin as well.

Exit code 1: a test passes with theirs, fails with ours and is not in EXPECTED, or is there for a NotImplementedError
and fails even so in the third run; or a file built none of our classes, or a library called none.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import functools
import importlib
import inspect
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

SETTINGS = "LIBRARY_TESTS"  # the environment variable that tells the plugin what to do


class Suite(NamedTuple):
    """Which tests of a library, for which adapter."""

    distribution: str
    adapter: str
    files: tuple[str, ...]
    note: str
    sources: str | None = None  # the folder of the clone whose library is tested instead of the installed one
    environment: tuple[tuple[str, str], ...] = ()


SUITES = {
    "lightly": Suite(
        "lightly",
        "lightly",
        (
            "tests/loss/test_ntx_ent_loss.py",
            "tests/loss/test_dcl_loss.py",
            "tests/utils/test_dist__gather__losses.py",
        ),
        note="The memory bank's own tests use no loss. The file of gathers trains in two processes.",
    ),
    "pytorch-metric-learning": Suite(
        "pytorch-metric-learning",
        "pytorch_metric_learning",
        (
            "tests/losses/test_ntxent_loss.py",
            "tests/losses/test_self_supervised_loss.py",
            "tests/losses/test_cross_batch_memory.py",
            "tests/losses/test_losses_without_labels.py",
        ),
        note="SupConLoss has no file of its own: it is in test_ntxent_loss.py.",
        environment=(("TEST_DEVICE", "cpu"), ("TEST_DTYPES", "float32,float64")),
    ),
    "open_clip": Suite(
        "open_clip_torch",
        "open_clip",
        (
            "tests/test_siglip_chunked_loss.py",
            "tests/test_factory_task.py",
            "tests/test_clap_task.py",
            "tests/test_naflexclap.py",
        ),
        note=(
            "Release 3.3.0 has no test of a loss, so this is a later commit, tests and library. Its tests hardly call "
            "one: test_siglip_chunked_loss.py calls a private method that ours inherits and do not use, "
            "test_factory_task.py looks at what the factory builds."
        ),
        sources="src",
    ),
    "sentence-transformers": Suite(
        "sentence-transformers",
        "sentence_transformers",
        (
            "tests/sentence_transformer/losses/test_cmnrl.py",
            "tests/sentence_transformer/losses/test_cached_mnsrl.py",
            "tests/sentence_transformer/losses/test_gradcache.py",
            "tests/sentence_transformer/losses/test_merged_forward.py",
            "tests/sentence_transformer/losses/test_adaptive_layer.py",
            "tests/sentence_transformer/test_trainer.py",
            "tests/sentence_transformer/test_model_card.py",
            "tests/multi_vector_encoder/losses/test_misc.py",
            "tests/multi_vector_encoder/test_trainer.py",
            "tests/multi_vector_encoder/test_model_card.py",
            "tests/base/modules/test_router.py",
        ),
        note="Directions, partition modes and hardness are in test_gradcache.py and test_cmnrl.py.",
    ),
}


class Expected(NamedTuple):
    """Tests that fail with ours and should."""

    suite: str
    test: str  # a pattern of fnmatch over the test's id
    error: str  # a regular expression that the error has to contain
    reason: str


EXPECTED = (
    Expected(
        "pytorch-metric-learning", "*/test_ntxent_loss.py::*", "distance: got LpDistance",
        "one of its losses has LpDistance, which the adapter refuses",
    ),
    Expected(
        "pytorch-metric-learning", "*/test_losses_without_labels.py::*", "indices_tuple: got one",
        "passes a miner's pairs, which the adapter refuses",
    ),
    Expected(
        "pytorch-metric-learning", "*/test_cross_batch_memory.py::*", "loss: got pytorch_metric_learning",
        "a memory around another loss than ours, which the adapter refuses",
    ),
    Expected(
        "pytorch-metric-learning", "*/test_cross_batch_memory.py::*", "miner: got one",
        "a memory with a miner, which the adapter refuses",
    ),
    Expected(
        "sentence-transformers", "*::test_cmnrl_attributes_and_config_back_compat", "similarity_fct: got functools",
        "a partial of cos_sim as similarity_fct, which the adapter refuses",
    ),
    Expected(
        "sentence-transformers", "*::test_cmnrl_gather_across_devices_offset", "Scalars are not close",
        "puts a stand-in for the gather into the library's module; ours gather through torch.distributed "
        "(tests/conformance/test_processes.py compares them over processes)",
    ),
    Expected(
        "sentence-transformers", "*::test_gradcache_under_autocast", "loss.dtype|requires reduced-precision embeddings",
        "asserts a bfloat16 loss, ours is float32 under autocast",
    ),
    Expected(
        "sentence-transformers", "*::test_similarity_fct_config_*", "similarity_fct: got .*(XTRScores|partial)",
        "XTRScores, or a partial of colbert_scores, as similarity_fct, which the adapter refuses",
    ),
    Expected(
        "sentence-transformers", "*::test_model_card_base*", "Loss: .<code>MultiVectorMultipleNegativesRankingLoss",
        "the card gives a class outside the library by its full name, without a link into the library's pages",
    ),
)  # fmt: skip

# --- the plugin -------------------------------------------------------------------------------------------------------

COUNTED = {  # what of our classes does the work
    "forward", "compute_loss", "create_indices_tuple", "compute_loss_from_embeddings", "calculate_loss",
    "fused_colbert_scores",
}  # fmt: skip
_outcomes: dict[str, tuple[str, str]] = {}
_calls: dict[str, Counter[str]] = {}
_built: set[str] = set()  # tests that made an object of ours
_test = ""
_launched = "LOCAL_RANK" in os.environ  # Lightning starts the command again for its second process


def pytest_load_initial_conftests() -> None:
    """Before the library's conftest."""
    mode, name = _settings()["mode"], _settings()["adapter"]
    if mode == "theirs":
        return
    adapter = importlib.import_module(f"fused_contrastive.adapters.{name}")
    getattr(adapter, f"patch_{name}")()
    for owner, attribute, method in list(_counted_methods(adapter, mode == "covered")):
        setattr(owner, attribute, method)


def pytest_runtest_logstart(nodeid: str) -> None:
    global _test
    _test = nodeid


def pytest_runtest_setup() -> None:
    """lightly draws from numpy's unseeded generator."""
    import numpy as np
    import torch

    seed = _settings()["seed"]
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def pytest_runtest_logreport(report: Any) -> None:
    if report.failed:
        _outcomes.setdefault(report.nodeid, ("failed", _error(report)))
    elif report.skipped:
        _outcomes.setdefault(report.nodeid, ("skipped", ""))
    elif report.when == "teardown":
        _outcomes.setdefault(report.nodeid, ("passed", ""))


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        _outcomes[report.nodeid] = ("failed", _error(report))


def pytest_sessionfinish() -> None:
    if not _launched:
        Path(_settings()["report"]).write_text(
            json.dumps({"outcomes": _outcomes, "calls": _calls, "built": sorted(_built)})
        )


def _settings() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(os.environ[SETTINGS])
    return found


def _error(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr).strip().rpartition("\n")[2]
    return " ".join(text.split())


def _counted_methods(adapter: Any, covered: bool) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """Owner, name and replacement of what our classes define, counting the calls, and of their constructors.

    ``covered``: a call that raises NotImplementedError is given to the library's method.
    """
    for name, value in vars(adapter).items():
        if name in COUNTED and inspect.isfunction(value):
            yield adapter, name, _counted(name, value, None)
        if not isinstance(value, type) or value.__module__ != adapter.__name__:
            continue
        ours = [base for base in value.__mro__ if base.__module__ == adapter.__name__]
        theirs = next((base for base in value.__mro__ if base not in ours and base.__name__ == name), None)
        for attribute in {"__init__"}.union(*(vars(base) for base in ours)):
            owner = next(base for base in value.__mro__ if attribute in vars(base))
            function = vars(owner)[attribute]
            if inspect.isfunction(function) and (owner in ours or attribute == "__init__"):
                library = getattr(theirs, attribute, None) if covered else None
                yield value, attribute, _counted(attribute, function, library)


def _counted(name: str, ours: Callable[..., Any], theirs: Callable[..., Any] | None) -> Callable[..., Any]:
    is_method = "." in ours.__qualname__

    @functools.wraps(ours)
    def call(first: Any, *args: Any, **options: Any) -> Any:
        if theirs is not None and "_uncovered" in vars(first):
            return theirs(first, *args, **options)
        try:
            result = ours(first, *args, **options)
        except NotImplementedError:
            if theirs is None:
                raise
            if name == "__init__":
                vars(first)["_uncovered"] = True
            return theirs(first, *args, **options)
        if name == "__init__":
            _built.add(_test)
        if name in COUNTED:
            _calls.setdefault(_test, Counter())[type(first).__name__ if is_method else name] += 1
        return result

    return call


# --- the script -------------------------------------------------------------------------------------------------------

Result = dict[str, Any]  # "outcomes": {test: [outcome, error]}, "calls": {test: {class: times}}, "built": [test]


class Row(NamedTuple):
    """One file's tests in every mode."""

    file: str
    theirs: Result
    ours: Result
    covered: Result | None  # where ours raised NotImplementedError

    def passed(self, mode: str) -> set[str]:
        result = getattr(self, mode) or self.ours
        return {test for test, (outcome, _) in result["outcomes"].items() if outcome == "passed"}

    @property
    def failures(self) -> list[str]:
        """Tests that pass with theirs only."""
        return sorted(self.passed("theirs") - self.passed("ours"))

    def error(self, test: str) -> str:
        return str(self.ours["outcomes"].get(test, ("missing", "not collected with ours"))[1])

    @property
    def built(self) -> set[str]:
        return {test for result in (self.ours, self.covered) if result for test in result["built"] if test}

    @property
    def calls(self) -> dict[str, dict[str, int]]:
        """By test: how often ours did the work, in the run where they did more of it: a test ends where it fails."""
        found: dict[str, dict[str, int]] = dict(self.ours["calls"])
        for test, calls in (self.covered or {"calls": {}})["calls"].items():
            found[test] = max(found.get(test, {}), calls, key=lambda c: sum(c.values()))
        return found


class Checkout(NamedTuple):
    """A library's tests, copied out of its repository."""

    suite: str
    folder: Path
    commit: str
    date: str


def check_out(spec: str, into: Path) -> Checkout:
    """NAME=PATH[@REF] -> that commit's tests, in a folder of their own."""
    suite, _, where = spec.partition("=")
    path, _, ref = where.partition("@")
    if suite not in SUITES or not path:
        raise SystemExit(f"--checkout: got {spec!r}, expected NAME=PATH or NAME=PATH@REF, NAME of {', '.join(SUITES)}")
    git, ref, folder = ["git", "-C", path], ref or "HEAD", into / suite
    folder.mkdir()
    wanted = ["tests", *filter(None, [SUITES[suite].sources])]
    archive = subprocess.run([*git, "archive", ref, *wanted], check=True, capture_output=True).stdout
    subprocess.run(["tar", "x", "-C", folder], input=archive, check=True)
    (folder / "pytest.ini").write_text("[pytest]\n")
    commit, date = subprocess.check_output([*git, "log", "-1", "--format=%h %cs", ref], text=True).split()
    return Checkout(suite, folder, commit, date)


def run(checkout: Checkout, file: str, mode: str, seed: int, home: Path | None) -> Result:
    """pytest on one file in a process of its own."""
    suite = SUITES[checkout.suite]
    report = checkout.folder / "report.json"
    report.unlink(missing_ok=True)
    paths = [str(Path(__file__).parent), *([str(checkout.folder / suite.sources)] if suite.sources else [])]
    settings = {"mode": mode, "adapter": suite.adapter, "report": str(report), "seed": seed}
    environment = {
        **os.environ, **dict(suite.environment), SETTINGS: json.dumps(settings),
        "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
        **({"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"} if home else {}),
    }  # fmt: skip
    command = [
        sys.executable, "-m", "pytest", "-q", "-c", "pytest.ini", "-p", "no:cacheprovider", "-p", Path(__file__).stem,
        file,
    ]  # fmt: skip
    log = checkout.folder / f"{Path(file).stem}.{mode}.log"
    with log.open("w") as out:
        subprocess.run(command, cwd=checkout.folder, env=environment, stdout=out, stderr=subprocess.STDOUT)
    if not report.exists():
        raise SystemExit(f"{checkout.suite} {file}, {mode}: pytest wrote no report\n{log.read_text()[-4000:]}")
    found: Result = json.loads(report.read_text())
    return found


def run_file(checkout: Checkout, file: str, seed: int, home: Path | None) -> Row:
    theirs, ours = (run(checkout, file, mode, seed, home) for mode in ("theirs", "ours"))
    row = Row(file, theirs, ours, None)
    refused = any("NotImplementedError" in row.error(test) for test in row.failures)
    return row._replace(covered=run(checkout, file, "covered", seed, home)) if refused else row


def reason(suite: str, row: Row, test: str) -> str | None:
    """Why a test rightly fails only with ours."""
    error = row.error(test)
    found = [e for e in EXPECTED if e.suite == suite and fnmatch.fnmatch(test, e.test) and re.search(e.error, error)]
    if not found or ("NotImplementedError" in error and test not in row.passed("covered")):
        return None
    return found[0].reason


def hub_stand_in(home: Path) -> None:
    """A cache of the Hugging Face hub whose BERTs are 2 layers of random weights.

    sentence-transformers' tests name small models of the hub; the losses are compared for the same model, whichever.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    letters = [chr(c) for c in range(33, 127)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    words += [f"[unused{i}]" for i in range(30522 - len(words))]  # as many as google-bert/bert-base-uncased has
    bare, whole, vocabulary = home / "bare", home / "whole", home / "vocab.txt"
    vocabulary.write_text("\n".join(words))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512,
        initializer_range=0.2,
    )  # fmt: skip
    BertModel(config).save_pretrained(bare)
    BertTokenizerFast(str(vocabulary), model_max_length=512).save_pretrained(bare)
    module = Transformer(str(bare))
    SentenceTransformer(modules=[module, Pooling(128)]).save_pretrained(str(whole), create_model_card=False)
    for model, source in (
        ("google-bert/bert-base-uncased", bare),
        ("distilbert/distilbert-base-uncased", bare),
        ("sentence-transformers-testing/stsb-bert-tiny-safetensors", whole),
    ):
        repository = home / "hub" / f"models--{model.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        (repository / "snapshots").mkdir()
        (repository / "snapshots" / ("0" * 40)).symlink_to(source)


COLUMNS = (
    "library", "file", "tests", "build ours", "call ours", "pass with theirs", "of these with ours",
    "of these with ours where they cover it", "calls of ours",
)  # fmt: skip


def counts(row: Row) -> list[int]:
    kept, calls = row.passed("theirs"), row.calls
    return [
        len(row.theirs["outcomes"]), len(row.built), len(calls), len(kept), len(kept & row.passed("ours")),
        len(kept & row.passed("covered")), sum(sum(c.values()) for c in calls.values()),
    ]  # fmt: skip


def table(rows: dict[str, list[Row]]) -> list[str]:
    lines = [f"| {' | '.join(COLUMNS)} |", "| --- | --- |" + " ---: |" * (len(COLUMNS) - 2)]
    totals = [0] * (len(COLUMNS) - 2)
    for suite, files in rows.items():
        for row in files:
            numbers = counts(row)
            totals = [a + b for a, b in zip(totals, numbers, strict=True)]
            lines.append(f"| {suite} | {row.file.removeprefix('tests/')} | {' | '.join(map(str, numbers))} |")
    return [*lines, f"| all | | {' | '.join(map(str, totals))} |"]


def only_with_ours(rows: dict[str, list[Row]]) -> list[str]:
    lines = ["| test | error | reason |", "| --- | --- | --- |"]
    for suite, files in rows.items():
        for row in files:
            for test in row.failures:
                why = reason(suite, row, test) or "**unexpected**"
                behind = "; passes where ours cover it" if test in row.passed("covered") else ""
                name = test.removeprefix("tests/").replace("::", " ")
                lines.append(f"| {suite}: {name} | {shortened(row.error(test), 90)} | {why}{behind} |")
    return lines


def not_with_theirs(rows: dict[str, list[Row]]) -> list[str]:
    """What does not pass on the library's own classes, and so says nothing: alike errors together."""
    lines = ["| library | file | tests | |", "| --- | --- | ---: | --- |"]
    for suite, files in rows.items():
        for row in files:
            alike = Counter(
                outcome if outcome == "skipped" else shortened(error, 70)
                for outcome, error in row.theirs["outcomes"].values()
                if outcome != "passed"
            )
            file = row.file.removeprefix("tests/")
            lines += [f"| {suite} | {file} | {count} | {error} |" for error, count in alike.most_common()]
    return lines


def shortened(error: str, length: int) -> str:
    error = re.sub(r" object at 0x[0-9a-f]+| at 0x[0-9a-f]+|\'?/\S+", "", error).replace("|", "/")
    return f"`{error if len(error) <= length else error[:length].rstrip() + ' ...'}`".replace("``", "")


def calls_by_class(rows: list[Row]) -> str:
    total: Counter[str] = Counter()
    for row in rows:
        for calls in row.calls.values():
            total.update(calls)
    return ", ".join(f"{name} {times}" for name, times in total.most_common()) or "none"


def version(checkout: Checkout) -> str:
    suite = SUITES[checkout.suite]
    installed = metadata.version(suite.distribution)
    if suite.sources:
        return f"{checkout.suite}: tests and library of commit {checkout.commit} of {checkout.date}"
    return f"{checkout.suite} {installed}, tests of commit {checkout.commit} of {checkout.date}"


def page(rows: dict[str, list[Row]], checkouts: dict[str, Checkout], seed: int, hub: bool) -> str:
    files = [row for found in rows.values() for row in found]
    numbers = [sum(column) for column in zip(*map(counts, files), strict=True)]
    command = " \\\n      ".join(f"--checkout {c.suite}={c.suite}@{c.commit}" for c in checkouts.values())
    models = "" if hub else (
        "\n\nsentence-transformers' tests load small models from the Hugging Face hub. Here these are BERTs of the "
        "same make with random weights, the same for both classes, which the script writes into a cache; data sets of "
        "the hub are missing."
    )  # fmt: skip
    return "\n".join(
        [
            "# The libraries' own tests",
            "",
            f"{numbers[0]} tests in {len(files)} files of the libraries' own suites. {numbers[3]} pass with the "
            f"library's classes in this environment; of these, {numbers[4]} pass with ours in their place, and "
            f"{numbers[5]} once what the adapter refuses goes to the library. The rest are below, with the reason. "
            f"{numbers[1]} tests build a loss of ours, {numbers[2]} call one, {numbers[6]} times in all.",
            "",
            f"{datetime.date.today()}, torch {metadata.version('torch')} on the CPU, seed {seed} before each test:",
            "",
            f"    python tests/conformance/library_tests.py {command}",
            "",
            *(
                f"- {version(c)}. {SUITES[c.suite].note} Calls: {calls_by_class(rows[c.suite])}."
                for c in checkouts.values()
            ),
            "",
            '"Build ours" and "call ours" count the tests in which a class of ours is made, and computes a loss: the '
            f"others of a file are of something else.{models}",
            "",
            *table(rows),
            "",
            "## Fail only with ours",
            "",
            *only_with_ours(rows),
            "",
            "## Do not pass with theirs",
            "",
            *not_with_theirs(rows),
            "",
        ]
    )


def complaints(rows: dict[str, list[Row]]) -> list[str]:
    """What makes the exit code 1."""
    found = []
    for suite, files in rows.items():
        for row in files:
            found += [
                f"{suite} {test}: fails only with ours: {row.error(test)}"
                for test in row.failures
                if reason(suite, row, test) is None
            ]
            if not row.built:
                found.append(f"{suite} {row.file}: no class of ours was built")
        if not any(row.calls for row in files):
            found.append(f"{suite}: no class of ours was called")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkout", action="append", required=True, metavar="NAME=PATH[@REF]", help=", ".join(SUITES))
    parser.add_argument("--seed", type=int, default=0, help="before each test (default 0)")
    parser.add_argument(
        "--hub", action="store_true", help="models of the Hugging Face hub, not random ones in their place"
    )
    parser.add_argument("--only", default="*", metavar="PATTERN", help="files whose path matches")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="writes the page there too")
    args = parser.parse_args()
    rows: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory() as folder:
        checkouts = {c.suite: c for c in (check_out(spec, Path(folder)) for spec in args.checkout)}
        home = None
        if "sentence-transformers" in checkouts and not args.hub:
            home = Path(folder) / "huggingface"
            home.mkdir()
            hub_stand_in(home)
        for suite, checkout in checkouts.items():
            rows[suite] = []
            for file in fnmatch.filter(SUITES[suite].files, args.only):
                rows[suite].append(run_file(checkout, file, args.seed, home))
                print(suite, file, *counts(rows[suite][-1]), file=sys.stderr, flush=True)
    text = page(rows, checkouts, args.seed, args.hub)
    print(text)
    if args.markdown:
        args.markdown.write_text(text)
    found = complaints(rows)
    print("\n".join(found) or "Nothing unexpected.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
