"""The runner distinguishes a kill from an error and from a survivor."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from mutant import Mutant, StaleMutantError
from mutant_tree import Run, Tree

ROOT = Path(__file__).parents[2]


TEST = """
import os, signal, time
from fused_contrastive import value
def test_value():
    if value() == "hang": time.sleep(60)
    if value() == "crash": os.kill(os.getpid(), signal.SIGSEGV)
    assert value() == "right"
def test_nothing():
    pass
"""


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A package of one function."""
    for name in ("fused_contrastive", "tests"):
        (tmp_path / "source" / name).mkdir(parents=True)
    (tmp_path / "source/fused_contrastive/__init__.py").write_text('def value():\n    return "right"\n')
    (tmp_path / "source/tests/test_value.py").write_text(TEST)
    return Tree(tmp_path / "source", tmp_path / "copy", sys.executable, 0, limit=60)


def mutant(replace: str, find: str = '"right"', test: str = "tests/test_value.py") -> Mutant:
    return Mutant("m", "broken", "fused_contrastive/__init__.py", find, replace, (test,))


@pytest.mark.parametrize(
    ("replace", "verdict", "by"),
    [
        ('"wrong"', "killed", "tests/test_value.py::test_value"),
        ('"crash"', "killed", "crash (SIGSEGV)"),
        ('"right" + ""', "survived", ""),
        ('"right"\nimport nowhere', "error", "collect"),
        ('"right', "error", "unterminated"),
        ('"right"', "error", "changes nothing"),
    ],
)
def test_verdicts(tree: Tree, replace: str, verdict: str, by: str) -> None:
    tree.check_import()
    result = tree.try_out(mutant(replace))
    assert result.verdict == verdict, result.by
    assert by in result.by
    assert (tree.root / "fused_contrastive/__init__.py").read_text() == 'def value():\n    return "right"\n'
    assert tree.test(["tests/test_value.py"], "").verdict == ("survived", "")


def test_a_hang_is_a_kill(tree: Tree) -> None:
    tree.limit = 5
    result = tree.try_out(mutant('"hang"'))
    assert (result.verdict, result.by) == ("killed", "time-out")
    assert result.seconds < 30


def test_only_a_test_that_ran_is_a_kill(tree: Tree) -> None:
    assert tree.try_out(mutant('"wrong"', test="tests/test_other.py")).verdict == "error"
    assert Run(1, "setup", "tests/test_value.py::test_value").verdict[0] == "error"
    assert tree.test(["tests/test_value.py"], "nowhere").verdict[0] == "error"  # nothing selected


@pytest.mark.parametrize("find", ["not there", "r"])
def test_stale(tree: Tree, find: str) -> None:
    with pytest.raises(StaleMutantError, match="expected once"):
        mutant("x", find).applied(tree.root)
    assert tree.try_out(mutant("x", find)).verdict == "error"


def test_a_copy_follows_its_source(tree: Tree) -> None:
    (tree.source / "tests/test_value.py").unlink()
    (tree.source / "tests/test_new.py").write_text("def test_new(): pass\n")
    (tree.root / "fused_contrastive/__init__.py").write_text("broken and left behind")
    Tree(tree.source, tree.root, sys.executable, 0, 5)
    assert sorted(path.name for path in (tree.root / "tests").iterdir()) == ["test_new.py"]
    assert "right" in (tree.root / "fused_contrastive/__init__.py").read_text()


def test_nothing_matches() -> None:
    command = [sys.executable, ROOT / "tests/mutants", "--only", "no such mutant"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "matches none" in result.stdout
