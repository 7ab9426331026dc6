"""The batch size is not a compile-time constant: a hundred different N compile each kernel a handful of times.

No GPU is needed: the driver knows only its architecture, and kernels are compiled but not launched.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

CODE = """
import json, random
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

class Driver:
    def get_current_device(self): return 0
    def get_current_stream(self, device=None): return 0
    def get_current_target(self): return GPUTarget("cuda", 80, 32)

driver.set_active(Driver())
run = jit.JITFunction.run
jit.JITFunction.run = lambda self, *a, grid, warmup, **k: run(self, *a, grid=grid, warmup=True, **k)

from fused_contrastive.backends.triton import backward, device, forward, launch, loss_node, totals
from fused_contrastive.core.spec import Needs, StatsSpec, Upstream

device.stand_in = lambda _: device.Device("cpu", "sm_80", "sm_80", False, 108)
sizes = [1, 2, 15, 16, 17, *random.Random(0).sample(range(18, 700), 95)]
for i, n in enumerate(sizes):
    x, y = (torch.zeros(n, 64, dtype=torch.bfloat16) for _ in range(2))
    spec = StatsSpec(torch.tensor(1.0), kept_rows=n if i % 2 else 0)
    saved = launch.forward(spec, x, y)
    g = torch.zeros(n, dtype=torch.float64)
    launch.backward(spec, x, y, saved, Upstream(g, g, g), Needs(True, True, True, False))
    leaf = g.requires_grad_()
    loss_node.cross_entropy(leaf, [g, g], False, "mean", torch.float32).backward()
kernels = [forward.strip_statistics, forward.exact_statistics, totals.merge, backward.prepare, backward.gradient,
           backward.gradient_of_kept, backward.exact_gradient, backward.finish, loss_node._forward, loss_node._backward]
print(json.dumps({kernel.__name__: len(kernel.device_caches[0][0]) for kernel in kernels}))
"""


def test_few_compilations_for_a_hundred_sizes() -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, timeout=600, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr
    counts = json.loads(result.stdout.splitlines()[-1])
    assert len(counts) == 10
    for count in counts.values():
        assert 1 <= count <= 4, counts  # with and without kept tiles; N a multiple of 16, or 1, or neither
