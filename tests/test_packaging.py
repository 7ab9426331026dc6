"""Installing without a C++ compiler, and what an sdist holds. Nothing is compiled or downloaded here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
from snippets import ROOT

# Found by metadata, because looking for the module pip would disable setuptools' distutils hook in this process.
INSTALLED = {distribution.name for distribution in metadata.distributions()}
pytestmark = pytest.mark.skipif(
    not INSTALLED.issuperset({"pip", "setuptools", "wheel"}),
    reason="pip, setuptools or wheel is not installed beside torch",
)
BUILT_FROM = ["setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the package is built from, without anything built."""
    copy = tmp_path_factory.mktemp("project")
    for name in BUILT_FROM:
        shutil.copy(ROOT / name, copy)
    for name in ("csrc", "fused_contrastive", "benchmarks", "tools"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return copy


@pytest.fixture
def no_compiler(tmp_path: Path) -> dict[str, str]:
    """An environment whose PATH is an empty folder."""
    (tmp_path / "bin").mkdir()
    hidden = ("CC", "CXX", "FUSED_CONTRASTIVE_EXTENSION", "PYTHONPATH")
    return {**{k: v for k, v in os.environ.items() if k not in hidden}, "PATH": str(tmp_path / "bin")}


@pytest.fixture
def failing_compiler(no_compiler: dict[str, str]) -> dict[str, str]:
    """The same with a compiler that prints its version or its arguments, and compiles nothing."""
    return with_compiler(no_compiler, "c++ 1.0")


def with_compiler(environment: dict[str, str], version: str) -> dict[str, str]:
    compiler = Path(environment["PATH"]) / "c++"
    lines = [
        "#!/bin/sh",
        f'[ "$1" = --version ] && echo "{version}" && exit',
        'echo "does not compile: $*" >&2',
        "exit 1",
    ]
    compiler.write_text("\n".join(lines) + "\n")
    compiler.chmod(0o755)
    return environment


def install(project: Path, into: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs ``pip install`` into a separate folder."""
    options = ["--verbose", "--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check"]
    return run(["-m", "pip", "install", *options, "--target", str(into), str(project)], into.parent, environment)


def use(arguments: list[str], site: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs Python with the package installed in ``site``, beside this environment's other packages.

    -S, because the .pth file of an editable install of this project would bring its own extension.
    """
    paths = [str(site), *(path for path in sys.path if path.endswith("-packages"))]
    return run(["-S", *arguments], site.parent, {**environment, "PYTHONPATH": os.pathsep.join(paths)})


def run(arguments: list[str], folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


USE = """
import warnings
import torch, fused_contrastive
from fused_contrastive import clip_loss
assert fused_contrastive.__file__.startswith({site!r}), fused_contrastive.__file__
x, y = torch.randn(2, 6, 4)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    asked = clip_loss(x, y, 2.0, backend="reference")
    assert not caught, caught[0].message
    first = clip_loss(x, y, 2.0)
    again = fused_contrastive.ClipLoss()(x, y, 2.0)
    compiled = torch.compile(lambda: clip_loss(x, y, 2.0), fullgraph=True, backend="eager")()
    ranking = fused_contrastive.rank(x, y, k=2)
assert first == again == compiled == asked
(warning,) = caught
assert warning.filename == "<string>", warning.filename  # the caller's line, not one of this package
for part in ("reference backend", "made without a C++ compiler", "install g++ or clang++", "--no-build-isolation"):
    assert part in str(warning.message), part
try:
    clip_loss(x, y, 2.0, backend="cpp")
except RuntimeError as error:
    assert "backend 'cpp' cannot run here: its compiled extension is not in this installation" in str(error), error
else:
    raise SystemExit("cpp fell back")
"""


def test_works_without_a_compiler(project: Path, tmp_path: Path, no_compiler: dict[str, str]) -> None:
    site = tmp_path / "site"
    installed = install(project, site, no_compiler)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    assert "built WITHOUT its C++ CPU backend: no C++ compiler" in installed.stdout + installed.stderr
    assert not list(site.glob("fused_contrastive/_C*.so"))
    assert {path.name for path in site.iterdir() if path.suffix != ".dist-info"} <= {"fused_contrastive", "bin"}
    (about,) = site.glob("*.dist-info/METADATA")
    assert re.findall(r"^Requires-Dist: ([^;\n]+)$", about.read_text(), re.MULTILINE) == ["torch>=2.8", "numpy"]
    used = use(["-c", USE.format(site=str(site))], site, no_compiler)
    assert used.returncode == 0, used.stdout + used.stderr
    shown = use(["-m", "fused_contrastive", "info"], site, {**no_compiler, "COLUMNS": "1000"})
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    (cpp,) = (line for line in lines if "backend cpp" in line)
    for part in (
        "not usable",
        "made without a C++ compiler",
        "install g++ or clang++",
        "pip install",
        "FUSED_CONTRAST",
    ):
        assert part in cpp, shown.stdout
    assert any('"auto" on the CPU' in line and "reference" in line for line in lines), shown.stdout
    assert any("backend reference" in line and "usable" in line for line in lines), shown.stdout


@pytest.mark.parametrize("built", [True, False])
def test_sources_that_hide_an_installation(
    built: bool, project: Path, tmp_path: Path, no_compiler: dict[str, str]
) -> None:
    """In a clone Python imports the sources: the message names an installed package that has the extension."""
    package = tmp_path / "site" / "fused_contrastive"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    if built:
        (package / f"_C{EXTENSION_SUFFIXES[0]}").touch()
    paths = [str(package.parent), *(path for path in sys.path if path.endswith("-packages"))]
    environment = {**no_compiler, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "1000"}
    for command, status in (("info", 0), ("verify --backend cpp", 2)):
        ended = run(["-S", "-m", "fused_contrastive", *command.split()], project, environment)
        assert ended.returncode == status, ended.stderr
        said = ended.stdout + ended.stderr
        if built:
            assert f"the sources in {project / 'fused_contrastive'}, without a compiled extension, hide" in said
            assert f"the installed package, which has one: {package}. Start Python in another folder" in said
            assert "`pip install --no-build-isolation -e .`" in said
        else:
            assert f"has not been built in the sources, {project / 'fused_contrastive'}" in said
            assert "pip install --force-reinstall" in said


@pytest.mark.parametrize("missing", [["torch"], ["torch", "ninja", "pybind11", "numpy"]], ids=" ".join)
def test_without_what_builds_it(missing: list[str], project: Path, failing_compiler: dict[str, str]) -> None:
    """Without build isolation, the error lists what is missing, and a command to install pyproject.toml's list."""
    hidden = f"import sys, runpy; sys.modules.update(dict.fromkeys({missing})); sys.argv = ['setup.py', 'dist_info']"
    made = run(["-c", f"{hidden}; runpy.run_path('setup.py')"], project, failing_compiler)
    assert made.returncode == 1
    assert f"is built with {', '.join(missing)}, which this environment lacks" in made.stderr
    assert "Traceback" not in made.stderr
    (listed,) = re.findall(r"^requires = \[(.*)\]$", (project / "pyproject.toml").read_text(), re.MULTILINE)
    (command,) = re.findall("pip install (.*); then", made.stderr)
    assert sorted(command.replace('"', "").split()) == sorted(listed.replace('"', "").split(", "))


@pytest.mark.parametrize(
    ("switch", "said"),
    [("1", "=1, but the extension cannot be built: no C++ compiler"), ("yes", "got 'yes', expected 0 (never), 1")],
)
def test_switch_that_raises(project: Path, tmp_path: Path, no_compiler: dict[str, str], switch: str, said: str) -> None:
    installed = install(project, tmp_path / "site", {**no_compiler, "FUSED_CONTRASTIVE_EXTENSION": switch})
    assert installed.returncode != 0
    assert f"FUSED_CONTRASTIVE_EXTENSION{said if switch == '1' else ': ' + said}" in installed.stdout + installed.stderr


def test_switch_that_builds_nothing(project: Path, tmp_path: Path, failing_compiler: dict[str, str]) -> None:
    installed = install(project, tmp_path / "site", {**failing_compiler, "FUSED_CONTRASTIVE_EXTENSION": "0"})
    assert installed.returncode == 0, installed.stdout + installed.stderr
    assert "WITHOUT its C++ CPU backend: FUSED_CONTRASTIVE_EXTENSION=0" in installed.stdout + installed.stderr


def test_compiler_that_fails_is_an_error(project: Path, tmp_path: Path, failing_compiler: dict[str, str]) -> None:
    installed = install(project, tmp_path / "site", failing_compiler)
    assert installed.returncode != 0
    assert "does not compile" in installed.stdout + installed.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="no OpenMP elsewhere")
@pytest.mark.parametrize(("version", "openmp"), [("g++ (Debian) 12.2", True), ("Debian clang version 19.1", False)])
def test_openmp_is_for_gcc(
    project: Path, tmp_path: Path, no_compiler: dict[str, str], version: str, openmp: bool
) -> None:
    """Clang's OpenMP calls functions that the runtime in torch does not have: the extension would not load."""
    installed = install(project, tmp_path / "site", with_compiler(no_compiler, version))
    said = installed.stdout + installed.stderr
    assert "does not compile" in said
    assert ("-fopenmp" in said) == openmp


def test_sdist_holds_all_that_is_built_from(project: Path, tmp_path: Path, no_compiler: dict[str, str]) -> None:
    """Making an sdist needs no compiler, even if the switch asks for the extension."""
    environment = {**no_compiler, "FUSED_CONTRASTIVE_EXTENSION": "1"}
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    made = run(["-c", code], project, environment)
    assert made.returncode == 0, made.stderr
    with tarfile.open(tmp_path / made.stdout.splitlines()[-1]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    sources = {path.relative_to(project).as_posix() for path in project.glob("*/**/*") if path.is_file()}
    needed = {name for name in sources if name.startswith(("csrc/", "fused_contrastive/"))} | set(BUILT_FROM)
    assert needed <= held, needed - held
