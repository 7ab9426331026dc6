"""Tests that need a GPU: no synchronisation, CUDA graphs, streams, torch.compile, 64-bit offsets, memory, training.

The other test modules run their cases on the GPU too, if the backend is "triton".
"""

from __future__ import annotations

import every_loss
import pytest
import torch
import torch.nn.functional as F

from fused_contrastive import ClipLoss, clip_loss, contrastive_stats, info_nce_loss, nt_xent_loss, siglip_loss
from fused_contrastive.testing import harness
from fused_contrastive.testing.cases import MEMBERS, Case
from fused_contrastive.testing.maker import Sizes

pytestmark = pytest.mark.gpu

HALF = [torch.bfloat16, torch.float16]


def leaves(n: int, d: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    features = [F.normalize(torch.randn(n, d, device="cuda"), dim=1).to(dtype).requires_grad_() for _ in range(2)]
    return [*features, torch.tensor(14.3, device="cuda", requires_grad=True)]


def step(inputs: list[torch.Tensor], **options: object) -> list[torch.Tensor]:
    loss = clip_loss(*inputs, **options)
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def agree(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(u, v) for u, v in zip(a, b, strict=True))


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize(
    ("loss", "option"), [(loss, option) for loss in ("contrastive_stats", "clip") for option in MEMBERS[loss].options]
)
@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize(("m", "n", "d"), [(1000, 1000, 513), (300, 2101, 100), (2101, 300, 1), (4097, 4097, 64)])
def test_budget(m: int, n: int, d: int, dtype: torch.dtype, loss: str, option: str, tf32: bool, seed: int) -> None:
    """Sizes around a GPU's tiles and alignments: one more than a tile, and D of 1, 64, 100 and 513."""
    if (loss == "clip" and m != n) or (tf32 and dtype != torch.float32):
        pytest.skip("CLIP takes M = N, and tf32 is of float32")
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        for scale in (14.3, 1000.0):
            case = Case(loss, option, Sizes(n, d, dtype, scale, m=m), seed)
            for deviation in harness.deviations(case, "triton", "cuda"):
                assert deviation.share <= 1, f"{case}: {deviation}"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_auto_is_triton_but_float64() -> None:
    inputs = leaves(64, 16)
    assert agree(step(inputs), step(inputs, backend="triton"))
    double = [t.detach().double().requires_grad_() for t in inputs]
    assert agree(step(double), step(double, backend="reference"))


@pytest.mark.parametrize("memory", [0, "auto"])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
def test_does_not_wait_for_the_gpu(dtype: torch.dtype, memory: object) -> None:
    inputs = leaves(1000, 96, dtype)
    ids = torch.arange(1000, device="cuda") // 3
    targets = torch.randperm(1000, device="cuda")

    def run() -> None:
        step(inputs, memory_budget=memory)
        stats = contrastive_stats(*inputs, targets=targets, row_ids=ids, col_ids=ids, memory_budget=memory)
        torch.autograd.grad(stats.row.sum() + stats.col.sum() - stats.pos.sum(), inputs)
        x, y, scale = inputs
        for loss in (
            siglip_loss(x, y, scale, -scale / 2, memory_budget=memory),
            info_nce_loss(x, y, logit_scale=scale, targets=targets, memory_budget=memory),
            nt_xent_loss(x, y, 1 / scale, normalize=True, memory_budget=memory),
        ):
            torch.autograd.grad(loss, inputs)

    run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("loss", every_loss.LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_loss_waits_for_the_gpu(loss: str, dtype: torch.dtype) -> None:
    inputs = [t.to("cuda", dtype if t.dim() else torch.float32) for t in every_loss.problem(64, 32)]
    every_loss.step(loss, inputs)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        every_loss.step(loss, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_scale_on_the_cpu() -> None:
    """It gets its gradient on the CPU; while a graph is captured it raises, and the device stays usable."""
    x, y, scale = leaves(64, 16)
    elsewhere = scale.detach().cpu().requires_grad_()
    for a, b in zip(step([x, y, elsewhere]), step([x, y, scale]), strict=True):
        assert torch.equal(a.cpu(), b.cpu())
    torch.cuda.synchronize()
    with (
        pytest.raises(RuntimeError, match="logit_scale: got a tensor on cpu"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        step([x, y, elsewhere])
    step([x, y, scale])
    torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
def test_cuda_graph(dtype: torch.dtype) -> None:
    inputs = leaves(3000, 128, dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(inputs)
    for _ in range(2):
        fresh = leaves(3000, 128, dtype)
        with torch.no_grad():
            for held, new in zip(inputs, fresh, strict=True):
                held.copy_(new)
        graph.replay()
        assert agree(captured, step(fresh))


def test_streams() -> None:
    """Calls on two streams at once give the results of calls on one."""
    problems = [leaves(3000 + 8 * i, 128) for i in range(4)]
    expected = [step(inputs) for inputs in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    found = []
    for stream, inputs in zip(streams, problems, strict=True):
        with torch.cuda.stream(stream):
            found.append(step(inputs))
    torch.cuda.synchronize()
    assert all(agree(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current() -> None:
    inputs = leaves(500, 64)
    elsewhere = [t.detach().to("cuda:1").requires_grad_() for t in inputs]
    for a, b in zip(step(inputs), step(elsewhere), strict=True):
        assert torch.equal(a.cpu(), b.cpu())


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
def test_same_call_same_bits(dtype: torch.dtype) -> None:
    inputs = leaves(20_000, 256, dtype)
    for memory in (0, "auto"):
        first = step(inputs, memory_budget=memory)
        assert all(agree(first, step(inputs, memory_budget=memory)) for _ in range(3))


def test_compile_fullgraph() -> None:
    torch._dynamo.reset()
    inputs = leaves(700, 64)
    compiled = torch.compile(ClipLoss(), fullgraph=True)
    loss = compiled(*inputs)
    found = [loss.detach(), *torch.autograd.grad(loss, inputs)]
    for a, b in zip(found, step(inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_offsets_past_2_to_the_31() -> None:
    """Rows lie a large stride apart, so that the last begins beyond element 2^31."""
    rows, d = 260, 64
    stride = 2**31 // (rows - 1) // 8 * 8 + 64
    memory = torch.zeros(rows * stride, dtype=torch.bfloat16, device="cuda")
    x = memory.as_strided((rows, d), (stride, 1))
    x.copy_(F.normalize(torch.randn(rows, d, device="cuda"), dim=1))
    y = F.normalize(torch.randn(rows, d, device="cuda"), dim=1).bfloat16()
    assert (rows - 1) * stride > 2**31
    for a, b in zip(contrastive_stats(x, y, 14.3), contrastive_stats(x.contiguous(), y, 14.3), strict=True):
        assert torch.equal(a, b)


def test_extra_memory() -> None:
    """N = 65536, D = 512, bf16, nothing kept: at most 2% of eager's memory, at least five N x N half matrices."""
    n, d = 65_536, 512
    inputs = leaves(n, d)
    step(inputs, memory_budget=0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = step(inputs, memory_budget=0)
    own = sum(t.numel() * t.itemsize for t in results)
    extra = torch.cuda.max_memory_allocated() - before - own
    assert extra <= 0.02 * 5 * 2 * n * n, f"{extra / 2**20:.0f} MiB"


@pytest.mark.skipif(
    torch.version.hip is not None, reason="torch's builds for AMD GPUs leave assertions on the device out"
)
def test_targets_out_of_range_assert_on_the_device() -> None:
    """It runs in a separate process, because a device-side assertion destroys the CUDA context."""
    import subprocess
    import sys

    code = """
import torch
from fused_contrastive import contrastive_stats
x = torch.randn(8, 16, device="cuda")
contrastive_stats(x, x, targets=torch.full((8,), 8, device="cuda"))
torch.cuda.synchronize()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode != 0
    assert "targets: expected values from 0 to 7" in result.stderr + result.stdout


def test_float16_with_a_gradient_scaler() -> None:
    """Autocast and GradScaler: a large scale on the loss neither underflows nor overflows in G."""
    linear = torch.nn.Linear(64, 64, device="cuda")
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**16)
    x, y = torch.randn(4096, 64, device="cuda"), torch.randn(4096, 64, device="cuda")
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = clip_loss(F.normalize(linear(x), dim=1), F.normalize(y, dim=1), 20.0)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        assert linear.weight.grad.isfinite().all()
        assert linear.weight.grad.any()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
