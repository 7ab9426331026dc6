"""Counts what a process sends through torch.distributed's collectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.nn.functional as F
from torch import Tensor

from fused_contrastive.distributed import collectives


class SentBytes:
    """Within the ``with`` block, ``total`` is what this process sends, in the collectives' usual (ring) algorithms."""

    def __enter__(self) -> SentBytes:
        self.total = 0.0
        self._originals: list[tuple[Any, str, Any]] = []
        world = dist.get_world_size()
        share = (world - 1) / world
        self._count(dist, "all_gather", lambda _, t, **__: t.nbytes * (world - 1))
        self._count(collectives, "all_gather_single", lambda _, t, **__: t.nbytes * (world - 1))
        self._count(dist, "all_reduce", lambda t, *_, **__: 2 * t.nbytes * share)
        self._count(dist, "all_to_all_single", lambda _, t, *__, **___: t.nbytes * share)
        self._count(dist, "scatter", lambda _, ts=None, *__, **___: sum(t.nbytes for t in ts or ()) * share)
        self._count(dist, "batch_isend_irecv", self._sends)
        return self

    @staticmethod
    def _sends(operations: list[dist.P2POp]) -> float:
        return sum(operation.tensor.nbytes for operation in operations if operation.op is dist.isend)

    def _count(self, owner: Any, name: str, bytes_of: Callable[..., float]) -> None:
        original = getattr(owner, name)
        self._originals.append((owner, name, original))

        def call(*args: Any, **options: Any) -> Any:
            self.total += bytes_of(*args, **options)
            return original(*args, **options)

        setattr(owner, name, call)

    def __exit__(self, *_: object) -> None:
        for owner, name, original in self._originals:
            setattr(owner, name, original)


def as_open_clip(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """open_clip's ClipLoss(local_loss=True, gather_with_grad=True), written out."""
    everyone_x = torch.cat(torch.distributed.nn.all_gather(x))
    everyone_y = torch.cat(torch.distributed.nn.all_gather(y))
    labels = torch.arange(len(x)) + dist.get_rank() * len(x)
    return (F.cross_entropy(scale * x @ everyone_y.T, labels) + F.cross_entropy(scale * y @ everyone_x.T, labels)) / 2
