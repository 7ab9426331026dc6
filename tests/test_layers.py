"""The architecture: imports only point down, and the reference needs torch alone."""

from __future__ import annotations

import ast
import subprocess
import sys
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
    "bench",
    "adapters",
]  # each may import earlier
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))


def imported(path: Path) -> set[tuple[str, ...]]:
    """Modules of this package that a file imports, as parts without the package's name."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {tuple(name.split(".")[1:]) for name in names if name.startswith("fused_contrastive.")}
    return found


@pytest.mark.parametrize("path", [path for path in MODULES if len(path.parts) > 1], ids=str)
def test_imports_point_down(path: Path) -> None:
    layer = path.parts[0]
    for target in imported(path):
        if target[0] == "_C":
            assert path == Path("backends/cpp.py"), f"{path} imports the extension"
            continue
        assert LAYERS.index(target[0]) <= LAYERS.index(layer), f"{path} imports {'.'.join(target)}, a layer above"
        if layer == "backends" and target[0] == "backends":
            own = path.parts[1].removesuffix(".py")
            assert target[1] in ("contract", "defaults", own), f"{path} imports another backend"


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
    """Named, it raises with the install hint; "auto" is the reference, with a warning that holds the same hint."""
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
    """torch's compiler, imported, would double it."""
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
    """The warning comes while the function is traced, and does not break the graph."""
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
    """Of another torch, say: the reason is the loader's."""
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
