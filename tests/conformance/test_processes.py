"""Two processes: each library's own multi-process code and ours, flag by flag, on the same features of each rank."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # a spawned process finds its helpers
from against import features

for package in ("open_clip", "lightly", "sentence_transformers"):
    pytest.importorskip(package, reason=f"{package} is not installed: make conformance")

WORLD, N, D = 2, 6, 8
Loss = Callable[..., Tensor]


def cases(rank: int) -> dict[str, tuple[Loss, Loss]]:
    """Pairs of their loss and ours, each called with two (N, D) tensors and a scale."""
    import lightly.loss
    from open_clip import loss as open_clip
    from sentence_transformers import losses as st
    from test_sentence_transformers_gist import Model as Guided

    from fused_contrastive.adapters import lightly as our_lightly
    from fused_contrastive.adapters import open_clip as our_open_clip
    from fused_contrastive.adapters import sentence_transformers as our_st

    found: dict[str, tuple[Loss, Loss]] = {}
    for local in (False, True):
        for grad in (False, True):
            options = dict(local_loss=local, gather_with_grad=grad, rank=rank, world_size=WORLD)
            found[f"ClipLoss local_loss={local} gather_with_grad={grad}"] = (
                open_clip.ClipLoss(**options), our_open_clip.ClipLoss(**options)
            )  # fmt: skip
            for which in (0, 1):
                theirs, ours = open_clip.DistillClipLoss(**options), our_open_clip.DistillClipLoss(**options)
                found[f"DistillClipLoss[{which}] local_loss={local} gather_with_grad={grad}"] = (
                    lambda x, y, s, f=theirs, i=which: f(x, y, s, y.detach(), x.detach(), 9.0)[i],
                    lambda x, y, s, f=ours, i=which: f(x, y, s, y.detach(), x.detach(), 9.0)[i],
                )
    for implementation in ("bidir", "shift", "reduce", "gather"):
        options = dict(rank=rank, world_size=WORLD, dist_impl=implementation)
        theirs, ours = open_clip.SigLipLoss(**options), our_open_clip.SigLipLoss(**options)
        found[f"SigLipLoss {implementation}"] = (
            lambda x, y, s, f=theirs: f(x, y, s, -5.0),
            lambda x, y, s, f=ours: f(x, y, s, -5.0),
        )
    for name in ("NTXentLoss", "DCLLoss", "DCLWLoss"):
        theirs = getattr(lightly.loss, name)(0.2, gather_distributed=True)
        ours = getattr(our_lightly, name)(0.2, gather_distributed=True)
        found[name] = (lambda x, y, s, f=theirs: f(x, y) + 0 * s, lambda x, y, s, f=ours: f(x, y) + 0 * s)
    everything = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
    for options in (
        {},
        {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
        {"directions": everything},
        {"directions": everything, "hardness_mode": "all_negatives", "hardness_strength": 3.0},
    ):
        options = {**options, "gather_across_devices": True}
        model = torch.nn.Identity()
        theirs, ours = (
            module.MultipleNegativesRankingLoss(model, **options) for module in (st, our_st)
        )  # fmt: skip
        found[f"MultipleNegativesRankingLoss {options}"] = tuple(
            lambda x, y, s, f=f: f.compute_loss_from_embeddings([x, y, x.flip(0) + y], None) + 0 * s
            for f in (theirs, ours)
        )
        if len(options) == 1:
            found["MultipleNegativesRankingLoss, fewer hard negatives than queries"] = tuple(
                lambda x, y, s, f=f: f.compute_loss_from_embeddings([x, y, (x + y)[:4]], None) + 0 * s
                for f in (theirs, ours)
            )
    for options in ({}, {"contrast_anchors": False, "margin_strategy": "relative", "margin": -0.1}):
        of_both = {"temperature": 0.1, "gather_across_devices": True, "mini_batch_size": 16, **options}
        theirs, ours = (module.CachedGISTEmbedLoss(Guided(D), Guided(D), **of_both) for module in (st, our_st))
        found[f"CachedGISTEmbedLoss {options}"] = tuple(
            lambda x, y, s, f=f: f.calculate_loss([[x], [y]], [[y.detach()], [x.detach()]]) + 0 * s
            for f in (theirs, ours)
        )
    return found


def work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    torch.manual_seed(rank)
    x, y = features(N, D), features(N, D)
    results = {}
    for name, losses in cases(rank).items():
        pair = []
        for loss in losses:
            leaves = [x.clone().requires_grad_(), y.clone().requires_grad_(), torch.tensor(12.0, requires_grad=True)]
            value = loss(*leaves)
            value.backward()
            pair.append([value.detach(), *(t.grad for t in leaves)])
        results[name] = pair
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_every_flag() -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (folder,), nprocs=WORLD)
        of_ranks = [torch.load(f"{folder}/{rank}.pt") for rank in range(WORLD)]
    assert len(of_ranks[0]) == 26
    for name in of_ranks[0]:  # the scale's gradient after DDP's mean over the processes
        theirs, ours = (torch.stack([results[name][k][3] for results in of_ranks]).mean() for k in (0, 1))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}, dscale: {m}")
    for rank, results in enumerate(of_ranks):
        for name, (theirs, ours) in results.items():
            for what, a, b in zip(("loss", "dx", "dy"), theirs[:3], ours[:3], strict=True):
                torch.testing.assert_close(
                    b, a, rtol=1e-4, atol=1e-5, msg=lambda m, n=name, w=what, r=rank: f"rank {r}, {n}, {w}: {m}"
                )
