"""cached() under autocast, compilation and checkpoints, with buffers and frozen weights; and its errors."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from chunked import D, Encoder, Towers, assert_same, both, gradients, in_one_graph, rows, rows_9
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fused_contrastive import cached, clip_loss


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_scaler(dtype: torch.dtype, inside: bool) -> None:
    """The second run has the forward's autocast, in a backward inside of autocast or not."""
    model = Towers(Encoder(), Encoder()).float()
    x, y = rows(8).float(), rows(8).float()
    seen = []
    for encoder in model.encoders:
        encoder.layers[0].register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    found = []
    state = torch.get_rng_state()
    for function in (cached, in_one_graph):
        torch.set_rng_state(state)
        with torch.autocast("cpu", dtype=dtype):
            loss = scaler.scale(function(model.encoders, (x, y), model.loss, 3))
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        found.append(gradients(model))
    assert set(seen) == {dtype}
    assert_same(*found, tolerance=1e-2 if dtype == torch.bfloat16 else 2e-3)  # of chunks, summed in halves or not


def test_autocast_disabled_inside() -> None:
    """A loss that is computed outside of autocast stays outside, also if its backward is called inside."""
    model = Towers(Encoder(), Encoder()).float()
    seen = []
    model.encoders[0].register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    loss = cached(model.encoders, (rows(4).float(), rows(4).float()), model.loss, 2)
    with torch.autocast("cpu"):
        loss.backward()
    assert seen == [torch.float32] * 4


def test_weights_cast_without_a_graph_are_not_kept() -> None:
    model = Towers(Encoder(dropout=0)).float()
    x = rows(4).float()
    with torch.autocast("cpu"):
        loss = cached(model.encoders[0], (x, x), model.loss, 2)
        (model.encoders[0](x).float().square().sum() * 0 + model.encoders[0].layers[0](x).float().sum()).backward()
    assert gradients(model)["encoders.0.layers.0.weight"].any()
    loss.backward()


class Normed(nn.Module):
    """Buffers change in each forward: running statistics, and the vectors of spectral normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(5, 8))
        self.norm = nn.BatchNorm1d(8, affine=False)
        self.head = nn.Linear(8, D)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.head(self.norm(self.linear(x))), dim=-1)

    def encode(self, x: Tensor) -> Tensor:
        return self(x)


@pytest.mark.parametrize("method", [False, True])
def test_buffers_change_once(method: bool) -> None:
    normed = Normed()
    model = Towers(normed, Encoder())
    x, y = rows(12), rows(12)
    start = {name: buffer.clone() for name, buffer in model.named_buffers()}
    encoders = [normed.encode if method else normed, model.encoders[1]]
    ends = []

    def run(function: Callable[..., Any]) -> Tensor:
        model.load_state_dict(start, strict=False)
        loss = function(encoders, (x, y), model.loss, 4)
        ends.append({name: buffer.clone() for name, buffer in model.named_buffers()})
        return loss

    both(model, run)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, ends[1][name])  # the last backward is the oracle's
        assert torch.equal(ends[0][name], ends[1][name])
        assert not torch.equal(buffer, start[name])
    run(cached).backward()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, ends[1][name]), "the backward's run has changed it"


def test_generators_of_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in for CUDA's generators: a chunk's second run begins in the state of its first."""
    state = [0]
    drawn = []

    def draw(x: Tensor) -> Tensor:
        state[0] += 1
        drawn.append((torch.is_grad_enabled(), len(x), state[0]))
        return x * weight

    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: list(state))
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda new: state.__setitem__(slice(None), new))
    cached(draw, (rows(5), rows(5)), lambda x, y: clip_loss(x, y, 1.0), 2).backward()
    runs = {graph: [entry[1:] for entry in drawn if entry[0] == graph] for graph in (False, True)}
    assert runs[False] == runs[True] == [(n, k) for k, n in enumerate((2, 2, 1) * 2, start=1)]
    assert state == [6]


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    model = Towers(Encoder(), Encoder()).cuda()
    inputs = rows(9).cuda(), rows(9).cuda()
    state = torch.cuda.get_rng_state()

    def run(function: Callable[..., Any]) -> Tensor:
        torch.cuda.set_rng_state(state)
        return function(model.encoders, inputs, model.loss, 4)

    both(model, run)


