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
            assert target[1] in ("contract", own), f"{path} imports another backend"


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


def test_missing_extension_raises_with_the_install_hint() -> None:
    code = """
import torch, fused_contrastive
x = torch.randn(6, 4)
for backend in ("cpp", "auto"):
    try:
        fused_contrastive.clip_loss(x, x, 2.0, backend=backend)
    except RuntimeError as error:
        assert "backend 'cpp' cannot run here" in str(error) and "pip install" in str(error), error
    else:
        raise SystemExit("fell back silently")
"""
    result = run_blocking("fused_contrastive._C", code)
    assert result.returncode == 0, result.stderr
