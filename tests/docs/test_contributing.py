"""Follows CONTRIBUTING's "Add a loss" in a copy of the package: the new loss keeps the error budget."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from snippets import BLOCK, ROOT

CHECK = """
import torch
from fused_contrastive.testing.cases import OPTIONS, Case
from fused_contrastive.testing.harness import deviations
from fused_contrastive.testing.maker import Sizes

added = [option for loss, option in OPTIONS if loss == "margin"]
assert len(added) == 2
for option in added:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for backend in ("reference", "cpp"):
            for found in deviations(Case("margin", option, Sizes(20, 16, dtype, 14.3), seed=SEED), backend):
                assert found.share <= 1, (option, dtype, backend, found)
"""


def add(block: str, root: Path) -> None:
    """Adds a block to the file that its first line names: imports at the top, the rest at the end."""
    name, code = re.fullmatch(r"# (\S+\.py)\n(.*)", block, re.DOTALL).groups()
    path = root / name
    if not path.exists():
        path.write_text(code)
        return
    imports = "".join(line for line in code.splitlines(keepends=True) if line.startswith("from "))
    first = "from __future__ import annotations\n"
    text = path.read_text().replace(first, first + imports)
    path.write_text(f"{text}\n\n{code.replace(imports, '')}")


def test_add_a_loss(tmp_path: Path, seed: int) -> None:
    shutil.copytree(ROOT / "fused_contrastive", tmp_path / "fused_contrastive")
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## Add a loss\n")[2].partition("\n## ")[0]
    for block in BLOCK.findall(section):
        add(block, tmp_path)
    code = CHECK.replace("SEED", str(seed))
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