def test_one_chunk_s_activations_at_a_time() -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = [0, 0]

    def counting(x: Tensor) -> Tensor:
        hidden = model.encoders[0].layers[0](x)
        most[0] = max(most[0], sum(ref() is not None for ref in alive))
        most[1] = max(most[1], len(x))
        alive.append(weakref.ref(hidden))
        return model.encoders[0].layers[3](hidden.exp())

    model = Towers(Encoder())
    cached(counting, (rows(20), rows(20)), model.loss, 2).backward()
    assert len(alive) == 40
    assert most[0] <= 1
    assert most[1] == 2


def test_what_the_loss_detaches_is_not_run_again() -> None:
    calls = []
    model = Towers(Encoder(), Encoder())
    model.encoders[0].register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    cached(model.encoders, (rows(4), rows(4)), lambda x, y: model.loss(x.detach(), y), 2).backward()
    assert calls == [False, False]
    assert {name.split(".")[1] for name in gradients(model) if "." in name} == {"1"}


def test_frozen_encoder() -> None:
    model = Towers(Encoder(), Encoder())
    model.encoders[0].requires_grad_(False)
    both(model, lambda function: function(model.encoders, (rows_9, rows_9 + 1), model.loss, 4))


def test_no_rows() -> None:
    """A process of a group may have none; its encoder still runs once, forward and backward."""
    model = Towers(Encoder())
    empty = rows(0)
    cached(model.encoders, (empty,), lambda x: x.sum() + model.log_scale, 4).backward()
    assert model.encoders[0].layers[0].weight.grad is not None


def test_compiled_encoder_and_loss() -> None:
    torch._dynamo.reset()
    model = Towers(Encoder(dropout=0))
    encoder, loss = (torch.compile(f, backend="aot_eager", fullgraph=True) for f in (model.encoders[0], model.loss))
    x, y = rows(8), rows(8)
    cached(encoder, (x, y), loss, 4).backward()
    found = gradients(model)
    in_one_graph(model.encoders[0], (x, y), model.loss, 4).backward()
    assert_same(found, gradients(model))


