"""``python -m fused_contrastive info``: what can run here, and why the rest cannot."""

from __future__ import annotations

import os
import platform

import torch

import fused_contrastive
from fused_contrastive.backends import cpp
from fused_contrastive.core.terminal import Terminal
from fused_contrastive.ops import dispatch


def show(terminal: Terminal) -> None:
    rows = [
        ("torch", torch.__version__),
        ("Python", f"{platform.python_version()} on {platform.platform()}"),
    ]
    for name, backend in dispatch.BACKENDS.items():
        rows.append((f"backend {name}", "usable" if (why := backend.unavailable()) is None else f"not usable: {why}"))
    on_cpu = "cpp" if cpp.BACKEND.unavailable() is None else "reference, which is slower, after a warning"
    rows.append(('"auto" on the CPU', on_cpu))
    if cpp.BACKEND.unavailable() is None:
        rows.append(("vector level", cpp.vector_level()))
        rows.append(("cpp parallel", "yes, on torch's threads" if cpp.is_parallel() else "no, built without OpenMP"))
    rows.append(("threads", f"{torch.get_num_threads()} of {os.cpu_count()} CPUs"))
    rows.append(("GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none"))
    rows.append(("float32 matmul", torch.get_float32_matmul_precision()))
    terminal.table(f"fused_contrastive {fused_contrastive.__version__}", (), rows)
