"""Inputs that are accepted because they have one meaning: any integer dtype, scales of one element, masks of 0 and 1,
and a temperature in place of a scale."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fused_contrastive as fc

N, D = 12, 8
ITEMS = 4  # with tokens
Loss = Callable[..., Tensor]


def features(*shape: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, D), dim=-1).requires_grad_()


# For each loss or primitive: a scalar result as a function of its integer targets, labels or ids.
INTEGERS: dict[str, Callable[[Tensor, dict[str, Any]], Tensor]] = {
    "stats targets": lambda i, o: fc.contrastive_stats(features(N), features(N), 9.0, targets=i, **o).row.sum(),
    "stats ids": lambda i, o: fc.contrastive_stats(features(N), features(N), 9.0, row_ids=i, col_ids=i, **o).row.sum(),
    "sigmoid ids": lambda i, o: fc.sigmoid_stats(features(N), features(N), 9.0, row_ids=i, col_ids=i, **o).row.sum(),
    "self ids": lambda i, o: fc.self_stats(features(N), 9.0, ids=i, **o).sum(),
    "info_nce targets": lambda i, o: fc.info_nce_loss(features(N), features(N), targets=i, **o),
    "info_nce negatives": lambda i, o: fc.info_nce_loss(
        features(N), features(N), targets=i, negatives=features(3), **o
    ),
    "info_nce ids": lambda i, o: fc.info_nce_loss(features(N), features(N), row_ids=i, col_ids=i, **o),
    "supcon": lambda i, o: fc.supcon_loss(features(N), i % 4, **o),
    "siglip ids": lambda i, o: fc.siglip_loss(features(N), features(N), 9.0, -9.0, row_ids=i, col_ids=i, **o),
}


@pytest.mark.thinned("name", "dtype")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize("name", INTEGERS)
def test_any_integer_dtype(name: str, dtype: torch.dtype, backend: str, seed: int) -> None:
    found = []
    for kind in (torch.int64, dtype):
        torch.manual_seed(seed)
        found.append(INTEGERS[name](torch.randint(N, (N,)).to(kind), {"backend": backend}))
    assert torch.equal(*found)


BY_SCALE: dict[str, Loss] = {
    "clip": lambda s, **o: fc.clip_loss(features(N), features(N), **s, **o),
    "ClipLoss": lambda s, **o: fc.ClipLoss(**o)(features(N), features(N), **s),
    "info_nce": lambda s, **o: fc.info_nce_loss(features(N), features(N), **s, **o),
    "nt_xent": lambda s, **o: fc.nt_xent_loss(features(N), features(N), normalize=True, **s, **o),
    "supcon": lambda s, **o: fc.supcon_loss(features(N), torch.arange(N) % 3, **s, **o),
    "siglip": lambda s, **o: fc.siglip_loss(features(N), features(N), logit_bias=-5.0, **s, **o),
    "SigLipLoss": lambda s, **o: fc.SigLipLoss(**o)(features(N), features(N), logit_bias=-5.0, **s),
    "filip": lambda s, **o: fc.filip_loss(features(ITEMS, 3), features(ITEMS, 4), **s, **o),
    "FilipLoss": lambda s, **o: fc.FilipLoss(**o)(features(ITEMS, 3), features(ITEMS, 4), **s),
    "x_clip": lambda s, **o: fc.x_clip_loss(features(1, N), features(1, N), **s, **o),
}


@pytest.mark.parametrize("name", BY_SCALE)
def test_temperature_and_logit_scale(name: str, backend: str, seed: int) -> None:
    found = []
    for given in ({"logit_scale": torch.tensor(8.0)}, {"temperature": torch.tensor(0.125)}):
        torch.manual_seed(seed)
        (scalar,) = given.values()
        loss = BY_SCALE[name]({key: t.requires_grad_() for key, t in given.items()}, backend=backend)
        found.append((loss.detach(), *torch.autograd.grad(loss, scalar)))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[1][1], -found[0][1] / 0.125**2)  # d (1 / T)


@pytest.mark.parametrize("name", BY_SCALE)
def test_both_or_neither(name: str) -> None:
    with pytest.raises(ValueError, match="temperature, logit_scale: got both, expected one of them"):
        BY_SCALE[name]({"logit_scale": 8.0, "temperature": 0.125})
    if name not in ("info_nce", "nt_xent", "supcon"):
        with pytest.raises(TypeError, match="logit_scale, temperature: got neither, expected one of them"):
            BY_SCALE[name]({})


@pytest.mark.parametrize("name", BY_SCALE)
def test_a_scale_of_one_element(name: str, backend: str, seed: int) -> None:
    found = []
    for shape in ((), (1,)):
        torch.manual_seed(seed)
        scale = torch.full(shape, 8.0).requires_grad_()
        loss = BY_SCALE[name]({"logit_scale": scale}, backend=backend)
        (gradient,) = torch.autograd.grad(loss, scale)
        assert loss.shape == ()
        assert gradient.shape == shape
        found.append((loss.detach(), gradient.reshape(())))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_bias_of_one_element(backend: str) -> None:
    x, y, bias = features(N), features(N), torch.tensor([-5.0], requires_grad=True)
    loss = fc.siglip_loss(x, y, 8.0, bias, backend=backend)
    assert torch.equal(loss, fc.siglip_loss(x, y, 8.0, -5.0, backend=backend))
    assert torch.autograd.grad(loss, bias)[0].shape == (1,)


BY_MASK: dict[str, Callable[[Tensor, str], Tensor]] = {
    "filip": lambda m, b: fc.filip_loss(features(ITEMS, 3), features(ITEMS, 4), 9.0, text_mask=m, backend=b),
    "filip's image": lambda m, b: fc.filip_loss(features(ITEMS, 4), features(ITEMS, 3), 9.0, image_mask=m, backend=b),
    "max_sim": lambda m, b: fc.max_sim(features(ITEMS, 4), features(ITEMS, 3), m, backend=b).sum(),
    "max_sim's y": lambda m, b: fc.max_sim(features(ITEMS, 3), features(ITEMS, 4), y_mask=m, backend=b).sum(),
    "x_clip": lambda m, b: fc.x_clip_loss(
        features(1, ITEMS, 4), features(1, ITEMS, 3), 9.0, text_mask=m, use_all_token_embeds=True, backend=b
    ),
}


@pytest.mark.thinned("name", "dtype")
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BY_MASK)
def test_a_mask_of_0_and_1(name: str, dtype: torch.dtype, backend: str, seed: int) -> None:
    found = []
    for kind in (torch.bool, dtype):
        torch.manual_seed(seed)
        mask = torch.arange(4) < 1 + torch.randint(4, (ITEMS, 1))
        found.append(BY_MASK[name](mask.to(kind), backend))
    assert torch.equal(*found)


@pytest.mark.parametrize("name", BY_MASK)
@pytest.mark.parametrize("values", [(0.0, -torch.inf), (0.5, 1.0), (0, 2)])
def test_a_mask_that_means_something_else(name: str, values: tuple[float, float]) -> None:
    low, high = (f"{value:g}" for value in sorted(values))
    mask = torch.tensor(values).repeat(ITEMS, 2)
    with pytest.raises(ValueError, match=rf"mask: got values from {low} to {high}, expected a bool tensor"):
        BY_MASK[name](mask, "reference")


@pytest.fixture
def dtensor() -> Iterator[Callable[[Tensor], Tensor]]:
    """Makes DTensors, in a group of this process alone."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    mesh = dist.init_device_mesh("cpu", (1,))
    yield lambda t: distribute_tensor(t, mesh, [Replicate()])
    dist.destroy_process_group()


