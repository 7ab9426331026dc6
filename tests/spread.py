"""Cuts the problem of one process into problems of several, and puts their results together again."""

from __future__ import annotations

from datetime import timedelta
from multiprocessing.util import Finalize
from typing import Any

import torch
import torch.distributed as dist
from processes import HANGS
from torch import Tensor

from fused_contrastive import GlobalBatch
from fused_contrastive.testing import harness
from fused_contrastive.testing.cases import Case

# The share of the samples of each process; the last one also gets the remainder. A process may have none.
SPLITS = {"even": (1, 1, 1, 1), "ragged": (1, 3, 2, 1), "one empty": (2, 0, 1, 3)}


def sizes_of(n: int, split: str, world: int) -> list[int]:
    parts = SPLITS[split][:world]
    sizes = [n * part // sum(parts) for part in parts]
    sizes[-1] += n - sum(sizes)
    return sizes


def part_of(t: Tensor, sizes: list[int], rank: int) -> Tensor:
    return t.split(sizes)[rank]


def cut(case: Case, split: str, rank: int, world: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """This process's leaves and options of a case."""
    leaves, options = case.inputs()
    rows = next(iter(leaves.values()))
    row_sizes = sizes_of(len(rows), split, world)
    keys = leaves.get("key", leaves.get("text_features", leaves.get("y", rows)))
    key_sizes = row_sizes if len(keys) == len(rows) else sizes_of(len(keys), "even", world)
    extra = leaves.get("negatives")
    shared = extra is not None and extra.dim() == 2
    extra_sizes = sizes_of(len(extra), "ragged", world) if shared else []

    def columns(t: Tensor) -> Tensor:
        """This process's part of a tensor over columns: its keys' entries, then its shared negatives' entries."""
        own = part_of(t[: len(keys)], key_sizes, rank)
        return torch.cat((own, part_of(t[len(keys) :], extra_sizes, rank))) if shared else own

    def of(name: str, t: Any) -> Any:
        if name == "guide":
            return part_of(t[0], row_sizes, rank), part_of(t[1], key_sizes, rank)
        if not isinstance(t, Tensor) or t.dim() == 0:
            return t
        if name in ("col_bias", "col_ids"):
            return columns(t)
        if name == "negatives" and shared:
            return part_of(t, extra_sizes, rank)
        if name.startswith(("text_latents", "image_latents", "text_mask")) and case.loss == "x_clip":
            return t.split(sizes_of(t.shape[1], split, world), dim=1)[rank]
        return part_of(t, key_sizes if name in ("key", "text_features", "y", "teacher_y") else row_sizes, rank)

    if case.loss == "x_clip":
        row_sizes = sizes_of(leaves["text_latents"].shape[1], split, world)
    return {k: of(k, t) for k, t in leaves.items()}, {k: of(k, t) for k, t in options.items()}


def evaluate(case: Case, split: str, rank: int, world: int, exchange: str) -> dict[str, Tensor]:
    """This process's loss and gradients: those of its features, and its share of the others (scale, bias)."""
    leaves, options = cut(case, split, rank, world)
    held = {name: t.clone().requires_grad_() for name, t in leaves.items()}
    group = GlobalBatch(exchange=exchange, gradients="sum")
    loss = case.member.ours(**held, **options, group=group)
    weights = 0.5 if loss.dim() == 0 else weights_of(case, split, rank, world)
    gradients = torch.autograd.grad((loss.double() * weights).sum(), list(held.values()), allow_unused=True)
    results = {"loss": loss.detach()}
    for (name, leaf), gradient in zip(held.items(), gradients, strict=True):
        results[f"d{name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return results


def weights_of(case: Case, split: str, rank: int, world: int) -> Tensor:
    """This process's part of the weights that ``harness.evaluate`` gives to the losses of the whole problem."""
    leaves, _ = case.inputs()
    n = len(next(iter(leaves.values())))
    views = len(leaves) - 1 if case.loss == "nt_xent" else 1
    whole = harness.weights(0, n * views, "cpu").view(views, n)
    return whole.split(sizes_of(n, split, world), dim=1)[rank].reshape(-1)


def put_together(case: Case, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The whole problem's loss and gradients, in float64."""
    whole: dict[str, Tensor] = {}
    for name in parts[0]:
        each = [part[name].double() for part in parts]
        if name == "loss" and each[0].dim() == 0:
            assert all(torch.equal(value, each[0]) or value.isnan() for value in each), "processes report other losses"
            whole[name] = each[0]
        elif each[0].dim() == 0:
            whole[name] = torch.stack(each).sum()
        elif case.loss == "x_clip":
            whole[name] = torch.cat(each, dim=1)
        elif name == "loss" and case.loss == "nt_xent":
            views = len(parts[0]) - 2
            whole[name] = torch.cat([t.view(views, -1) for t in each], dim=1).reshape(-1)
        elif name == "dcol_bias":
            whole[name] = _columns(case, each, parts)
        else:
            whole[name] = torch.cat(each)
    return whole


def _columns(case: Case, each: list[Tensor], parts: list[dict[str, Tensor]]) -> Tensor:
    """The entries of all processes' keys, then those of their shared negatives."""
    keys = [len(part["dkey"]) for part in parts]
    return torch.cat(
        [t[:k] for t, k in zip(each, keys, strict=True)] + [t[k:] for t, k in zip(each, keys, strict=True)]
    )


def start(rank: int, world: int, folder: str) -> None:
    """Joins the process group, and leaves it at exit, where threads of gloo that still run could abort the process."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=HANGS)
    )
    Finalize(None, dist.destroy_process_group, exitpriority=0)
