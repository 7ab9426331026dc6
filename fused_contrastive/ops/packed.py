"""Tokens of all items in one tensor (rows, D), without filler between them."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_contrastive.core import checks, group_checks


def unpacked(side: str, tokens: Tensor, lengths: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Packed tokens (rows, D) -> items (B, the longest length, D) and their mask; without lengths, what came.

    ``side`` is the first letter of the arguments' names: x_tokens, x_lengths, x_mask.
    """
    if lengths is None:
        return tokens, mask
    if mask is not None:
        raise ValueError(f"{side}_mask: got it together with {side}_lengths, expected one of them")
    if not isinstance(tokens, Tensor) or tokens.dim() != 2:
        came = f"shape {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"{side}_tokens: got {came} with {side}_lengths, expected a tensor (rows, D)")
    of = f"the rows of {side}_tokens"
    lengths = group_checks.lengths(f"{side}_lengths", lengths, tokens.shape[0], of, "tokens of each item")
    checks.same_device(f"{side}_lengths", lengths, f"{side}_tokens", tokens)
    longest = max(1, int(lengths.max()))
    real = torch.arange(longest, device=tokens.device) < lengths[:, None]
    items = tokens.new_zeros(*real.shape, tokens.shape[1])
    return items.masked_scatter(real[..., None], tokens), real
