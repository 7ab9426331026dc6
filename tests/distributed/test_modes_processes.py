"""Losses over a group, under modes and transforms: modes see the operator, transforms get a clear error everywhere."""

from __future__ import annotations

import tempfile

import processes
import pytest
import torch
import torch.nn.functional as F
from spread import start
from torch.func import grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import fused_contrastive as fc

WORLD = 2
BACKENDS, EXCHANGES = ("reference", "cpp"), ("gather", "ring")


class Seen(TorchDispatchMode):
    """The names of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "fused_contrastive":
            self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


def work(rank: int, folder: str) -> None:
    start(rank, WORLD, folder)
    torch.manual_seed(rank)
    leaves = [F.normalize(torch.randn(5, 8), dim=1).requires_grad_() for _ in range(2)]
    leaves.append(torch.tensor(5.0, requires_grad=True))
    found: dict = {}
    for backend in BACKENDS:
        for exchange in EXCHANGES:
            group = fc.GlobalBatch(exchange=exchange)

            def loss(x, y, s, group=group, backend=backend):  # type: ignore[no-untyped-def]
                return fc.clip_loss(x, y, s, group=group, backend=backend)

            plain = loss(*leaves)
            with Seen() as forward:
                seen = loss(*leaves)
            expected = torch.autograd.grad(plain, leaves)
            with Seen() as backward:
                gradients = torch.autograd.grad(seen, leaves)
            torch.testing.assert_close((seen, *gradients), (plain, *expected))
            messages = []
            for transformed in (grad(loss), lambda x, y, s, loss=loss: vmap(lambda s: loss(x, y, s))(s[None])):
                with pytest.raises(RuntimeError) as error:
                    transformed(*(t.detach() for t in leaves))
                messages.append(str(error.value))
            found[backend, exchange] = (forward.names, backward.names, messages)
    torch.save(found, f"{folder}/{rank}.pt")


def test_over_a_group() -> None:
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(work, (folder,), nprocs=WORLD)
        for rank in range(WORLD):
            found = torch.load(f"{folder}/{rank}.pt", weights_only=False)
            assert set(found) == {(backend, exchange) for backend in BACKENDS for exchange in EXCHANGES}
            for forward, backward, messages in found.values():
                assert (forward, backward) == ({"stats_forward"}, {"stats_backward"})
                for message in messages:
                    assert "group: got a call inside a transform of torch.func" in message, message
