"""One file of a library's tests in a pytest of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from library_plugin import SETTINGS
from library_results import Result, Row
from library_suites import SUITES


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
        sys.executable, "-m", "pytest", "-q", "-c", "pytest.ini", "-p", "no:cacheprovider", "-p", "library_plugin",
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
