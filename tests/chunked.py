"""Encoders and an oracle for the tests of cached(): the same chunks kept in one graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_contrastive import cached, clip_loss

D = 6


class Encoder(nn.Module):
    """Unit features, with dropout; of a sum of its arguments, if there are several."""

    def __init__(self, width: int = 5, dropout: float = 0.4) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, D))

    def forward(self, *given: Tensor, **named: Tensor) -> Tensor:
        return F.normalize(self.layers(sum((*given, *named.values()))), dim=-1)


class Towers(nn.Module):
    def __init__(self, *encoders: nn.Module) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.log_scale = nn.Parameter(torch.tensor(1.0))
        self.double()

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return clip_loss(x, y, self.log_scale.exp())


def split(value: Any, size: int) -> list[tuple[Sequence[Tensor], dict[str, Tensor]]]:
    """The arguments of an encoder for each chunk of its input."""
    if isinstance(value, dict):
        return [((), {k: t[at : at + size] for k, t in value.items()}) for at in range(0, len(first(value)), size)]
    several = (value,) if isinstance(value, Tensor) else value
    return [(tuple(t[at : at + size] for t in several), {}) for at in range(0, len(first(value)), size)]


def first(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else next(iter(value.values() if isinstance(value, dict) else value))


def in_one_graph(encoders: Any, inputs: Sequence[Any], loss: Callable[..., Any], chunk_size: int) -> Any:
    """The oracle: it encodes the same chunks in the same order, and keeps the graphs of all of them."""
    each = encoders if isinstance(encoders, (list, tuple, nn.ModuleList)) else [encoders] * len(inputs)
    features = []
    for encoder, value in zip(each, inputs, strict=True):
        parts = [encoder(*args, **named) for args, named in split(value, chunk_size)]
        several = isinstance(parts[0], tuple)
        features.append(tuple(map(torch.cat, zip(*parts, strict=True))) if several else torch.cat(parts))
    return loss(*features)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert value.norm() > 0, name
        assert (found[name] - value).norm() <= tolerance * value.norm(), name


def both(model: nn.Module, run: Callable[[Callable[..., Any]], Tensor], tolerance: float = 1e-10) -> None:
    """Asserts that ``run``, from one random state, has the same value and gradients with ``cached`` and the oracle."""
    state = torch.get_rng_state()
    results = []
    for function in (cached, in_one_graph):
        torch.set_rng_state(state)
        loss = run(function)
        after = torch.get_rng_state()
        loss.backward()
        assert torch.equal(torch.get_rng_state(), after)
        results.append((loss.detach(), gradients(model)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=tolerance, atol=0)
    assert_same(results[0][1], results[1][1], tolerance)


def rows(n: int, width: int = 5) -> Tensor:
    return torch.randn(n, width, dtype=torch.float64)


rows_9 = rows(9)
