"""The libraries' own losses on the same tensors, called as their documentation says.

A loss of one direction is called once for each direction. If a library has no gradient of the temperature, its
registration says so.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.implementations import (
    INTERPRETER,
    CannotRunError,
    CrossEntropy,
    clip_by,
    info_nce_by,
    register,
)
from benchmarks.workloads import SCALE, TEMPERATURE, BenchProblem, Loss, first_of_own, labels, scores_loss

GPU = ("cuda",)


class _Bare:
    """Finds a library's packages without running their ``__init__``, which may import what a loss does not need."""

    def __init__(self, library: str) -> None:
        spec = importlib.util.find_spec(library)
        if spec is None or not spec.submodule_search_locations:
            raise ImportError(f"No module named {library!r}")
        self.library, self.root = library, Path(next(iter(spec.submodule_search_locations)))

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        library, _, rest = name.partition(".")
        folder = self.root.joinpath(*rest.split(".")) if rest else self.root
        if library != self.library or not folder.is_dir():
            return None
        spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        return spec


def module_alone(name: str) -> ModuleType:
    """A library's module, unchanged, even if the whole library cannot be imported, for example without torchvision."""
    library = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ImportError:
        _forget(library)
    finder = _Bare(library)
    sys.meta_path.insert(0, finder)
    try:
        return importlib.import_module(name)
    finally:
        sys.meta_path.remove(finder)
        _forget(library)  # later imports should not find the packages without their __init__


def _forget(library: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        del sys.modules[name]


@register("open_clip ClipLoss", "clip", matrices=5)
def _(_: BenchProblem) -> Loss:
    return module_alone("open_clip.loss").ClipLoss()


@register("open_clip SigLipLoss", "siglip", matrices=4)
def _(_: BenchProblem) -> Loss:
    loss = module_alone("open_clip.loss").SigLipLoss()
    return lambda x, y, scale: loss(x, y, scale, -scale / 2)


@register("lightly NTXentLoss", "nt_xent", matrices=5)
def _(_: BenchProblem) -> Loss:
    return module_alone("lightly.loss.ntx_ent_loss").NTXentLoss(temperature=TEMPERATURE)


@register("pytorch-metric-learning NTXentLoss", "nt_xent", largest=256, why_largest="takes the cube of N")
def _(_: BenchProblem) -> Loss:
    from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss

    return SelfSupervisedLoss(NTXentLoss(temperature=TEMPERATURE))


@register("pytorch-metric-learning SupConLoss", "supcon", matrices=6)
def _(_: BenchProblem) -> Loss:
    from pytorch_metric_learning.losses import SupConLoss

    loss = SupConLoss(temperature=TEMPERATURE)
    return lambda x: loss(x, labels(x))


@register("info-nce-pytorch", "info_nce", matrices=5)
def _(_: BenchProblem) -> Loss:
    from info_nce import info_nce

    return lambda x, y: info_nce(x, y, temperature=TEMPERATURE)


@register("sentence-transformers MultipleNegativesRankingLoss", "info_nce", matrices=5)
def _(_: BenchProblem) -> Loss:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    loss = MultipleNegativesRankingLoss(torch.nn.Identity(), scale=SCALE)
    return lambda x, y: loss.compute_loss_from_embeddings([x, y], None)


def _cut_cross_entropy(problem: BenchProblem) -> CrossEntropy:
    """On a GPU, its kernels without gradient filtering, which are exact; elsewhere, its torch.compile version."""
    from cut_cross_entropy import linear_cross_entropy

    if problem.device == "cuda":
        return lambda e, c, targets: linear_cross_entropy(e, c, targets, impl="cce", filter_eps=None)
    return lambda e, c, targets: linear_cross_entropy(e, c, targets, impl="torch_compile")


@register("2 x cut_cross_entropy", "clip", matrices=3, compiled=True)
def _(problem: BenchProblem) -> Loss:
    return clip_by(_cut_cross_entropy(problem))


@register("cut_cross_entropy", "info_nce", matrices=3, compiled=True)
def _(problem: BenchProblem) -> Loss:
    return info_nce_by(_cut_cross_entropy(problem))


@register("2 x liger_kernel", "clip", devices=(*GPU, INTERPRETER))
def _(_: BenchProblem) -> Loss:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return clip_by(liger_fused_linear_cross_entropy)


@register("inf_cl", "clip", devices=GPU)
def _(problem: BenchProblem) -> Loss:
    from inf_cl import cal_inf_loss

    parts = [part for part in (32, 64, 128, 256) if problem.d % part == 0]
    if not parts:
        raise CannotRunError(f"its head_dim, 32 to 256, has to divide D = {problem.d}")

    def both(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        options = {"scale": scale, "head_dim": max(parts)}
        return (cal_inf_loss(x, y, **options) + cal_inf_loss(y, x, **options)) / 2

    return both


@register("memeff", "clip", devices=GPU, no_gradient=("scale",))
def _(_: BenchProblem) -> Loss:
    """It takes the temperature as a number, so the benchmark's is passed at construction: no call waits to read it."""
    os.environ.setdefault("MEMEFF_INPUT_PRECISION", "ieee")  # read when it is imported; its default is tf32
    from memeff import MemoryEfficientCLIPLoss

    loss = MemoryEfficientCLIPLoss(temperature=TEMPERATURE, normalized_inputs=True, stable=False)
    return lambda x, y, scale: loss(x, y)


@register("siglip_kernel", "siglip", devices=GPU)
def _(_: BenchProblem) -> Loss:
    from siglip_kernel import fused_siglip_loss

    return lambda x, y, scale: fused_siglip_loss(x, y, scale.log(), -scale / 2)


@register("flash_maxsim", "max_sim", devices=GPU)
def _(_: BenchProblem) -> Loss:
    from flash_maxsim import flash_maxsim_batched_train

    return lambda x, y: scores_loss(flash_maxsim_batched_train(x, y))


@register("late_interaction_kernels", "max_sim", devices=GPU)
def _(_: BenchProblem) -> Loss:
    from late_interaction_kernels import maxsim

    return lambda x, y: scores_loss(maxsim(x, y, backward="unified"))


@register("late_interaction_kernels", "max_sim_own", devices=GPU)
def _(_: BenchProblem) -> Loss:
    from late_interaction_kernels import maxsim

    return lambda x, y: first_of_own(maxsim(x, y))


@register("pylate colbert_kd_scores", "max_sim_own")
def _(_: BenchProblem) -> Loss:
    from pylate.scores import colbert_kd_scores

    return lambda x, y: first_of_own(colbert_kd_scores(x, y))
