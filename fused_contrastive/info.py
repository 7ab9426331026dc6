"""``python -m fused_contrastive info``: what can run here, and why the rest cannot."""

from __future__ import annotations

import os
import platform

import torch
from rich.console import Console
from rich.table import Table

import fused_contrastive
from fused_contrastive.backends import cpp
from fused_contrastive.ops import dispatch


def show(console: Console) -> None:
    table = Table(title=f"fused_contrastive {fused_contrastive.__version__}", show_header=False)
    table.add_row("torch", torch.__version__)
    table.add_row("Python", f"{platform.python_version()} on {platform.platform()}")
    for name, backend in dispatch.BACKENDS.items():
        table.add_row(f"backend {name}", "usable" if (why := backend.unavailable()) is None else f"not usable: {why}")
    on_cpu = "cpp" if cpp.BACKEND.unavailable() is None else "reference, which is slower, after a warning"
    table.add_row('"auto" on the CPU', on_cpu)
    if cpp.BACKEND.unavailable() is None:
        table.add_row("vector level", cpp.vector_level())
        table.add_row("cpp parallel", "yes, on torch's threads" if cpp.is_parallel() else "no, built without OpenMP")
    table.add_row("threads", f"{torch.get_num_threads()} of {os.cpu_count()} CPUs")
    table.add_row("GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none")
    table.add_row("float32 matmul", torch.get_float32_matmul_precision())
    console.print(table)
