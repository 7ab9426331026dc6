"""The exact loss over processes: value and every gradient those of the whole batch in one process, under the budget."""

from __future__ import annotations

import tempfile

import pytest
import torch
import torch.multiprocessing
from seeds import SEED
from spread import SPLITS, evaluate, put_together, start

from fused_contrastive.testing import family

EXCHANGES = ("gather", "ring")


def all_cases(seed: int) -> list[tuple[family.FamilyCase, str, str]]:
    """Every loss and option, with dtype, split and exchange taking turns so that each pair of them is met."""
    cases = []
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    for k, (loss, option) in enumerate(family.OPTIONS):
        for j, exchange in enumerate(EXCHANGES):
            for i, split in enumerate(SPLITS):
                sizes = family.Sizes(13, 16, dtypes[(k + i + j) % 3], (1.0, 14.3, 100.0)[(k + i) % 3])
                cases.append((family.FamilyCase(loss, option, sizes, seed + k), split, exchange))
    return cases


def work(rank: int, world: int, folder: str, seed: int) -> None:
    start(rank, world, folder)
    results = []
    for case, split, exchange in all_cases(seed):
        try:
            results.append(evaluate(case, split, rank, world, exchange))
        except Exception as error:
            raise RuntimeError(f"rank {rank}: {case} {split} {exchange}") from error
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.mark.parametrize("world", [2, 3, 4])
def test_whole_batch(world: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (world, folder, SEED), nprocs=world)
        of_ranks = [torch.load(f"{folder}/{rank}.pt") for rank in range(world)]
    for (case, split, exchange), *parts in zip(all_cases(SEED), *of_ranks, strict=True):
        results = put_together(case, parts)
        for deviation in family.deviations(case, "cpp", torch.device("cpu"), results):
            assert deviation.share <= 1, f"{world} processes, {split}, {exchange}, {case}: {deviation}"
