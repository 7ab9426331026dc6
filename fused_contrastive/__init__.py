"""Exact contrastive losses for PyTorch at any batch size, without the N x N similarity matrix."""

from fused_contrastive.core.budget import Deviation
from fused_contrastive.distributed.batch import GlobalBatch
from fused_contrastive.evaluation.diagnosis import Diagnosis, diagnose
from fused_contrastive.evaluation.monitor import monitor
from fused_contrastive.evaluation.retrieval import median_rank, recall_at_k
from fused_contrastive.evaluation.zero_shot import zero_shot
from fused_contrastive.losses.cached import cached
from fused_contrastive.losses.clip import ClipLoss, clip_loss
from fused_contrastive.losses.distillation import DistillationLoss, distillation_loss
from fused_contrastive.losses.filip import FilipLoss, filip_loss
from fused_contrastive.losses.info_nce import InfoNCELoss, info_nce_loss
from fused_contrastive.losses.nt_xent import NTXentLoss, nt_xent_loss
from fused_contrastive.losses.siglip import SigLipLoss, siglip_loss
from fused_contrastive.losses.supcon import SupConLoss, supcon_loss
from fused_contrastive.losses.x_clip import x_clip_loss
from fused_contrastive.ops import flops
from fused_contrastive.ops.max_sim import MaxSimScores, max_sim
from fused_contrastive.ops.ranking import Ranking, rank, target_ranks
from fused_contrastive.ops.ranks import Metrics
from fused_contrastive.ops.sampling import SampledNegatives, sample_negatives
from fused_contrastive.ops.stats import ContrastiveStats, SigmoidStats, contrastive_stats, self_stats, sigmoid_stats
from fused_contrastive.verification.compare import Verification, verify
from fused_contrastive.verification.watch import verify_against_reference

flops.register()

__version__ = "0.1.0"

__all__ = [
    "ClipLoss",
    "ContrastiveStats",
    "Deviation",
    "Diagnosis",
    "DistillationLoss",
    "FilipLoss",
    "GlobalBatch",
    "InfoNCELoss",
    "MaxSimScores",
    "Metrics",
    "NTXentLoss",
    "Ranking",
    "SampledNegatives",
    "SigLipLoss",
    "SigmoidStats",
    "SupConLoss",
    "Verification",
    "cached",
    "clip_loss",
    "contrastive_stats",
    "diagnose",
    "distillation_loss",
    "filip_loss",
    "info_nce_loss",
    "max_sim",
    "median_rank",
    "monitor",
    "nt_xent_loss",
    "rank",
    "recall_at_k",
    "sample_negatives",
    "self_stats",
    "siglip_loss",
    "sigmoid_stats",
    "supcon_loss",
    "target_ranks",
    "verify",
    "verify_against_reference",
    "x_clip_loss",
    "zero_shot",
]
