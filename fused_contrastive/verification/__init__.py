"""``python -m fused_contrastive verify``: every available backend against the float64 oracle."""
