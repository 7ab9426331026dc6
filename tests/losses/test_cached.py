"""cached() beside the same chunks kept in one graph: gradients, sums, and several outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from chunked import D, Encoder, Towers, assert_same, both, gradients, in_one_graph, rows, rows_9
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fused_contrastive import cached, clip_loss, info_nce_loss

INPUTS: dict[str, Callable[[int], Any]] = {
    "tensor": rows,
    "tuple": lambda n: (rows(n), rows(n)),
    "list": lambda n: [rows(n)],
    "dict": lambda n: {"ids": rows(n), "mask": rows(n)},
}


@settings(max_examples=25, deadline=None, database=None)
@given(
    n=st.integers(2, 12), size=st.integers(1, 13), kinds=st.tuples(*[st.sampled_from(list(INPUTS))] * 2),
    shared=st.booleans(), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_gradients_with_dropout(n: int, size: int, kinds: tuple[str, str], shared: bool, seed: int) -> None:
    torch.manual_seed(seed)
    one = Encoder()
    model = Towers(one, one if shared else Encoder())
    inputs = [INPUTS[kind](n) for kind in kinds]
    both(model, lambda function: function(model.encoders, inputs, model.loss, size))


def test_gradients_are_those_of_the_whole_batch() -> None:
    model = Towers(Encoder(dropout=0), Encoder(3, dropout=0))
    x, y = rows(11), rows(11, 3)
    cached(model.encoders, (x, y), model.loss, [4, 2]).backward()
    found = gradients(model)
    model.loss(model.encoders[0](x), model.encoders[1](y)).backward()
    assert_same(found, gradients(model))


def test_float32_to_1e_6() -> None:
    model = Towers(Encoder(), Encoder()).float()
    inputs = rows(64).float(), rows(64).float()
    both(model, lambda function: function(model.encoders, inputs, model.loss, 9), 1e-6)


def test_one_encoder_for_all_inputs_of_several_sizes() -> None:
    model = Towers(Encoder())
    inputs = rows(5), rows(5), rows(8)

    def loss(query: Tensor, key: Tensor, negatives: Tensor) -> Tensor:
        return info_nce_loss(query, key, negatives=negatives, logit_scale=model.log_scale.exp())

    both(model, lambda function: function(model.encoders[0], inputs, loss, 3))


def test_several_outputs() -> None:
    """An output that the loss does not use, and one of integers."""
    model = Towers(Encoder(), Encoder())

    def with_more(x: Tensor) -> tuple[Tensor, ...]:
        features = model.encoders[0](x)
        return features, 2 * features, (x[:, 0] > 0).long()

    def loss(first: tuple[Tensor, ...], y: Tensor) -> Tensor:
        features, unused, ids = first
        assert unused.shape == features.shape
        return clip_loss(features, y, model.log_scale.exp(), row_ids=ids, col_ids=ids)

    both(model, lambda function: function([with_more, model.encoders[1]], (rows_9, rows_9), loss, 4))


def test_inputs_that_require_gradients() -> None:
    model = Towers(Encoder(), Encoder())
    found = []
    x, y, ids = rows(7).requires_grad_(), rows(7), torch.arange(7)[:, None]
    state = torch.get_rng_state()
    for function in (cached, in_one_graph):
        torch.set_rng_state(state)
        given_x = x * 1.5
        function(model.encoders, ((given_x, ids), y), model.loss, 3).backward()
        found.append(gradients(model) | {"x": x.grad})
        x.grad = None
    assert_same(*found)
    assert y.grad is None


def test_result_of_the_loss_is_returned() -> None:
    model = Towers(Encoder(), Encoder())
    loss, features = cached(model.encoders, (rows(4), rows(4)), lambda x, y: (model.loss(x, y), {"x": x}), 2)
    assert loss.requires_grad
    assert features["x"].shape == (4, D)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Callable[[], Any]) -> None:
    model = Towers(Encoder(dropout=0), Encoder(dropout=0))
    x, y = rows(5), rows(5)
    with mode():
        loss = cached(model.encoders, (x, y), model.loss, 2)
        assert not loss.requires_grad
        assert loss.item() == pytest.approx(model.loss(model.encoders[0](x), model.encoders[1](y)).item(), rel=1e-12)


def test_evaluation_mode() -> None:
    model = Towers(Encoder(), Encoder()).eval()
    both(model, lambda function: function(model.encoders, (rows_9, rows_9 + 1), model.loss, 4))


def test_accumulation_and_sums() -> None:
    """Two losses in one backward, divided, beside a term that uses an encoder directly."""
    model = Towers(Encoder(), Encoder())
    x, y = rows(10), rows(10)

    def run(function: Callable[..., Any]) -> Tensor:
        halves = [function(model.encoders, (x[k], y[k]), model.loss, 2) for k in (slice(0, 6), slice(6, 10))]
        return sum(halves) / 2 + model.encoders[0](x).square().sum()

    state = torch.get_rng_state()
    found = []
    for function in (cached, in_one_graph):
        torch.set_rng_state(state)
        run(function).backward()
        found.append(gradients(model))
    assert_same(*found)


def test_two_backwards() -> None:
    model = Towers(Encoder(), Encoder())
    loss = cached(model.encoders, (rows(5), rows(5)), model.loss, 2)
    loss.backward(retain_graph=True)
    once = gradients(model)
    loss.backward()
    assert_same(gradients(model), once)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
