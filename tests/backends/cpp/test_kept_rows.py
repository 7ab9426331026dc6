"""How many rows' products a memory budget keeps."""

from __future__ import annotations

import pytest
import torch

from fused_contrastive.core import memory
from fused_contrastive.core.memory import EVERYTHING, TRIANGLE, products_of, rows_to_keep

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_host_memory", lambda: 16 << 30)


def kept(m: int, n: int, budget: int | str = "auto", most: memory.Most = EVERYTHING) -> int:
    return rows_to_keep(m, lambda rows: ((rows, n), torch.float32), budget, CPU, most)


def test_bytes() -> None:
    assert kept(1000, 100, 0) == 0
    assert kept(1000, 100, 4 * 100 * 10) == 10
    assert kept(1000, 100, 1 << 40) == 1000


def test_auto_is_a_sixteenth_of_the_machine() -> None:
    assert kept(1 << 20, 1 << 20) == (1 << 30) // (4 << 20)


def test_auto_of_float32_is_a_fifth_or_12_mb() -> None:
    most = products_of(torch.float32)
    assert kept(1024, 1024, most=most) == 1024
    assert kept(2048, 2048, most=most) == (12 << 20) // (4 * 2048)
    assert kept(8192, 8192, most=most) == 8192 // 5
    assert kept(8192, 8192, most=TRIANGLE) == 8192 // 64


def test_auto_of_bfloat16_is_next_to_nothing_where_that_is_much() -> None:
    most = products_of(torch.bfloat16)
    assert kept(1024, 1024, most=most) == 1024
    assert kept(2048, 2048, most=most) == 128
    assert kept(2560, 2560, most=most) == 64
    assert kept(4096, 4096, most=most) == 0
    assert kept(1 << 20, 1 << 20, most=most) == 0
    assert kept(0, 4096, most=most) == 0
