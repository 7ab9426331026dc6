"""How many rows' products a memory budget keeps."""

from __future__ import annotations

import pytest
import torch

from fused_contrastive.backends import cpp
from fused_contrastive.core import memory


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_host_memory", lambda: 16 << 30)


def kept(m: int, n: int, budget: int | str = "auto", dtype: torch.dtype = torch.float32) -> int:
    x = torch.empty(1, dtype=dtype).expand(m, 8)
    return memory.products_to_keep(x, n, cpp.BACKEND.kept, budget)


def test_bytes() -> None:
    assert kept(1000, 100, 0) == 0
    assert kept(1000, 100, 4 * 100 * 10) == 10
    assert kept(1000, 100, 1 << 40) == 1000
    assert kept(1000, 100, 8 * 100 * 10, torch.float64) == 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_auto_is_64_mb_of_products(dtype: torch.dtype) -> None:
    assert kept(4096, 4096, dtype=dtype) == 4096
    assert kept(8192, 8192, dtype=dtype) == 2048
    assert kept(1 << 20, 1 << 20, dtype=dtype) == 16
    assert kept(0, 4096, dtype=dtype) == 0


def test_auto_counts_normalised_copies() -> None:
    x = torch.empty(1).expand(8192, 8)
    assert memory.products_to_keep(x, 8192, cpp.BACKEND.kept, "auto", copied=48 << 20) == 512
    assert memory.products_to_keep(x, 8192, cpp.BACKEND.kept, "auto", copied=65 << 20) == 0
    assert memory.products_to_keep(x, 8192, cpp.BACKEND.kept, 64 << 20, copied=48 << 20) == 2048


def test_auto_of_argmaxima_is_a_sixteenth_of_the_machine() -> None:
    rows = memory.rows_to_keep(1 << 20, ((64, 4 << 20), torch.uint8), "auto", torch.device("cpu"))
    assert rows == (1 << 30) // (4 << 20)
