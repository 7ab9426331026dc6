"""``monitor``: its measures against formulas on whole matrices; its warnings, by planted faults in real trainings."""

from __future__ import annotations

import asyncio
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fused_contrastive as fc
from fused_contrastive.core import observing
from fused_contrastive.evaluation import live

N, D = 192, 16  # of the trainings
Loss = Callable[[Tensor, Tensor, Any], Tensor]
LOSSES: dict[str, Loss] = {
    "clip_loss": lambda x, y, s: fc.clip_loss(x, y, s),
    "info_nce_loss": lambda x, y, s: fc.info_nce_loss(x, y, logit_scale=s),
    "nt_xent_loss": lambda x, y, s: fc.nt_xent_loss(x, y, logit_scale=s, normalize=False),
    "siglip_loss": lambda x, y, s: fc.siglip_loss(x, y, s, -math.log(N)),
    "supcon_loss": lambda x, y, s: fc.supcon_loss(torch.stack((x, y), 1), torch.arange(len(x)), logit_scale=s),
}


@pytest.fixture(autouse=True)
def nothing_left_over() -> Iterator[None]:
    yield
    assert not observing._of_eager.anywhere
    assert not observing._observers.anywhere


@contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class Towers(nn.Module):
    """Two linear encoders, and a scale that is learned by its logarithm."""

    def __init__(self, scale: float = 10.0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, 64, bias=False), nn.Linear(D, 64)
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return F.normalize(self.first(x), dim=1), F.normalize(self.second(y), dim=1), self.log_scale.exp()


