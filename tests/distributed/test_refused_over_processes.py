"""A bad argument in one process raises in every process at once, and the next call is right.

The arguments are read from the signatures: a test fails if a new one has no entry here.
"""

from __future__ import annotations

import functools
import inspect
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import numpy as np
import processes
import pytest
import torch
import torch.distributed as dist
from spread import start
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import fused_contrastive as fc
from fused_contrastive.distributed.shape import GlobalShape
from fused_contrastive.ops import dispatch

WORLDS, N, D = (2, 3), 4, 8
LIMIT = 30  # seconds, for a busy machine; an error takes milliseconds, a process that is not told waits longer
# A process with a bad group cannot tell the others.
NOT_TOLD = {"group"}
MISSING = object()


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linspace(-1, 1, 97, dtype=dtype).repeat(9)[: torch.Size(shape).numel()].view(shape)


def indices(n: int = N) -> Tensor:
    return torch.arange(n)


def good_calls() -> dict[str, dict[str, Any]]:
    """Good arguments of each function that takes a group; after a comma, a second way to call it."""
    pair = (floats(N, D), floats(N, D).flip(0))
    ids = {"row_ids": indices(), "col_ids": indices()}
    clip = dict(zip(("image_features", "text_features"), pair, strict=True))
    nce = {**dict(zip(("query", "key"), pair, strict=True)), "targets": indices(), "weight": torch.ones(N)}
    stats = dict(zip(("x", "y"), pair, strict=True)) | ids | {"targets": indices(), "col_bias": torch.zeros(N)}
    latents = dict(zip(("text_latents", "image_latents"), pair, strict=True)) | {"logit_scale": 5.0}
    tokens = {"image_tokens": floats(N, 3, D), "text_tokens": floats(N, 2, D)}
    masks = {"image_mask": torch.ones(N, 3), "text_mask": torch.ones(N, 2)}
    return {
        "clip_loss": {**clip, "logit_scale": 5.0},
        "clip_loss, smoothed": {**clip, "temperature": 0.5, "label_smoothing": 0.1},
        "info_nce_loss": {
            **nce, **ids, "negatives": floats(N, 2, D), "negatives_mask": torch.ones(N, 2), "col_bias": torch.zeros(N),
        },
        "info_nce_loss, shared": {**nce, "negatives": floats(3, D), "col_bias": torch.zeros(N + 3), "normalize": True},
        "nt_xent_loss": {"z1": pair[0], "z2": pair[1], "views": [floats(N, D)], "normalize": False},
        "nt_xent_loss, normalised": {"z1": pair[0], "z2": pair[1], "normalize": True},
        "supcon_loss, in": {"features": floats(N, 2, D), "labels": indices(), "variant": "in"},
        "supcon_loss": {"features": pair[0], "labels": indices() // 2},
        "siglip_loss": {**clip, **ids, "logit_scale": 5.0, "logit_bias": -1.0},
        "distillation_loss": {
            "x": pair[0], "y": pair[1], "teacher_x": pair[0], "teacher_y": pair[1], "logit_scale": 5.0,
            "teacher_scale": 2.0,
        },
        "filip_loss": {**tokens, **masks, "logit_scale": 5.0},
        "x_clip_loss": {**latents, "text_latents_extra": pair[1], "image_latents_extra": pair[0]},
        "x_clip_loss, tokens": {
            "text_latents": tokens["text_tokens"], "image_latents": tokens["image_tokens"], "logit_scale": 5.0,
            "text_mask": masks["text_mask"], "use_all_token_embeds": True,
        },
        "contrastive_stats": stats,
        "sigmoid_stats": stats,
        "self_stats": {"x": pair[0], "ids": indices(), "equal_ids": "only"},
    }  # fmt: skip


def bad_values() -> dict[str, list[Any]]:
    """Bad values of each argument."""
    features = [MISSING, None, torch.zeros(N, D, dtype=torch.int64), floats(D), floats(N, D).to_sparse()]
    scale = ["5", torch.ones(2), torch.tensor(5), True]
    vector = [[0.0] * N, torch.zeros(N + 9), torch.zeros(N, 1), torch.zeros(N, dtype=torch.int64)]
    ids = [[0] * N, indices(N + 9), torch.zeros(N)]
    flag = ["no", 1, None]
    mask = [[True] * N, torch.ones(N, 9), torch.full((N, 2), 2), torch.ones(N, 2, dtype=torch.complex64)]
    word = ["average", 1]
    weight = [-1.0, "0", float("inf")]
    others = [None, floats(N + 1, D), floats(D), floats(N, D).to_sparse()]
    return {
        **dict.fromkeys(("image_features", "text_features", "query", "key", "z1", "z2", "x", "y"), features),
        **dict.fromkeys(("features", "text_latents", "image_latents", "image_tokens", "text_tokens"), features),
        **dict.fromkeys(("scale", "logit_scale"), scale),
        "temperature": [*scale, 0.0, -1.0],
        **dict.fromkeys(("logit_bias", "teacher_scale"), scale),
        **dict.fromkeys(("teacher_x", "teacher_y"), others),
        "guide": [3, (floats(N, 2),), (floats(N, 2), floats(N + 1, 2))],
        "targets": [*ids, indices() - 1, indices() + 1000],
        "negatives": [[0.0], floats(N, D + 1), floats(N + 1, 2, D), floats(N, D, dtype=torch.float64), floats(D)],
        **{"dims": [(4, 2), (), 4, (4, 99), (4, 8.0)], "dim_weights": [(1.0,), 2.0]},
        **dict.fromkeys(("negatives_mask", "image_mask", "text_mask"), mask),
        **dict.fromkeys(("col_bias", "weight", "row_limit", "col_limit"), vector),
        **{key: [*ids, None] for key in ("row_ids", "col_ids", "ids")},
        "labels": [*ids, None, MISSING],
        **dict.fromkeys(("symmetric", "decoupled", "use_all_token_embeds", "decoupled_contrastive_learning"), flag),
        **dict.fromkeys(("equal_ids", "positive_weight"), word),
        **{"metrics": flag, "exclude_self": [*flag, True]},
        "lengths": [[N], torch.tensor([N])],
        "normalize": ["no", 1],
        **dict.fromkeys(("absolute_margin", "relative_margin", "targets_weight", "debias"), weight[1:]),
        **dict.fromkeys(("multiview_loss_weight", "ssl_loss_weight", "sim_reg_loss_weight"), weight),
        **dict.fromkeys(("margin", "hardness"), weight),
        "label_smoothing": [1.0, -0.1, "0"],
        "views": [floats(N, D), 3, [None], [floats(N + 1, D)]],
        **{key: [floats(N + 1, D), [0.0], floats(D)] for key in ("text_latents_extra", "image_latents_extra")},
        **dict.fromkeys(("reduction", "variant", "no_positive", "compat", "direction"), word),
        "directions": ["row", [], ["rows"]],
        "memory_budget": [-1, "all", 1.5],
        "backend": ["cp", "triton"],  # triton is made to be missing in these processes
    }  # fmt: skip


@functools.cache
def functions_with_a_group() -> dict[str, Callable[..., Any]]:
    found = {name: getattr(fc, name) for name in fc.__all__}
    return {
        name: f for name, f in found.items() if inspect.isfunction(f) and "group" in inspect.signature(f).parameters
    }


def cases(world: int = 2) -> Iterator[tuple[str, str, Any]]:
    """The key of a good call, an argument of its function, and its bad values; only one of them for three processes."""
    bad = bad_values() if world == 2 else {argument: values[1:2] for argument, values in bad_values().items()}
    for call, options in good_calls().items():
        name, *another = call.split(",")
        for argument in inspect.signature(functions_with_a_group()[name]).parameters:
            if another and argument not in (*options, "memory_budget", "backend"):
                continue  # another call has tried it
            for value in bad.get(argument, []):
                if value is not None or argument in options:  # None may be the default
                    yield call, argument, value


def test_every_argument_is_here() -> None:
    tried = {(call.split(",")[0], argument) for call, argument, _ in cases()}
    for name, function in functions_with_a_group().items():
        missing = {p for p in inspect.signature(function).parameters if (name, p) not in tried} - NOT_TOLD
        assert not missing, f"{name}: no bad value of {missing}"


def outcome(call: Callable[[], Any]) -> tuple[str, float]:
    """The error, or "", and the seconds that it took."""
    before = time.monotonic()
    try:
        call()
    except (TypeError, ValueError, RuntimeError, Warning) as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - before
    return "", time.monotonic() - before


class Checked:
    """Compares correct calls with calls in one process on the data of all processes. The data changes each time."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        generator = torch.Generator().manual_seed(0)
        self.problems = [torch.randn(2, world * N, D, generator=generator, dtype=torch.float64) for _ in range(5)]
        self.expected = [fc.siglip_loss(*whole, 0.5) for whole in self.problems]

    def own(self, t: Tensor) -> Tensor:
        return t.view(self.world, N, D)[self.rank]

    def value(self, k: int, group: fc.GlobalBatch) -> float:
        """The difference of the k-th call from its one-process value."""
        k %= len(self.problems)
        return float((fc.siglip_loss(*map(self.own, self.problems[k]), 0.5, group=group) - self.expected[k]).abs())

    def gradients(self, group: fc.GlobalBatch) -> float:
        """The largest difference of a symmetric loss's gradients from those in one process."""
        wholes = [t.clone().requires_grad_() for t in self.problems[0]]
        owns = [self.own(t).clone().requires_grad_() for t in self.problems[0]]
        expected = torch.autograd.grad(fc.clip_loss(*wholes, 0.5), wholes)
        found = torch.autograd.grad(fc.clip_loss(*owns, 0.5, group=group), owns)
        return max(float((a - self.own(b)).abs().max()) for a, b in zip(found, expected, strict=True))


def refuse_each(rank: int, world: int, group: dist.ProcessGroup) -> list[Any]:
    """Runs each case, with the bad value in one process, the processes taking turns, and then a correct call."""
    checked, good, results = Checked(rank, world), good_calls(), []
    for k, (name, argument, value) in enumerate(cases(world)):
        batch = fc.GlobalBatch(group, exchange=("gather", "ring")[k // world % 2], gradients="sum")
        options = dict(good[name])
        if rank == k % world:
            options[argument] = value
            options = {key: each for key, each in options.items() if each is not MISSING}
        function = functions_with_a_group()[name.split(",")[0]]
        error, seconds = outcome(
            lambda function=function, options=options, batch=batch: function(**options, group=batch)
        )
        results.append((f"{name}({argument}={str(value)[:40]})", error, seconds, checked.value(k, batch)))
    results.append(("all of them", "", 0.0, checked.gradients(batch)))
    return results


def take_each(group: dist.ProcessGroup) -> list[tuple[str, str]]:
    """Runs the good calls, which must not raise."""
    functions = functions_with_a_group()
    return [
        (name, outcome(lambda name=name, options=options: functions[name.split(",")[0]](**options, group=group))[0])
        for name, options in good_calls().items()
    ]


def odd_calls(odd: bool, group: dist.ProcessGroup) -> list[tuple[str, Callable[[], Any]]]:
    """Calls that one process makes differently, each with a part of the expected error, or "" if none is expected."""
    x, y = floats(N, D), floats(N, D).flip(0)
    grown = floats(N, D + odd)
    weight = torch.ones(N, requires_grad=odd)

    def clip(x: Tensor = x, y: Tensor = y) -> Tensor:
        return fc.clip_loss(x, y, 1.0, group=group)

    def extra(extra: Tensor, **how: Any) -> Tensor:
        return fc.x_clip_loss(x, y, 1.0, text_latents_extra=extra, image_latents_extra=extra, group=group, **how)

    def under_autocast(call: Callable[[], Tensor]) -> Tensor:
        with torch.autocast("cpu", enabled=odd):
            return call()

    def with_a_tangent() -> Tensor:
        with forward_ad.dual_level():
            return clip(forward_ad.make_dual(x, y) if odd else x)

    def with_warnings_as_errors() -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("error" if odd else "ignore")
            return fc.nt_xent_loss(x, y, group=group)

    def traced() -> Tensor:
        return torch.jit.trace(clip, (x,), check_trace=False)(x) if odd else clip()

    def fake(x: Tensor = x, y: Tensor = y) -> Tensor:
        with FakeTensorMode(allow_non_fake_inputs=True) if odd else nullcontext():
            return fc.clip_loss(x, y, 1.0, group=group)

    def of_fake_tensors() -> Tensor:
        mode = FakeTensorMode()
        one, other = (mode.from_tensor(t) if odd else t for t in (x, y))
        return fc.clip_loss(one, other, 1.0, group=group)

    def exported() -> Any:
        return torch.export.export(fc.ClipLoss(group=group), (x, y, 1.0), strict=False) if odd else clip()

    def made_fx(mode: str) -> Tensor:
        return make_fx(lambda t: clip(t), tracing_mode=mode)(x) if odd else clip()

    def inference(t: Tensor) -> Tensor:
        with torch.inference_mode(odd):
            return t.clone()

    inferred = "from torch.inference_mode() while a gradient is asked"
    leaf, mask = y.clone().requires_grad_(), torch.ones(N, 2, dtype=torch.bool)
    ones, tokens = torch.ones(N), leaf[:, None].expand(N, 2, D)

    def nce(**how: Any) -> Tensor:
        return fc.info_nce_loss(x, leaf, negatives=floats(N, 2, D), group=group, **how)

    def filip(mask: Tensor) -> Tensor:
        return fc.filip_loss(tokens, tokens, 1.0, image_mask=mask, group=group)

    def x_clip(mask: Tensor) -> Tensor:
        return fc.x_clip_loss(tokens, tokens, 1.0, text_mask=mask, use_all_token_embeds=True, group=group)

    def in_any_dtype(name: str, **how: Any) -> None:
        ones = torch.ones(N, dtype=torch.float64 if odd else torch.float16)
        found, right = (fc.info_nce_loss(x, y, group=group, **{name: t}, **how) for t in (ones, ones.float()))
        torch.testing.assert_close(found, right)

    return [
        ("", lambda: in_any_dtype("weight")),
        ("", lambda: in_any_dtype("col_bias", label_smoothing=0.1)),
        ("", lambda: nce(margin=0 if odd else 0.0, label_smoothing=-0.0 if odd else 0)),
        ("", lambda: nce(margin=np.float64(0.1) if odd else 0.1, reduction=np.str_("sum") if odd else "sum")),
        ("", lambda: extra(x, ssl_loss_weight=1 if odd else 1.0)),
        ("", lambda: extra(x, ssl_loss_weight=2**60 if odd else 2.0**60)),
        ("disagree on margin: rank 0 has 0, rank 1 has 0.5", lambda: nce(margin=0.5 * odd)),
        ("disagree on weights", lambda: extra(x, ssl_loss_weight=2**53 + odd)),
        ("disagree on requires_grad", lambda: fc.info_nce_loss(x, y, weight=weight, group=group).backward()),
        ("disagree on requires_grad", lambda: extra(x.clone().requires_grad_(odd)).backward()),
        ("disagree on extra", lambda: extra(grown)),
        ("disagree on dtype", lambda: under_autocast(clip)),
        ("disagree on dtype", lambda: under_autocast(lambda: fc.x_clip_loss(x, y, 1.0, group=group))),
        ("group: got a call inside a transform", lambda: torch.func.grad(clip)(x) if odd else clip()),
        ("forward-mode", with_a_tangent),
        (f"clip_loss: got the features of the rows, of shape (4, 8), {inferred}", lambda: clip(inference(x), leaf)),
        (f"clip_loss: got the features of the columns, of shape (4, 8), {inferred}", lambda: clip(leaf, inference(y))),
        (f"info_nce_loss: got another input, of shape (4,), {inferred}", lambda: nce(weight=inference(ones))),
        (f"info_nce_loss: got another input, of shape (4, 2), {inferred}", lambda: nce(negatives_mask=inference(mask))),
        (f"filip_loss: got another input, of shape (4, 2), {inferred}", lambda: filip(inference(mask))),
        (f"x_clip_loss: got another input, of shape (4, 2), {inferred}", lambda: x_clip(inference(mask))),
        ("", lambda: clip(inference(x), inference(y))),
        ("torch.jit.trace (and torch.onnx.export with dynamo=False) cannot record", traced),
        ("group: got a call with fake or recorded tensors", fake),
        ("group: got a call with fake or recorded tensors", of_fake_tensors),
        ("group: got a call with fake or recorded tensors", lambda: made_fx("real")),
        ("group: got a call with fake or recorded tensors", lambda: made_fx("symbolic")),
        ("group: got a call with fake or recorded tensors", exported),
        ("FutureWarning", with_warnings_as_errors),
    ]


def leave(rank: int) -> tuple[str, str]:
    """Process 1 runs out of memory after all have agreed; returns the errors of this call and of process 1's next."""
    group = dist.new_group(timeout=timedelta(seconds=5))
    x = floats(N, D)

    def out_of_memory(*_: object) -> None:
        raise RuntimeError("out of memory")

    whole = GlobalShape.gather
    GlobalShape.gather = out_of_memory if rank == 1 else whole  # type: ignore[method-assign]
    first, _ = outcome(lambda: fc.clip_loss(x, x, 1.0, group=group))
    GlobalShape.gather = whole  # type: ignore[method-assign]
    following, _ = outcome(lambda: fc.clip_loss(x, x, 1.0, group=group)) if rank == 1 else ("", 0.0)
    dist.barrier()
    return first, following


def work(rank: int, folder: str) -> None:
    start(rank, max(WORLDS), folder)
    dispatch.BACKENDS["triton"].unavailable = lambda: "it is missing on this node"  # type: ignore[method-assign]
    found: dict[Any, Any] = {}
    for world in WORLDS:
        group = dist.new_group(list(range(world)))
        if rank < world:
            found[world] = refuse_each(rank, world, group)
    found["good"] = take_each(dist.group.WORLD)
    found["odd"] = [(message, *outcome(call)) for message, call in odd_calls(rank == 1, dist.group.WORLD)]
    found["left"] = leave(rank)
    found["after"] = Checked(rank, max(WORLDS)).gradients(fc.GlobalBatch(gradients="sum"))
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def found() -> list[dict[Any, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(work, (folder,), nprocs=max(WORLDS))
        return [torch.load(f"{folder}/{rank}.pt") for rank in range(max(WORLDS))]


def test_good_calls_are_taken(found: list[dict[Any, Any]]) -> None:
    for of_rank in found:
        for name, error in of_rank["good"]:
            assert not error, name


@pytest.mark.parametrize("world", WORLDS)
def test_every_process_hears_of_a_refusal(world: int, found: list[dict[Any, Any]]) -> None:
    arguments = [argument for _, argument, _ in cases(world)]
    for k, of_ranks in enumerate(zip(*(found[rank][world][:-1] for rank in range(world)), strict=True)):
        for rank, (case, error, seconds, _) in enumerate(of_ranks):
            named = arguments[k] if rank == k % world else f"rank {k % world}"
            assert named in error, f"{case}, bad in process {k % world} of {world}, in process {rank}: {error!r}"
            assert seconds < LIMIT, case


@pytest.mark.parametrize("world", WORLDS)
def test_the_call_after_a_refusal_is_right(world: int, found: list[dict[Any, Any]]) -> None:
    for rank in range(world):
        for case, _, _, error in found[rank][world]:
            assert error < 1e-12, f"after {case}, process {rank} of {world}"


def test_every_process_hears_of_what_one_alone_does(found: list[dict[Any, Any]]) -> None:
    for rank, of_rank in enumerate(found):
        for k, (message, error, seconds) in enumerate(of_rank["odd"]):
            for part in (message, "rank 1") if message and rank != 1 else (message,):
                assert part in error, f"call {k}, process {rank}"
            assert bool(message) == bool(error), f"call {k}, process {rank}: {error}"
            assert seconds < LIMIT, message


def test_a_process_that_left_the_others_does_not_mix_up_two_calls(found: list[dict[Any, Any]]) -> None:
    """The others wait until the group's timeout; it is told to make a new group. Other groups keep working."""
    for rank, of_rank in enumerate(found):
        first, following = of_rank["left"]
        if rank == 1:
            assert first == "RuntimeError: out of memory"
            assert "group: got one in which this process has left an earlier call" in following
            assert "RuntimeError: out of memory" in following
        else:
            assert first, "no error where another process has left"
        assert of_rank["after"] < 1e-12
