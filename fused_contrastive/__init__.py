"""Exact contrastive losses for PyTorch at any batch size, without the N x N similarity matrix."""

from fused_contrastive.losses.clip import ClipLoss, clip_loss
from fused_contrastive.ops.max_sim import MaxSimScores, max_sim
from fused_contrastive.ops.stats import ContrastiveStats, contrastive_stats

__version__ = "0.1.0"

__all__ = ["ClipLoss", "ContrastiveStats", "MaxSimScores", "clip_loss", "contrastive_stats", "max_sim"]