def as_they_are(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x, y


def train(
    loss: Loss, steps: int, towers: Towers, spoil: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = as_they_are
) -> list[float]:
    """The losses of a training on pairs of noisy views."""
    optimiser = torch.optim.Adam([p for p in towers.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(steps):
        x = torch.randn(N, D)
        value = loss(*towers(*spoil(x, x + 0.3 * torch.randn(N, D))))
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        losses.append(value.item())
    return losses


# Faults: a change of the inputs, and one of the encoders. Each must be found, and no other.


def some_nan(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x[3, 2] = torch.nan
    return x, y


def some_empty(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x[5:9] = 0
    return x, y


def shuffled(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x, y[torch.randperm(N)]


def every_item_twice(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x[: N // 2].repeat(2, 1), y[: N // 2].repeat(2, 1)


def blind(towers: Towers) -> None:
    for encoder in (towers.first, towers.second):
        encoder.weight = nn.Parameter(torch.ones(64, D) * 1e-9, requires_grad=False)
        encoder.bias = nn.Parameter(torch.ones(64))


def fixed_scale(scale: float) -> Callable[[Towers], None]:
    def change(towers: Towers) -> None:
        towers.log_scale = nn.Parameter(torch.tensor(scale).log(), requires_grad=False)

    return change


def untouched(towers: Towers) -> None:
    pass


FAULTS: dict[str, tuple[str, Any, Any, str]] = {
    "NaN in the data": ("nan", some_nan, untouched, r"1 of \d+ rows have NaN .*set_detect_anomaly"),
    "empty inputs": ("zero", some_empty, untouched, r"4 of \d+ rows are zeros, .* padding"),
    "encoders that ignore inputs": (
        "collapse",
        as_they_are,
        blind,
        r"all rows are alike .* cannot fall below .*(log N|logits) = \d",
    ),
    "shuffled pairs": ("stuck", shuffled, fixed_scale(1.0), r"loss stuck at (log N|the loss of equal logits) = \d"),
    "repeated items": (
        "duplicates",
        every_item_twice,
        untouched,
        r"100.0% of the rows .* cannot fall below (0.69|1.38)",
    ),
    "scale too large": ("scale", as_they_are, fixed_scale(300.0), r"logit_scale: got 300, expected at most [12]00 "),
    "scale too small": (
        "scale",
        as_they_are,
        fixed_scale(0.5),
        r"logit_scale: got 0.5 with features of norm 1, .* 100",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", LOSSES)
def test_a_planted_fault_is_warned_of_once(name: str, fault: str) -> None:
    cause, spoil, change, text = FAULTS[fault]
    towers = Towers()
    change(towers)
    with pytest.warns(UserWarning, match=text) as told, fc.monitor(every=2) as m:
        train(LOSSES[name], 24, towers, spoil)
    assert set(m.warnings) == {(name, cause)}
    assert [str(each.message) for each in told] == [*m.warnings.values()]
    assert told[0].filename == __file__  # the caller's line, not this package's
    assert next(iter(m.warnings.values())).startswith(f"{name}, call ")
    assert (m.calls, m.checked) == (24, 12)


@pytest.mark.parametrize("options", [{"logit_scale": -10.0}, {"logit_scale": torch.nan}, {"logit_scale": 0.0}], ids=str)
def test_scales_that_are_none(options: dict[str, Any]) -> None:
    x = torch.randn(N, D)  # whatever the norms
    with pytest.warns(UserWarning, match=r"logit_scale: got (-10|nan|0), expected a finite number above 0"):
        assert logged(lambda: fc.clip_loss(x, x, **options), silent=False)


def test_a_scale_says_little_of_features_that_are_not_normalised() -> None:
    x = 3 * F.normalize(torch.randn(N, D), dim=1)
    with no_warning(), fc.monitor():
        fc.clip_loss(x, x, 0.2)
    with pytest.warns(UserWarning, match="1 / temperature: got 0.2 with features of norm 1"), fc.monitor():
        fc.clip_loss(x, x, temperature=5.0, normalize=True)


@pytest.mark.parametrize("name", LOSSES)
def test_a_healthy_training_is_silent_and_left_alone(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    results, seed = [], torch.initial_seed()
    with no_warning():
        for block in (fc.monitor(every=10), None):
            torch.manual_seed(seed)
            towers = Towers()
            if block is not None:
                with block as m:
                    results.append(train(LOSSES[name], 500, towers))
            else:
                results.append(train(LOSSES[name], 60, towers))
    assert results[0][:60] == results[1]  # to the bit
    assert results[0][-1] < results[0][0] / 2
    assert (m.calls, m.checked, m.warnings) == (500, 50, {})
    assert m.measures[name][f"{name}/top1"] > 0.9
    assert capsys.readouterr() == ("", "")


def test_an_initial_collapse_or_a_slow_start_is_no_fault() -> None:
    """Collapse must be seen in two checks in a row, a loss of log N in ten."""
    x, y = (F.normalize(torch.randn(N, 64), dim=1) for _ in range(2))
    one = F.normalize(torch.ones(N, 64), dim=1)
    with no_warning(), fc.monitor(every=1) as m:
        for _ in range(4):
            fc.clip_loss(one, one, 10.0)
            fc.clip_loss(x, x, 10.0)
        for _ in range(3):
            for _ in range(9):
                fc.clip_loss(x, y, 1.0)
            fc.clip_loss(x, x, 10.0)
    assert m.checked == 38
    with fc.monitor(every=1):
        fc.clip_loss(one, one, 10.0)
        with pytest.warns(UserWarning, match="mean cosine"):
            fc.clip_loss(one, one, 10.0)


def logged(loss: Callable[[], Tensor], silent: bool = True) -> dict[str, float]:
    """What the monitor measures of one call."""
    found: list[dict[str, float]] = []
    with warnings.catch_warnings(), fc.monitor(log=found.append) as m:
        if silent:
            warnings.simplefilter("ignore")
        value = loss()
    (only,) = found
    assert only == next(iter(m.measures.values()))
    assert only[f"{next(iter(m.measures))}/loss"] == pytest.approx(value.double().mean().item(), rel=1e-6, nan_ok=True)
    return {key.partition("/")[2]: number for key, number in only.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_clip_has_the_measures_of_diagnose(dtype: torch.dtype, normalize: bool) -> None:
    x, y = (F.normalize(torch.randn(90, 8), dim=1).to(dtype) for _ in range(2))
    y = F.normalize(x + y, dim=1)
    expected = fc.diagnose(*(F.normalize(t.double(), dim=1) if normalize else t for t in (x, y)), 20.0)
    found = logged(lambda: fc.clip_loss((2 if normalize else 1) * x, y, torch.tensor(20.0), normalize=normalize))
    assert found["temperature"] == pytest.approx(0.05)
    of_diagnosis = {
        "top1": (expected.top1_x_to_y + expected.top1_y_to_x) / 2,
        "hardest_share": expected.hardest_share,
        "alignment": expected.alignment,
        "uniformity": (expected.uniformity_x + expected.uniformity_y) / 2,
    }
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    assert {key: found[key] for key in of_diagnosis} == pytest.approx(of_diagnosis, rel=tolerance, abs=tolerance)


def formulas(s: Tensor, positive: Tensor, negative: Tensor, unit_x: Tensor, unit_y: Tensor) -> dict[str, float]:
    """Each measure of the rows that have a positive and a negative, row by row, in float64."""
    rows = []
    total = count = 0.0
    for i in range(len(s)):
        p, n = positive[i].nonzero().flatten(), negative[i].nonzero().flatten()
        if not len(p) or not len(n):
            continue
        weights = s[i, n].softmax(0).sort(descending=True).values
        own = unit_y[p[0]]
        inside = n[n < len(unit_y)]
        distances = (own - unit_y[inside]).square().sum(1)
        total, count = total + (-2 * distances).exp().sum().item(), count + len(inside)
        rows.append(
            [
                float(s[i, p].max() > s[i, n].max()), weights[:10].sum().item(),
                (unit_x[i] - own).square().sum().item(), float((distances < 1e-8).any()),
                math.log(1 + (distances < 1e-8).sum()) if len(p) == 1 else 0.0,
            ]
        )  # fmt: skip
    means = torch.tensor(rows, dtype=torch.float64).mean(0).tolist()
    keys = ("top1", "hardest_share", "alignment", "duplicates", "duplicates_floor")
    return {**dict(zip(keys, means, strict=True)), "uniformity": math.log(total / count)}


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def eye(m: int, n: int) -> Tensor:
    return torch.eye(m, n, dtype=torch.bool)


SEEDS = st.integers(0, 2**31)


@settings(max_examples=12, deadline=None)
@given(seed=SEEDS, n=st.integers(4, 40), equal=st.sampled_from(["exclude", "mean", "sum"]), ids=st.integers(1, 2))
def test_ids(seed: int, n: int, equal: Any, ids: int) -> None:
    torch.manual_seed(seed)
    x, y = unit(n, 6), unit(n, 6)
    y[1] = y[3]
    of = torch.randint(0, 5, (2, n, ids)).squeeze(2)
    related = (of[0].reshape(n, 1, -1) == of[1].reshape(1, n, -1)).any(2)
    positive = eye(n, n) | related if equal != "exclude" else eye(n, n)
    negative = ~(eye(n, n) | related)
    found = logged(lambda: fc.info_nce_loss(x, y, logit_scale=9.0, row_ids=of[0], col_ids=of[1], equal_ids=equal))
    if not (negative.any(1) & positive.any(1)).any():
        assert math.isnan(found["top1"])
        return
    expected = formulas(9 * x @ y.T, positive, negative, x, y)
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-6, abs=1e-9)


@settings(max_examples=12, deadline=None)
@given(seed=SEEDS, own=st.booleans(), bias=st.booleans(), targets=st.booleans(), k=st.integers(1, 14))
def test_columns_of_info_nce(seed: int, own: bool, bias: bool, targets: bool, k: int) -> None:
    torch.manual_seed(seed)
    m, n = 20, 26
    x, y = unit(m, 6), unit(n, 6)
    negatives = unit(m, k, 6) if own else unit(k, 6)
    given: dict[str, Any] = {"negatives": negatives, "temperature": torch.tensor(0.1)}
    s, columns = 10 * x @ y.T, y
    positive, negative = eye(m, n), ~eye(m, n)
    if targets:
        given["targets"] = torch.randint(0, n, (m,))
        positive = given["targets"][:, None] == torch.arange(n)
        negative = ~positive
    if bias:
        given["col_bias"] = torch.randn(n if own else n + k, dtype=torch.float64)
        given["col_bias"][n - 1] = -torch.inf
        s = s + given["col_bias"][:n]
        if targets:
            given["targets"].clamp_(max=n - 2)
            positive = given["targets"][:, None] == torch.arange(n)
        negative = ~positive & (given["col_bias"][:n] > -torch.inf)
    if own:
        given["negatives_mask"] = torch.rand(m, k) < 0.7
        negatives = negatives.masked_fill(~given["negatives_mask"][..., None], torch.nan)
        given["negatives"] = negatives
        more = 10 * (x[:, None] * negatives).sum(2)
        there = given["negatives_mask"]
    else:
        more, there = 10 * x @ negatives.T, torch.ones(m, k, dtype=torch.bool)
        more = more + given["col_bias"][n:] if bias else more
        columns = torch.cat((y, negatives))
    s = torch.cat((s, more), 1)
    there = there & (s[:, n:] > -torch.inf)
    positive = torch.cat((positive, torch.zeros(m, k, dtype=torch.bool)), 1)
    expected = formulas(s, positive, torch.cat((negative, there), 1), x, columns)
    found = logged(lambda: fc.info_nce_loss(x, y, **given))
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-6, abs=1e-9)


@settings(max_examples=8, deadline=None)
@given(seed=SEEDS, n=st.integers(3, 30), views=st.integers(2, 3), scale=st.floats(0.5, 30))
def test_one_set_of_features(seed: int, n: int, views: int, scale: float) -> None:
    torch.manual_seed(seed)
    z, labels = unit(n, views, 6), torch.randint(0, 4, (n,))
    ids = labels.repeat_interleave(views)
    flat = z.flatten(0, 1)
    itself, related = eye(n * views, n * views), ids[:, None] == ids
    expected = formulas(scale * flat @ flat.T, related & ~itself, ~related, flat, flat)
    found = logged(lambda: fc.supcon_loss(z, labels, logit_scale=scale))
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-6, abs=1e-9)

    ids = torch.arange(n).repeat(views)
    flat = z.transpose(0, 1).flatten(0, 1)
    expected = formulas(scale * flat @ flat.T, (ids[:, None] == ids) & ~itself, ids[:, None] != ids, flat, flat)
    a, b, *more = (3 * view for view in z.unbind(1))  # normalised by the loss
    found = logged(lambda: fc.nt_xent_loss(a, b, 1 / scale, views=more, normalize=True))
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_siglip_weighs_negatives_by_their_sigmoids() -> None:
    x, y = unit(30, 6), unit(30, 6)
    s = 10 * x @ y.T - 2
    expected = formulas(F.logsigmoid(s), eye(30, 30), ~eye(30, 30), x, y)
    found = logged(lambda: fc.siglip_loss(x, y, 10.0, torch.tensor(-2.0)))
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", ["clip_loss", "siglip_loss"])
@pytest.mark.parametrize("copies", [2, 3])
def test_the_floor_is_the_least_loss(name: str, copies: int) -> None:
    """With each item ``copies`` times and all other logits far below, the best logit of the copies gives the floor."""
    x = torch.eye(20).repeat(copies, 1)
    found = logged(lambda: LOSSES[name](x, x, 10.0))
    best = (1000 * x @ x.T).softmax(1).diagonal().log().neg().mean().item()
    if name == "siglip_loss":
        logits = torch.linspace(-3, 3, 60001, dtype=torch.float64)
        best = (F.softplus(-logits) + (copies - 1) * F.softplus(logits)).min().item()
    assert found["duplicates_floor"] == pytest.approx(best, rel=1e-6)
    assert found["duplicates"] == 1


@pytest.mark.parametrize(
    "options",
    [
        {"row_ids": "ids", "col_ids": "ids"}, {"row_ids": "ids", "col_ids": "ids", "equal_ids": "mean"},
        {"guide": "guide"}, {"relative_margin": 0.1}, {"decoupled": True}, {"hardness": 0.5}, {"debias": 0.1},
    ],
    ids=str,
)  # fmt: skip
def test_no_floor_where_duplicates_are_dealt_with(options: dict[str, Any]) -> None:
    x = unit(10, 8).repeat(2, 1)
    given = {"ids": torch.arange(10).repeat(2), "guide": (x, x)}
    with no_warning(), fc.monitor() as m:
        fc.clip_loss(x, x, 10.0, **{key: given.get(str(value), value) for key, value in options.items()})
    assert m.measures["clip_loss"]["clip_loss/duplicates_floor"] == 0


def test_large_batches_are_sampled_block_by_block() -> None:
    """Only rows 200 to 219 are duplicates: in the second block of 128 rows, which the second check measures."""
    x = F.normalize(torch.randn(600, 32), dim=1)
    x[200:210] = x[210:220]
    found: list[dict[str, float]] = []
    with no_warning(), fc.monitor(every=3, log=found.append):
        for _ in range(3):
            fc.clip_loss(x, x, 10.0)
        with pytest.warns(UserWarning, match="call 4: 15.6% of the rows"):
            fc.clip_loss(x, x, 10.0)
        fc.clip_loss(x, x, 10.0)
    assert [each["clip_loss/duplicates"] for each in found] == [0, 20 / 128]


def test_at_most_so_many_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "PAIRS", 250)
    x, y = unit(100, 8), unit(100, 8)
    found = logged(lambda: fc.clip_loss(x, y, 10.0))  # 2 rows in each direction
    s = x @ y.T
    top1 = [float(s[i, i] > s[i][torch.arange(100) != i].max()) for i in range(2)]
    top1 += [float(s[i, i] > s[:, i][torch.arange(100) != i].max()) for i in range(2)]
    assert found["top1"] == sum(top1) / 4


def test_losses_are_counted_apart_and_tokens_not_measured() -> None:
    x, y = unit(12, 6), unit(12, 6)
    tokens = torch.randn(6, 3, 4)
    keys: list[set[str]] = []
    with (
        no_warning(),
        fc.monitor(every=1, log=lambda found: keys.append({key.partition("/")[0] for key in found})) as m,
    ):
        for _ in range(3):
            fc.clip_loss(x, y, 10.0)
            fc.SigLipLoss()(x, y, 10.0, -3.0)
        fc.filip_loss(tokens, tokens, 1.0)
        fc.x_clip_loss(tokens, tokens, 1.0, use_all_token_embeds=True)
        fc.x_clip_loss(F.normalize(tokens.transpose(0, 1), dim=2), F.normalize(tokens[:, 0], dim=1), 2.0)
        fc.distillation_loss(x, torch.cat((y, y[:3])), 2.0, x, y.repeat(2, 1)[:15], 3.0, symmetric=False)
        fc.distillation_loss(x, y, 2.0, x, y, 3.0)
        fc.clip_loss(x[:1], y[:1], 10.0)  # a pair alone has no negatives
    assert (m.calls, m.checked) == (12, 10)
    others = [{"x_clip_loss"}, {"distillation_loss"}, {"distillation_loss"}, {"clip_loss"}]
    assert keys == [{"clip_loss"}, {"siglip_loss"}] * 3 + others
    assert "12 calls, 10 measured, 0 warnings" in str(m)
    assert "siglip_loss: loss " in str(m)


def test_reductions_and_modes() -> None:
    x, y = (F.normalize(torch.randn(20, 6), dim=1) for _ in range(2))
    loss = fc.clip_loss(x, y, 10.0).item()
    for reduction in ("sum", "none"):
        with no_warning(), fc.monitor() as m, torch.no_grad():
            fc.clip_loss(x, y, 10.0, reduction=reduction)
        assert m.measures["clip_loss"]["clip_loss/loss"] == pytest.approx(loss, rel=1e-6)
    expected = m.measures["clip_loss"]
    with no_warning(), fc.monitor() as m, torch.device("meta"):  # the default for new tensors
        fc.clip_loss(x, y, 10.0, reduction="none")
    assert m.measures["clip_loss"] == expected
    with no_warning(), fc.monitor() as m, torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        fc.clip_loss(x, y, 10.0)  # measured as it is given, and not rounded
    found = m.measures["clip_loss"]
    assert found == pytest.approx({**expected, "clip_loss/loss": found["clip_loss/loss"]}, rel=1e-6)
    with no_warning(), fc.monitor() as m:
        torch.func.grad(lambda x: fc.clip_loss(x, y, 10.0))(x)  # its tensors cannot be read
    assert (m.calls, m.checked) == (1, 0)


def test_compiled_losses() -> None:
    """They are left alone with fullgraph=True, observed with compiled=True, and a block that saw nothing says so."""
    torch._dynamo.reset()
    x, y = (F.normalize(torch.randn(20, 6), dim=1) for _ in range(2))

    whole = torch.compile(lambda x, y: fc.clip_loss(x, y, 10.0), fullgraph=True, backend="aot_eager")
    with pytest.warns(UserWarning, match=r"monitor: saw no call .* unless compiled=True"), fc.monitor() as m:
        expected = whole(x, y)
    assert m.calls == 0
    with no_warning(), fc.monitor(compiled=True, every=2) as m:
        broken = torch.compile(lambda x, y: fc.clip_loss(x, y, 10.0), backend="aot_eager")
        assert [broken(x, y).item() for _ in range(3)] == [pytest.approx(expected.item())] * 3
        with pytest.raises(torch._dynamo.exc.Unsupported, match="compile without fullgraph=True"):
            whole(x, y)
    assert (m.calls, m.checked) == (3, 2)
    with no_warning(), fc.monitor():
        whole(x, y)
        fc.clip_loss(x, y, 10.0)


@pytest.mark.parametrize("compiled", [False, True])
def test_beside_a_verification(compiled: bool) -> None:
    """Both observe every call, whichever is inside; the verification's own calls are not observed."""
    x, y = (F.normalize(torch.randn(20, 6), dim=1) for _ in range(2))
    for order in (1, -1):
        m, check = fc.monitor(compiled=compiled), fc.verify_against_reference(every=1)
        outer, inner = (m, check)[::order]
        with outer, inner:
            fc.clip_loss(x, y, 10.0)
            assert fc.verify(fc.clip_loss, x, y, 10.0).held
        assert (m.calls, check.calls, check.checked) == (1, 1, 1)


def test_blocks_that_are_entered_again_and_tasks() -> None:
    x, y = unit(12, 6), unit(12, 6)
    m = fc.monitor(every=2)
    for _ in range(2):
        with m:
            asyncio.run(asyncio.to_thread(fc.clip_loss, x, y, 10.0))
    fc.clip_loss(x, y, 10.0)
    assert (m.calls, m.checked) == (2, 1)
    with pytest.raises(RuntimeError, match="monitor: got an exit from a block that has been left already"):
        m.__exit__(None, None, None)
    with pytest.raises(ZeroDivisionError), no_warning(), fc.monitor():  # no word about calls that an error prevented
        raise ZeroDivisionError


def test_over_a_group() -> None:
    """Own rows are measured against own columns; the loss of equal logits is that of the columns of all processes."""
    x, y = unit(12, 6), unit(12, 6)
    expected = logged(lambda: fc.clip_loss(x, y, 10.0))
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        assert dist.group.WORLD is not None
        assert logged(lambda: fc.clip_loss(x, y, 10.0, group=dist.group.WORLD)) == pytest.approx(expected)
        assert logged(lambda: fc.clip_loss(x, y, 10.0, group=fc.GlobalBatch(), reduction="sum") / 12) == expected
    finally:
        dist.destroy_process_group()
    arguments = {"query": x, "key": y, "logit_scale": 10.0, "temperature": None, "equal_ids": "exclude"}
    call = live.described("info_nce_loss", arguments, 3)
    assert call is not None
    assert live.measured(call, torch.zeros(()), 0)[""]["equal_logits"] == pytest.approx(math.log(36))
    for other in ({"key": y[:7]}, {"targets": torch.arange(12)}, {"query": x[:0], "key": y[:0]}):
        assert live.described("info_nce_loss", {**arguments, **other}, 3) is None


def test_bad_options() -> None:
    for every in (0, -3):
        with pytest.raises(ValueError, match=f"every: got {every}, expected an integer of at least 1"):
            fc.monitor(every=every)
    with pytest.raises(TypeError, match=r"every: got 2.5, expected an integer of at least 1"):
        fc.monitor(every=2.5)
    with pytest.raises(TypeError, match="log: got 'wandb', expected a function of a dict of floats, or None"):
        fc.monitor(log="wandb")
    with pytest.raises(TypeError, match="compiled: got 1, expected True or False"):
        fc.monitor(compiled=1)
