"""Random tensors of one problem, for the registry's losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """One problem's size, dtype and scale."""

    n: int
    d: int
    dtype: torch.dtype
    scale: float
    duplicates: bool = False
    m: int | None = None  # the rows of a primitive's problem; None: n


class Maker:
    """Random tensors of one problem, on the CPU whatever the default device."""

    def __init__(self, sizes: Sizes, seed: int) -> None:
        self.sizes, self.generator = sizes, torch.Generator("cpu").manual_seed(seed)

    def features(self, *shape: int) -> Tensor:
        t = torch.randn(*shape, self.sizes.d, generator=self.generator, dtype=torch.float64, device="cpu")
        if self.sizes.duplicates:
            t = t[self.ids(shape[0], shape[0] // 3)]
        return F.normalize(t, dim=-1).to(self.sizes.dtype)

    def scalar(self, value: float) -> Tensor:
        dtype = torch.float64 if self.sizes.dtype == torch.float64 else torch.float32
        return torch.tensor(value, dtype=dtype, device="cpu")

    def vector(self, size: int) -> Tensor:
        return torch.rand(size, generator=self.generator, dtype=torch.float64, device="cpu").to(self.scalar(0).dtype)

    def ids(self, size: int, high: int, count: int = 1) -> Tensor:
        """(size,), or (size, count)."""
        shape = (size,) if count == 1 else (size, count)
        return torch.randint(max(1, high), shape, generator=self.generator, device="cpu")

    def set_lengths(self, options: dict[str, Any]) -> None:
        """If the option "lengths" is there, cuts the rows into four groups, of which some may have one row, or none."""
        if "lengths" in options:
            cuts, ends = self.ids(3, self.sizes.n + 1).sort().values, torch.tensor([0, self.sizes.n], device="cpu")
            options["lengths"] = torch.cat((ends[:1], cuts, ends[1:])).diff()

    def targets(self, m: int, n: int, options: dict[str, Any]) -> Tensor:
        """(m,) columns, of each row's own group if there are groups."""
        drawn = self.ids(m, n)
        return drawn % options["lengths"].repeat_interleave(options["lengths"]) if "lengths" in options else drawn

    def margin(self, x: Tensor, y: Tensor, targets: Tensor, relative: bool) -> float:
        """One that leaves out some pairs, and none by a difference that roundings could turn round."""
        similarity, m = x.double() @ y.double().T, len(x)
        positive = similarity.gather(1, targets[:, None])
        below = (positive - similarity).scatter(1, targets[:, None], torch.inf)
        if m <= len(y):  # in the other direction, row i's is the positive of column i
            below = torch.cat((below, (positive.T - similarity[:, :m]).fill_diagonal_(torch.inf).T), dim=1)
        unit = positive.abs() if relative else torch.ones_like(positive)
        candidates = torch.linspace(-0.3, 0.3, 61, dtype=torch.float64, device="cpu")
        gaps = [(below - margin * unit).abs().min() for margin in candidates]
        return float(candidates[int(torch.stack(gaps).argmax())])

    def set_margins(self, x: Tensor, y: Tensor, options: dict[str, Any]) -> None:
        """Makes the guide and the margins of x's negatives in y, if the options are there."""
        targets = options.get("targets", torch.arange(len(x), device="cpu"))
        if options.pop("guide", False):  # of another width than ours
            x, y = (
                F.normalize(
                    torch.rand(len(t), 3, generator=self.generator, dtype=torch.float32, device="cpu") - 0.4, dim=1
                )
                for t in (x, y)
            )
            options["guide"] = (x, y)
        for name in ("absolute_margin", "relative_margin"):
            if options.get(name):
                options[name] = self.margin(x, y, targets, name == "relative_margin")

    def set_debias(self, options: dict[str, Any], *directions: Tensor) -> None:
        """If the option "debias" is set, replaces it by a share of hidden positives for each row, (M,).

        Rounding errors are large where the correction takes away nearly the whole sum over the negatives, or leaves it
        near its lower bound. So 32 shares are drawn for each row, and the one that is farthest from both is taken.

        Args:
            options: those of the loss, among them ``hardness``.
            directions: the logits (M, N) of each direction, -inf where excluded, with the positives on the diagonal.
        """
        if not options.get("debias"):
            return
        shares = 0.4 * (-7 * self.vector(len(directions[0]) * 32).double()).exp().view(-1, 32)
        hardness, gaps = options.get("hardness", 0.0), torch.full_like(shares, torch.inf)
        for s in directions:
            pos, some = s.double().diagonal()[:, None], s.clone().fill_diagonal_(-torch.inf) > -torch.inf
            of_hard, of_easy = (
                (factor * s.double()).where(some, -torch.inf).logsumexp(dim=1, keepdim=True)
                for factor in (1 + hardness, hardness)
            )
            mean = of_hard - of_easy  # log of the mean over negatives, weighted by hardness
            taken = shares.log() + pos - mean
            left = mean + torch.log1p(-taken.exp()) - torch.log1p(-shares)  # NaN where taken > 0
            for gap in (taken, left + self.sizes.scale):
                gaps = torch.minimum(gaps, gap.abs().nan_to_num(torch.inf))
        chosen = shares.gather(1, gaps.argmax(dim=1, keepdim=True)).squeeze(1)
        options["debias"] = chosen.to(self.scalar(0).dtype)

    def set_dims(self, options: dict[str, Any]) -> None:
        """If the option "dims" is there, makes up to three prefixes, of which the longest may leave columns out."""
        if "dims" in options:
            d = self.sizes.d
            options["dims"] = sorted({max(1, d // 4), max(1, d // 2), d - d // 8})
            options["dim_weights"] = [0.5, 1.0, 1.5][: len(options["dims"])]

    def mask(self, *shape: int) -> Tensor:
        """Some False, the first of each row True."""
        mask = torch.rand(*shape, generator=self.generator, dtype=torch.float32, device="cpu") < 0.7
        mask[..., 0] = True
        return mask
