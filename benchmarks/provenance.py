"""The origin of a report: versions, machine, commit and date."""

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
    """The processor's name, and on Linux its family and model, because different processors may have one name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in fields:
        return platform.processor()
    return f"{fields['model name']} (family {fields.get('cpu family')}, model {fields.get('model')})"


def _commit() -> str:
    """The clone's commit; an installed package has only its version, whatever repository it lies in."""
    root = Path(fused_contrastive.__file__).parents[1]
    if not (root / ".git").exists():
        return "not a clone"
    try:
        git = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown: git does not run"


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
    installed = {distribution.name: distribution.version for distribution in metadata.distributions()}
    return found | {name: installed[name] for name in PEERS if name in installed}


def line(found: dict[str, str]) -> str:
    """The same in one line."""
    return ", ".join(f"{key} {value}" for key, value in found.items())