def test_inside_a_compiled_function() -> None:
    """The graph breaks around the call, and fullgraph=True says what to compile in its place."""
    torch._dynamo.reset()
    weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def step(x: Tensor) -> Tensor:
        return cached(lambda t: t * weight, (x,), torch.sum, 4) * 2

    torch.compile(step, backend="aot_eager")(rows_9).backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, 2 * rows_9.sum())
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile the encoders and the loss instead"):
        torch.compile(step, backend="aot_eager", fullgraph=True)(rows_9)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_encoder(reentrant: bool) -> None:
    model = Towers(Encoder(), Encoder())
    x, y = rows(7).requires_grad_(), rows(7).requires_grad_()  # a reentrant checkpoint needs inputs with a gradient
    encoders = [partial(checkpoint, encoder, use_reentrant=reentrant) for encoder in model.encoders]
    both(model, lambda function: function(encoders, (x, y), model.loss, 3))


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "chunk_size 0": ({"chunk_size": 0}, ValueError, "chunk_size: got 0, expected an integer of at least 1"),
    "chunk_size True": ({"chunk_size": True}, TypeError, "chunk_size: got True, expected an integer of at least 1"),
    "chunk_size float": ({"chunk_size": 2.0}, TypeError, "chunk_size: got 2.0, expected an integer of at least 1"),
    "chunk_size text": ({"chunk_size": "2"}, TypeError, "chunk_size: got '2', expected a sequence of integers of at "),
    "a chunk_size of -1": ({"chunk_size": [2, -1]}, ValueError, "chunk_size[1]: got -1, expected an integer of at "),
    "three chunk sizes": ({"chunk_size": [1, 2, 3]}, ValueError, "chunk_size: got 3 for 2 inputs, expected one for "),
    "one input": ({"inputs": (rows_9,)}, ValueError, "inputs: got 1 for 2 encoders, expected one for each encoder"),
    "no input": ({"inputs": ()}, ValueError, "inputs: got none, expected the input of each encoder"),
    "a tensor": ({"inputs": rows_9}, TypeError, "inputs: got Tensor, expected a tuple or list with the input of each"),
    "a number": ({"inputs": (rows_9, 3)}, TypeError, "inputs[1]: got int, expected a tensor, or a tuple, list or dict"),
    "an empty dict": ({"inputs": (rows_9, {})}, ValueError, "inputs[1]: got none, expected at least one tensor"),
    "None in a tuple": ({"inputs": ((rows_9, None), rows_9)}, TypeError, "inputs[0][1]: got NoneType, expected a tens"),
    "text in a dict": ({"inputs": (rows_9, {"a": "b"})}, TypeError, "inputs[1]['a']: got str, expected a tensor"),
    "a scalar": ({"inputs": (rows_9, torch.tensor(1.0))}, ValueError, "inputs[1]: got shape (), expected at least one"),
    "other rows": (
        {"inputs": (rows_9, (rows_9, rows_9[:4]))}, ValueError,
        "inputs[1][1]: got 4 rows, expected 9, as many as inputs[1][0]",
    ),
    "no function": ({"encoders": [Encoder(), 3]}, TypeError, "encoders[1]: got int, expected a module or another"),
    "neither": ({"encoders": "model"}, TypeError, "encoders: got str, expected a module or another callable"),
    "no loss": ({"loss": None}, TypeError, "loss: got NoneType, expected a function of the encoders' outputs"),
    "text returned": ({"encoders": lambda x: "features"}, TypeError, "encoders[0]: got str, expected it to return a "),
    "a dict returned": ({"encoders": lambda x: {"f": x}}, TypeError, "encoders[0]: got dict, expected it to return a "),
    "nothing returned": ({"encoders": lambda x: ()}, TypeError, "encoders[0]: got tuple, expected it to return a "),
    "None returned": ({"encoders": lambda x: (x, None)}, TypeError, "encoders[0]: got tuple, expected it to return a "),
    "fewer rows": (
        {"encoders": [lambda x: x, lambda x: x[1:]]}, ValueError,
        "encoders[1]: got an output of shape (1, 5) for 2 rows of input, expected as many rows",
    ),
    "a mean": (
        {"encoders": torch.mean}, ValueError,
        "encoders[0]: got an output of shape () for 2 rows of input, expected as many rows",
    ),
    "other columns": (
        {"encoders": lambda x: x[:, : 2 + len(x)]}, ValueError,
        "encoders[0]: got outputs with [((3,), torch.float64)] after outputs with [((4,), torch.float64)], expected",
    ),
    "more outputs": (
        {"encoders": lambda x: (x,) * len(x)}, ValueError, "encoders[0]: got outputs with [((5,), torch.float64)] aft",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    change, error, message = ERRORS[case]
    good = {
        "encoders": [Encoder().double(), Encoder().double()], "inputs": (rows_9, rows_9),
        "loss": lambda x, y: clip_loss(x, y, 1.0), "chunk_size": 2,
    }  # fmt: skip
    cached(**good)
    with pytest.raises(error, match="^" + re.escape(message)):
        cached(**(good | change))


def test_errors_of_the_backward() -> None:
    model = Towers(Encoder(), Encoder())
    x = rows(4).requires_grad_()
    loss = cached(model.encoders, (x, rows(4)), model.loss, 2)
    with pytest.raises(RuntimeError, match=r"cached: got a backward with create_graph=True, expected one without"):
        torch.autograd.backward(loss, retain_graph=True, create_graph=True)
    with pytest.raises(RuntimeError, match=r"cached: got torch.autograd.grad\(\) or backward\(inputs=...\)"):
        torch.autograd.grad(loss, x, retain_graph=True)
    (of_scale,) = torch.autograd.grad(loss, model.log_scale, retain_graph=True)
    assert of_scale.abs() > 0
    with pytest.raises(RuntimeError, match=r"cached: got a call inside a transform of torch.func"):
        torch.func.grad(lambda t: cached(model.encoders, (t, t), model.loss, 2))(rows(4))


def test_inputs_changed_before_the_backward() -> None:
    model = Towers(Encoder(), Encoder())
    x = rows(4)
    loss = cached(model.encoders, (x, rows(4)), model.loss, 2)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_encoder_that_fails_in_the_backward_leaves_the_state() -> None:
    model = Towers(Encoder(), Encoder())

    def failing(x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise FloatingPointError("in the backward")
        return model.encoders[0](x)

    loss = cached([failing, model.encoders[1]], (rows(4), rows(4)), model.loss, 2)
    state = torch.get_rng_state()
    with pytest.raises(FloatingPointError, match="in the backward"):
        loss.backward()
    assert torch.equal(torch.get_rng_state(), state)
