"""Groups: B problems in one call are what B calls compute; their arguments, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st
from seeds import SEED
from torch import Tensor

import fused_contrastive as fc
from fused_contrastive.core.spec import StatsSpec
from fused_contrastive.ops.dispatch import BACKENDS
from fused_contrastive.ops.groups import grouped

D = 6
LENGTHS = torch.tensor([3, 0, 1, 5, 0])  # a group of one row, and two of none

LOSSES: dict[str, Callable[..., Tensor]] = {
    "clip": lambda x, y, s, **o: fc.clip_loss(x, y, s, **o),
    "info_nce": lambda x, y, s, **o: fc.info_nce_loss(x, y, logit_scale=s, **o),
    "nt_xent": lambda x, y, s, **o: fc.nt_xent_loss(x, y, logit_scale=s, normalize=True, **o),
    "siglip": lambda x, y, s, **o: fc.siglip_loss(x, y, s, s / -2, **o),
    "supcon": lambda x, y, s, **o: fc.supcon_loss(torch.stack((x, y), -2), _labels(x), logit_scale=s, **o),
}


def _labels(x: Tensor) -> Tensor:
    """Of the samples of x (rows, D) or (B, N, D), whose first feature decides."""
    return (x.detach()[..., 0] > 0).long().flatten()


def leaves(lengths: Tensor = LENGTHS, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    rows = int(lengths.sum())
    x, y = (F.normalize(torch.randn(rows, D, dtype=torch.float64), dim=1).to(dtype) for _ in range(2))
    scale = torch.tensor(5.0, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return x.requires_grad_(), y.requires_grad_(), scale.requires_grad_()


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


def one_by_one(loss: Callable[..., Tensor], lengths: Tensor, x: Tensor, y: Tensor, s: Tensor, **options: Any) -> Tensor:
    """The losses of the rows of all groups, from a call for each."""
    pairs = zip(x.split(lengths.tolist()), y.split(lengths.tolist()), strict=True)
    return torch.cat([loss(a, b, s, reduction="none", **options) for a, b in pairs if len(a)])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_call_is_a_call_for_each_group(name: str, reduction: str, backend: str) -> None:
    dtype = torch.float32 if backend == "triton" else torch.float64
    x, y, s = leaves(dtype=dtype)
    ours = LOSSES[name](x, y, s, lengths=LENGTHS, reduction=reduction, backend=backend)
    each = one_by_one(LOSSES[name], LENGTHS, x.double(), y.double(), s.double(), backend="reference")
    expected = {"mean": each.mean(), "sum": each.sum(), "none": each}[reduction]
    torch.testing.assert_close(ours, expected.to(ours.dtype), rtol=1e-5, atol=1e-6)
    weights = torch.linspace(1, 2, ours.numel(), dtype=ours.dtype).view(ours.shape)
    for a, b in zip(
        gradients((ours * weights).sum(), x, y, s), gradients((expected * weights).sum(), x, y, s), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_equal_groups(name: str, backend: str) -> None:
    """Features (B, N, D) are what their rows with lengths are, bit for bit."""
    x, y, s = leaves(torch.tensor([12]), torch.float32)
    lengths = torch.tensor([4, 4, 4])
    batched = LOSSES[name](x.view(3, 4, D), y.view(3, 4, D), s, backend=backend)
    packed = LOSSES[name](x, y, s, lengths=lengths, backend=backend)
    assert torch.equal(batched, packed)
    for a, b in zip(gradients(batched, x, y, s), gradients(packed, x, y, s), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_single_row_has_no_loss(backend: str) -> None:
    x, y, s = leaves(torch.tensor([4]), torch.float32)
    loss = fc.clip_loss(x, y, s, lengths=torch.ones(4, dtype=torch.int64), backend=backend)
    assert loss.item() == 0
    assert not any(g.any() for g in gradients(loss, x, y, s))


def test_groups_do_not_touch_each_other(backend: str) -> None:
    """NaN in one group stays there."""
    x, y, s = leaves(torch.tensor([8]), torch.float32)
    x = x.detach().clone()
    x[4:] = torch.nan
    x.requires_grad_()
    losses = fc.clip_loss(x, y, s, lengths=torch.tensor([4, 4]), reduction="none", backend=backend)
    assert losses.isnan().tolist() == [False] * 4 + [True] * 4
    dx, dy = gradients(losses[:4].sum(), x, y)
    assert dx[:4].isfinite().all()
    assert dy[:4].isfinite().all()


def stats_one_by_one(x: Tensor, y: Tensor, scale: Tensor, shapes: tuple[int, int, int], **options: Any) -> list[Tensor]:
    b, m, n = shapes
    found = []
    for k in range(b):
        rows, cols = slice(k * m, (k + 1) * m), slice(k * n, (k + 1) * n)
        own = {}
        for name, value in options.items():
            of_rows = name in ("targets", "row_ids", "row_limit")
            own[name] = value if not isinstance(value, Tensor) or not value.dim() else value[rows if of_rows else cols]
        found.append(fc.contrastive_stats(x[rows], y[cols], scale, backend="reference", **own))
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


PROBLEMS = {
    "shapes": st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    "rules": st.sets(st.sampled_from(["bias", "ids", "limits", "exclude_self"])),
    "budget": st.sampled_from(["auto", 0]),
    "draw": st.integers(0, 2**31),
}


@hypothesis_seed(SEED)
@settings(max_examples=40, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(backend=st.sampled_from(["reference", "cpp"]), **PROBLEMS)
def test_statistics(backend, **drawn) -> None:  # type: ignore[no-untyped-def]
    assert_statistics(backend, **drawn)


@hypothesis_seed(SEED)
@settings(max_examples=8, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(**PROBLEMS)
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_statistics_triton(backend, **drawn) -> None:  # type: ignore[no-untyped-def]
    assert_statistics(backend, **drawn)


def assert_statistics(backend: str, shapes: tuple[int, int, int], rules: set[str], budget: Any, draw: int) -> None:
    """The statistics and gradients of B groups of M rows and N columns are those of B calls."""
    b, m, n = shapes
    generator = torch.Generator().manual_seed(draw)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float32, device="cpu").to(torch.get_default_device())

    options: dict[str, Any] = {"targets": (random(b * m).abs() * 1e4).long() % n}
    inputs = [random(b, m, D).requires_grad_(), random(b, n, D).requires_grad_(), torch.tensor(0.7).requires_grad_()]
    if "bias" in rules:
        options["col_bias"] = random(b * n).requires_grad_()
        inputs.append(options["col_bias"])
    if "ids" in rules:
        options["row_ids"], options["col_ids"] = ((random(b * k) * 2).long() for k in (m, n))
    if "limits" in rules:
        options["row_limit"], options["col_limit"] = random(b * m), random(b * n)
    options["exclude_self"] = "exclude_self" in rules
    ours = fc.contrastive_stats(*inputs[:3], memory_budget=budget, backend=backend, **options)
    wide = [t.double() for t in inputs]
    if "bias" in rules:
        options["col_bias"] = wide[3]
    for name in ("row_limit", "col_limit"):
        if name in options:
            options[name] = options[name].double() + 1e-12
    truth = stats_one_by_one(wide[0].flatten(0, 1), wide[1].flatten(0, 1), wide[2], shapes, **options)
    for a, e in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)

    def total(parts: Any) -> Tensor:
        return sum((t.masked_fill(t == -torch.inf, 0).sin().sum() for t in parts), torch.zeros(()))

    for a, e in zip(gradients(total(ours), *inputs), gradients(total(truth), *inputs), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


def test_primitives_within_one_set_and_sigmoids(backend: str) -> None:
    x, y, s = leaves(torch.tensor([9]), torch.float32)
    of_self = fc.self_stats(x, s, lengths=LENGTHS, ids=torch.arange(9) % 2, backend=backend)
    parts = [fc.self_stats(a, s, ids=i % 2, backend="reference") for a, i in _split(x, torch.arange(9))]
    torch.testing.assert_close(of_self, torch.cat(parts), rtol=1e-5, atol=1e-6)
    found = fc.sigmoid_stats(x, y, s, lengths=LENGTHS, backend=backend)
    each = [fc.sigmoid_stats(a, b, s, backend="reference") for a, b in _split(x, y)]
    for a, b in zip(found, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(a, torch.cat(b), rtol=1e-5, atol=1e-6)


def _split(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    parts = zip(*(t.split(LENGTHS.tolist()) for t in tensors), strict=True)
    return [each for each in parts if len(each[0])]


def test_small_and_large_groups(threads: None) -> None:
    """Groups that one thread computes, and groups that all threads share, give the same bits on any number of them."""
    lengths = torch.tensor([40, 600, 3, 700, 0, 130])
    x, y, s = leaves(lengths, torch.float32)
    found: dict[str | int, list[list[Tensor]]] = {}
    for count in (1, 2, 7):
        torch.set_num_threads(count)
        for budget in ("auto", 0, 300 * lengths.max().item() * 4):  # the last keeps a part of the large groups
            loss = fc.clip_loss(x, y, s, lengths=lengths, memory_budget=budget, normalize=True, backend="cpp")
            found.setdefault(budget, []).append([loss, *gradients(loss, x, y, s)])
    for results in found.values():
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))
    each = one_by_one(LOSSES["clip"], lengths, x.double(), y.double(), s.double(), normalize=True, backend="reference")
    expected = [each.mean(), *gradients(each.mean(), x, y, s)]
    for first, *_ in found.values():
        for a, b in zip(first, expected, strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "form"), [("nt_xent", "batched"), *((name, "packed") for name in LOSSES)])
def test_compiled(name: str, form: str) -> None:
    lengths = None if form == "batched" else LENGTHS
    x, y, s = leaves(torch.tensor([9]), torch.float32)
    if form == "batched":
        x, y = (t.detach().view(3, 3, D).requires_grad_() for t in (x, y))
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend="aot_eager")
    ours, eager = (f(x, y, s, lengths=lengths) for f in (compiled, LOSSES[name]))
    torch.testing.assert_close(ours, eager, rtol=1e-6, atol=1e-6)
    for a, b in zip(gradients(ours, x, y, s), gradients(eager, x, y, s), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_autocast_and_verify() -> None:
    x, y, s = leaves(torch.tensor([9]), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = fc.clip_loss(x, y, s, lengths=LENGTHS)
    rounded = fc.clip_loss(x.bfloat16(), y.bfloat16(), s, lengths=LENGTHS)
    assert torch.equal(loss, rounded)
    assert fc.verify(fc.clip_loss, x, y, s, lengths=LENGTHS).held


def test_inference_mode(threads: None) -> None:
    """Threads that begin without inference mode write to tensors that were made in it."""
    torch.set_num_threads(2)
    with torch.inference_mode():
        x, y = torch.randn(9, D), torch.randn(9, D)
        loss = fc.clip_loss(x, y, 1.0, lengths=LENGTHS, backend="cpp")
        torch.testing.assert_close(loss, fc.clip_loss(x, y, 1.0, lengths=LENGTHS, backend="reference"))


def test_operator() -> None:
    x, y, s = leaves(dtype=torch.float32)
    spec = StatsSpec(s, row_lengths=LENGTHS, col_lengths=LENGTHS)
    for backend in ("reference", "cpp"):
        torch.library.opcheck(torch.ops.fused_contrastive.stats_forward.default, (x, y, *spec, backend))
    for change, match in (
        ({"col_lengths": None}, "only one"),
        ({"col_lengths": LENGTHS[:4]}, "col_lengths: got shape"),
        ({"row_lengths": LENGTHS.flip(0)}, "more rows than columns"),
        ({"kept_rows": 3}, "kept_rows: got 3"),
    ):
        with pytest.raises(ValueError, match=match):
            torch.ops.fused_contrastive.stats_forward(x, y, *spec._replace(**change), "cpp")


BAD_LENGTHS = {
    "sum": (torch.tensor([3, 5]), ValueError, "lengths: got lengths that sum to 8, expected 9"),
    "negative": (torch.tensor([10, -1]), ValueError, "lengths: got a length of -1, expected lengths of at least 0"),
    "shape": (torch.tensor([[9]]), ValueError, r"lengths: got shape \(1, 1\)"),
    "empty": (torch.empty(0, dtype=torch.int64), ValueError, r"lengths: got shape \(0,\)"),
    "dtype": (torch.tensor([9], dtype=torch.int32), TypeError, "lengths: got dtype torch.int32, expected an int64"),
    "kind": ([4, 5], TypeError, "lengths: got list, expected an int64 tensor"),
}


@pytest.mark.parametrize("case", BAD_LENGTHS)
@pytest.mark.parametrize("name", LOSSES)
def test_bad_lengths(name: str, case: str) -> None:
    lengths, kind, match = BAD_LENGTHS[case]
    x, y, s = leaves()
    with pytest.raises(kind, match=match):
        LOSSES[name](x, y, s, lengths=lengths)


def test_bad_lengths_in_a_trace() -> None:
    x, y, s = leaves(dtype=torch.float32)
    compiled = torch.compile(fc.clip_loss, fullgraph=True, backend="aot_eager")
    for lengths in (torch.tensor([3, 5]), torch.tensor([10, -1])):
        with pytest.raises(RuntimeError, match="lengths: expected"):
            compiled(x, y, s, lengths=lengths)


NOT_COVERED: dict[str, tuple[str, dict[str, Any]]] = {
    "clip label_smoothing": ("label_smoothing", {"label_smoothing": 0.1}),
    "clip debias": ("debias", {"debias": 0.1}),
    "clip hardness": ("hardness", {"hardness": 0.1}),
    "clip equal_ids": ("equal_ids", {"equal_ids": "mean", "row_ids": torch.arange(9), "col_ids": torch.arange(9)}),
    "info_nce label_smoothing": ("label_smoothing", {"label_smoothing": 0.1}),
    "info_nce negatives": ("negatives", {"negatives": torch.zeros(2, D, dtype=torch.float64)}),
    "info_nce equal_ids": ("equal_ids", {"equal_ids": "sum", "row_ids": torch.arange(9), "col_ids": torch.arange(9)}),
    "info_nce debias": ("debias", {"debias": 0.1}),
    "nt_xent debias": ("debias", {"debias": 0.1}),
    "nt_xent hardness": ("hardness", {"hardness": 0.1}),
    "siglip positive_weight": (
        "positive_weight", {"positive_weight": "mean", "row_ids": torch.arange(9), "col_ids": torch.arange(9)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_COVERED)
def test_options_that_are_not_covered(case: str) -> None:
    option, options = NOT_COVERED[case]
    x, y, s = leaves()
    with pytest.raises(NotImplementedError, match=f"^{option}: got it together with groups"):
        LOSSES[case.split()[0]](x, y, s, lengths=LENGTHS, **options)


def test_bad_shapes() -> None:
    x, y, s = leaves(torch.tensor([12]))
    with pytest.raises(ValueError, match=r"text_features: got shape .*, expected 3 dimensions, the first of size 3"):
        fc.clip_loss(x.view(3, 4, D), y.view(4, 3, D), s)
    with pytest.raises(ValueError, match=r"text_features: got shape .*, expected 3 dimensions"):
        fc.clip_loss(x.view(3, 4, D), y, s)
    with pytest.raises(ValueError, match=r"image_features: got shape .* with lengths"):
        fc.clip_loss(x.view(3, 4, D), y.view(3, 4, D), s, lengths=torch.tensor([4, 4, 4]))
    with pytest.raises(ValueError, match="targets: got values"):
        fc.info_nce_loss(x, y, lengths=torch.tensor([4, 8]), targets=torch.full((12,), 4))
    with pytest.raises(ValueError, match="targets: got None"):
        fc.contrastive_stats(x.view(3, 4, D), y[:6].view(3, 2, D))


def test_over_processes() -> None:
    """Groups of rows and a group of processes: one or the other."""
    x, _, _ = leaves()
    call: Any = SimpleNamespace(spread=True)
    for lengths, features in ((LENGTHS, x), (None, x.view(3, 3, D))):
        with pytest.raises(NotImplementedError, match="lengths: got groups of rows with group="):
            grouped(call, lengths, {"x": features})


def test_own_negatives(backend: str) -> None:
    """Each query's own negatives have no group: they are its own."""
    x, y, s = leaves(dtype=torch.float32)
    own = torch.randn(9, 2, D)
    ours = fc.info_nce_loss(x, y, logit_scale=s, lengths=LENGTHS, negatives=own, reduction="none", backend=backend)
    each = [
        fc.info_nce_loss(a, b, logit_scale=s, negatives=c, reduction="none", backend="reference")
        for a, b, c in _split(x, y, own)
    ]
    torch.testing.assert_close(ours, torch.cat(each), rtol=1e-5, atol=1e-6)


def test_takes_groups() -> None:
    """C++ takes all groups together; a backend that does not say so gets one at a time."""
    spec = StatsSpec(torch.tensor(1.0), row_lengths=LENGTHS, col_lengths=LENGTHS)
    assert BACKENDS["cpp"].takes_groups(spec)
    assert not BACKENDS["reference"].takes_groups(spec)


@pytest.mark.parametrize("module", [fc.ClipLoss(), fc.InfoNCELoss(), fc.SigLipLoss(), fc.NTXentLoss(normalize=True)])
def test_modules(module: torch.nn.Module) -> None:
    x, y, s = leaves()
    functions = {"ClipLoss": "clip", "InfoNCELoss": "info_nce", "SigLipLoss": "siglip", "NTXentLoss": "nt_xent"}
    name = functions[type(module).__name__]
    if name == "siglip":
        ours = module(x, y, s, s / -2, lengths=LENGTHS)
    else:
        ours = module(x, y, logit_scale=s, lengths=LENGTHS)
    torch.testing.assert_close(ours, LOSSES[name](x, y, s, lengths=LENGTHS))
