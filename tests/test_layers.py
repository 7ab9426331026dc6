"""The architecture: imports only point down, and the reference needs only torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import fused_contrastive

ROOT = Path(fused_contrastive.__file__).parent
LAYERS = [
    "core",
    "backends",
    "distributed",
    "ops",
    "losses",
    "evaluation",
    "testing",
    "verification",
    "adapters",
]  # each may import earlier
CSRC = ["common", "kernels", "ranking", "max_sim", "stats", "autograd", "bindings"]  # each may include earlier
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))


def imports(source: str) -> set[str]:
    """The names that a file imports anywhere in it; ``from a.b import c`` gives ``a.b.c``."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def cycle(sources: dict[str, str]) -> list[str]:
    """Modules that import each other in a cycle, with the first one repeated at the end; empty without a cycle."""
    graph = {}
    for name, source in sources.items():
        targets = {target if target in sources else target.rpartition(".")[0] for target in imports(source)}
        graph[name] = targets & set(sources)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_modules_import_each_other() -> None:
    files = [*ROOT.rglob("*.py"), *ROOT.rglob("*.pyi")]
    names = [".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__") for path in files]
    assert not cycle({name: path.read_text() for name, path in zip(names, files, strict=True)})


@pytest.mark.parametrize(
    "back", ["import p.a", "def f():\n    from p.a import x", "import p as q", "def f():\n    from p import loss"]
)
def test_a_circle_is_seen(back: str) -> None:
    assert cycle({"p": "from p.a import loss", "p.a": "from p import b", "p.b": back})
    assert not cycle({"p": "from p.a import loss", "p.a": "from p import b", "p.b": "import torch"})


@pytest.mark.parametrize("path", [path for path in MODULES if len(path.parts) > 1], ids=str)
def test_imports_point_down(path: Path) -> None:
    layer = path.parts[0]
    for name in imports((ROOT / path).read_text()):
        package, *target = name.split(".")
        if package != "fused_contrastive":
            continue
        if target == ["_C"]:
            assert path == Path("backends/cpp.py"), f"{path} imports the extension"
            continue
        if not target or target[0] not in LAYERS:
            assert LAYERS.index(layer) > LAYERS.index("verification"), f"{path} imports the package, a layer above"
            continue
        assert LAYERS.index(target[0]) <= LAYERS.index(layer), f"{path} imports {'.'.join(target)}, a layer above"
        if layer == "backends" and target[0] == "backends":
            own = path.parts[1].removesuffix(".py")
            assert target[1] in ("contract", "defaults", own), f"{path} imports another backend"


def test_includes_of_csrc_point_down() -> None:
    for path in (ROOT.parent / "csrc").rglob("*.*"):
        for folder in re.findall(r'^#include "(\w+)/', path.read_text(), re.M):
            assert CSRC.index(folder) <= CSRC.index(path.parent.name), path


def test_every_folder_is_a_layer() -> None:
    assert {path.parts[0] for path in MODULES if len(path.parts) > 1} == set(LAYERS)


def run_blocking(blocked: str, code: str) -> subprocess.CompletedProcess[str]:
    block = f"import sys\nfor name in {blocked.split()}: sys.modules[name] = None\n"
    return subprocess.run([sys.executable, "-c", block + code], capture_output=True, text=True, timeout=120)


def test_reference_needs_torch_alone() -> None:
    code = """
import torch, fused_contrastive
x = torch.randn(6, 4, requires_grad=True)
fused_contrastive.clip_loss(x, torch.randn(6, 4), 2.0, backend="reference").backward()
assert x.grad.isfinite().all()
"""
    result = run_blocking("numpy rich triton fused_contrastive._C", code)
    assert result.returncode == 0, result.stderr


def test_importing_the_package_does_not_load_its_test_harness() -> None:
    code = """
import fused_contrastive
assert not [name for name in sys.modules if name.startswith("fused_contrastive.testing")]
"""
    result = run_blocking("", code)
    assert result.returncode == 0, result.stderr


def test_importing_the_package_imports_no_other_library() -> None:
    code = """
import fused_contrastive
libraries = "open_clip transformers sentence_transformers lightly pytorch_metric_learning x_clip torchvision"
assert not set(libraries.split()) & set(sys.modules)
assert "fused_contrastive.adapters" not in sys.modules
"""
    result = run_blocking("", code)
    assert result.returncode == 0, result.stderr


def test_missing_extension() -> None:
    """backend="cpp" raises with the install hint; "auto" uses the reference and warns with the same hint."""
    code = """
import torch, fused_contrastive, warnings
x = torch.randn(6, 4)
try:
    fused_contrastive.clip_loss(x, x, 2.0, backend="cpp")
except RuntimeError as error:
    assert "backend 'cpp' cannot run here" in str(error) and "pip install" in str(error), error
else:
    raise SystemExit("fell back silently")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    losses = {fused_contrastive.clip_loss(x, x, 2.0, backend=name) for name in ("auto", "auto", "reference")}
    assert len(losses) == 3 and len({float(loss) for loss in losses}) == 1, losses
(warning,) = caught
assert "backend 'cpp' cannot run here" in str(warning.message) and "pip install" in str(warning.message), warning
warnings.simplefilter("error")
fused_contrastive.clip_loss(x.double(), x.double(), 2.0)  # once a process
"""
    result = run_blocking("fused_contrastive._C", code)
    assert result.returncode == 0, result.stderr


def test_importing_takes_no_longer_than_torch() -> None:
    """Importing torch's compiler would double the time."""
    code = """
import sys, torch
before = set(sys.modules)
import fused_contrastive
heavy = {name.split(".")[0] for name in set(sys.modules) - before if not name.startswith("fused_contrastive")}
assert not {"sympy", "triton", "numpy", "matplotlib"} & heavy, heavy
assert "torch._dynamo" in before or "torch._dynamo" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_missing_extension_under_compile() -> None:
    """The warning is given while the function is traced, and does not break the graph."""
    code = """
import torch, fused_contrastive, warnings
x = torch.randn(6, 4)
loss = torch.compile(lambda: fused_contrastive.clip_loss(x, x, 2.0), fullgraph=True, backend="eager")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert loss() == loss() == fused_contrastive.clip_loss(x, x, 2.0)
assert ["backend 'cpp' cannot run here" in str(warning.message) for warning in caught] == [True], caught
"""
    result = run_blocking("fused_contrastive._C", code)
    assert result.returncode == 0, result.stderr


def test_extension_that_does_not_load(tmp_path: Path) -> None:
    """For example one built for another torch. The reason given is the loader's message."""
    (tmp_path / "broken.py").write_text("raise ImportError('undefined symbol: at::gone')")
    code = f"""
import importlib.util
class Finder:
    def find_spec(name, path=None, target=None):
        if name == "fused_contrastive._C":
            return importlib.util.spec_from_file_location(name, {str(tmp_path / "broken.py")!r})
sys.meta_path.insert(0, Finder)
from fused_contrastive.backends import cpp
reason = cpp.BACKEND.unavailable()
assert "could not be loaded (undefined symbol: at::gone)" in reason and "--force-reinstall" in reason, reason
"""
    result = run_blocking("", code)
    assert result.returncode == 0, result.stderr
