"""What every table has to say of itself: versions, machine, commit, date."""

from __future__ import annotations

import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path

import torch

import fused_contrastive
from fused_contrastive.backends import cpp

PEERS = (
    "triton", "open_clip_torch", "lightly", "pytorch-metric-learning", "info-nce-pytorch", "sentence-transformers",
    "cut-cross-entropy", "liger-kernel", "inf-cl", "memeff", "siglip-kernel", "flash-maxsim",
    "late-interaction-kernels",
)  # fmt: skip


def _processor() -> str:
    """Its name, and on Linux the family and model, which tell apart what has one name."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    if "model name" not in fields:
        return platform.processor()
    numbers = [
        f"{short} {fields[key]}" for short, key in (("family", "cpu family"), ("model", "model")) if key in fields
    ]
    return " ".join([fields["model name"], *([f"({', '.join(numbers)})"] if numbers else [])])


def _commit() -> str:
    """Of a clone; an installed package has only its version, whatever repository it lies in."""
    root = Path(fused_contrastive.__file__).parent.parent

    def git(*arguments: str) -> str:
        try:
            result = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
        except OSError:
            return ""
        return result.stdout.strip()

    top = git("rev-parse", "--show-toplevel")
    return git("describe", "--always", "--dirty") if top and Path(top).resolve() == root.resolve() else "not a clone"


def provenance() -> dict[str, str]:
    here = cpp.BACKEND.unavailable() is None
    level = f", vector level {cpp.vector_level()}" if here else ", without the C++ backend: ours is the reference"
    machine = f"{torch.get_num_threads()} threads of {_processor()}{level}"
    if torch.cuda.is_available():
        machine = f"{torch.cuda.get_device_name()}, {machine}"
    found = {
        "fused_contrastive": f"{fused_contrastive.__version__} ({_commit()})",
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "machine": machine,
        "date": time.strftime("%Y-%m-%d"),
    }
    for name in PEERS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def line(found: dict[str, str]) -> str:
    """The same in one line."""
    return ", ".join(f"{key} {value}" for key, value in found.items())