def test_masks_of_numbers_in_a_batch_of_calls(backend: str) -> None:
    x, y, masks = features(ITEMS, 4), features(ITEMS, 3), torch.randint(2, (3, ITEMS, 4))
    run = lambda mask: fc.filip_loss(x, y, 9.0, image_mask=mask, backend=backend)  # noqa: E731
    found = torch.vmap(run)(masks)
    torch.testing.assert_close(found, torch.stack([run(mask) for mask in masks]))
    with pytest.raises(RuntimeError, match="image_mask: expected values 0 and 1"):
        torch.vmap(run)(masks + 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BY_SCALE)
def test_a_temperature_is_divided_by_in_full_precision(name: str, dtype: torch.dtype, seed: int) -> None:
    found = []
    for kind in (dtype, torch.float64):
        torch.manual_seed(seed)
        temperature = torch.tensor(0.05, dtype=dtype).to(kind).requires_grad_()
        loss = BY_SCALE[name]({"temperature": temperature})
        found.append((loss.double(), torch.autograd.grad(loss, temperature)[0].double()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


X, TOKENS = torch.randn(4, 3), torch.randn(4, 2, 3)
WITH_DTENSOR: dict[str, Callable[[Callable[[Tensor], Tensor]], object]] = {
    "image_features": lambda d: fc.clip_loss(d(X), X, 2.0),
    "text_features": lambda d: fc.clip_loss(X, d(X), 2.0),
    "logit_scale": lambda d: fc.clip_loss(X, X, d(torch.tensor(2.0))),
    "logit_bias": lambda d: fc.siglip_loss(X, X, 2.0, d(torch.tensor(2.0))),
    "targets": lambda d: fc.info_nce_loss(X, X, targets=d(torch.arange(4))),
    "negatives": lambda d: fc.info_nce_loss(X, X, negatives=d(X)),
    "labels": lambda d: fc.supcon_loss(X, d(torch.arange(4))),
    "features": lambda d: fc.supcon_loss(d(X), torch.arange(4)),
    "z1": lambda d: fc.nt_xent_loss(d(X), X),
    "x": lambda d: fc.contrastive_stats(d(X), X),
    "x_tokens": lambda d: fc.max_sim(d(TOKENS), TOKENS),
    "image_tokens": lambda d: fc.filip_loss(d(TOKENS), TOKENS, 2.0),
    "queries": lambda d: fc.rank(d(X), X, 1),
    "candidates": lambda d: fc.recall_at_k(X, d(X)),
}


def test_a_dtensor_is_refused_by_name(dtensor: Callable[[Tensor], Tensor]) -> None:
    for name, call in WITH_DTENSOR.items():
        with pytest.raises(TypeError, match=rf"^{name}: got a DTensor, expected a plain tensor: its full_tensor\(\)"):
            call(dtensor)
