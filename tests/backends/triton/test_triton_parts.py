"""Parts of the Triton backend that need at most one kernel."""

from __future__ import annotations

import ast

import pytest
import torch
from snippets import ROOT

from fused_contrastive.core.memory import rows_to_keep

pytest.importorskip("triton")

from fused_contrastive.backends.triton import problem, storage
from fused_contrastive.ops import dispatch


def test_rounding_to_tf32() -> None:
    """10 bits after the point, ties to even; inf, NaN and signs stay."""
    step = 2.0**-10
    cases = {
        1.0: 1.0, 1 + step: 1 + step, 1 + 0.49 * step: 1.0, 1 + 0.51 * step: 1 + step,
        1 + 0.5 * step: 1.0, 1 + 1.5 * step: 1 + 2 * step,  # ties
        -(1 + 0.51 * step): -(1 + step), 0.0: 0.0, torch.inf: torch.inf, -torch.inf: -torch.inf,
    }  # fmt: skip
    assert problem.rounded_to_tf32(torch.tensor(list(cases))).tolist() == list(cases.values())
    assert problem.rounded_to_tf32(torch.tensor([torch.nan])).isnan().all()
    x = torch.randn(1000)
    assert ((problem.rounded_to_tf32(x) - x).abs() <= x.abs() * step / 2).all()


def test_rows_too_long_to_keep_cost_nothing() -> None:
    def layout(rows: int) -> tuple[tuple[int, ...], torch.dtype]:
        return storage.layout(rows, storage.LONGEST_ROW, torch.bfloat16)

    assert rows_to_keep(1000, layout(64), 10**12, torch.device("cpu")) == 0
    kept = storage.KeptRows(torch.empty(layout(1000)[0], dtype=torch.bfloat16), 0, storage.LONGEST_ROW, exact=False)
    assert kept.block(slice(0, 256), slice(0, 256)) == (None, None, None)


def test_kept_blocks_lie_apart() -> None:
    """Values and references of all blocks have memory of their own, also if the buffer is made for more rows."""
    n, rows = 300, 512
    shape, dtype = storage.layout(rows + 70, n, torch.bfloat16)
    kept = storage.KeptRows(torch.zeros(shape, dtype=dtype), rows, n, exact=False)
    blocks = [(slice(i, i + 256), slice(j, min(j + 256, n))) for i in (0, 256) for j in (0, 256)]
    for number, place in enumerate(blocks, 1):
        block = kept.block(*place)
        assert block.exponentials is not None
        assert block.references is not None
        assert block.exponentials.values.shape == (256, place[1].stop - place[1].start)
        assert block.exponentials.whole.shape[1] % storage.WIDEST == 0
        block.exponentials.values.fill_(number)
        block.references[: 256 // storage.CELL, : 256 // storage.CELL].fill_(number)
    for number, place in enumerate(blocks, 1):
        block = kept.block(*place)
        assert (block.exponentials.values == number).all()
        assert (block.references[: 256 // storage.CELL, : 256 // storage.CELL] == number).all()
    assert kept.block(slice(512, 768), slice(0, 256)) == (None, None, None)


@pytest.mark.parametrize("m", [3, 7, 1000])
def test_the_mean_is_taken_in_float64(m: int) -> None:
    """Rounding 1 / M to float32 would be a relative error of 3e-8."""
    name = "triton"
    if (reason := dispatch.BACKENDS[name].unavailable()) is not None:
        pytest.skip(reason)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pos, row = (torch.randn(m, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
    found = []
    for backend in (name, "reference"):
        loss = dispatch.BACKENDS[backend].cross_entropy(pos, [row, 2 * row], False, "mean", torch.float64)
        found.append([loss.detach(), *torch.autograd.grad(loss, (pos, row))])
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-13, atol=1e-15)


def test_no_kernel_calls_itself() -> None:
    """Triton 3.4 never finishes compiling a kernel that calls itself."""
    folder = ROOT / "fused_contrastive/backends/triton"
    functions = 0
    for file in folder.glob("*.py"):
        for function in ast.walk(ast.parse(file.read_text())):
            if isinstance(function, ast.FunctionDef) and "triton.jit" in map(ast.unparse, function.decorator_list):
                called = [ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)]
                assert function.name not in called, f"{file.name}: {function.name}"
                functions += 1
    assert functions > 20
