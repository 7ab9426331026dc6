"""Exact contrastive losses for PyTorch at any batch size, without the N x N similarity matrix."""

from fused_contrastive.evaluation.diagnosis import Diagnosis, diagnose
from fused_contrastive.evaluation.retrieval import median_rank, recall_at_k
from fused_contrastive.evaluation.zero_shot import zero_shot
from fused_contrastive.losses.clip import ClipLoss, clip_loss
from fused_contrastive.ops.max_sim import MaxSimScores, max_sim
from fused_contrastive.ops.ranking import Ranking, rank, target_ranks
from fused_contrastive.ops.stats import ContrastiveStats, contrastive_stats

__version__ = "0.1.0"

__all__ = [
    "ClipLoss",
    "ContrastiveStats",
    "Diagnosis",
    "MaxSimScores",
    "Ranking",
    "clip_loss",
    "contrastive_stats",
    "diagnose",
    "max_sim",
    "median_rank",
    "rank",
    "recall_at_k",
    "target_ranks",
    "zero_shot",
]
