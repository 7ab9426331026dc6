"""``monitor``: its warnings, by planted faults in real trainings, and the modes in which losses are called."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import monitored
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from monitored import LOSSES, D, Loss, N, logged, no_warning, unit
from torch import Tensor, nn

import fused_contrastive as fc
from fused_contrastive.evaluation import live


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
    assert told[0].filename == monitored.__file__  # the caller's line, not this package's
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


def test_groups_are_counted_and_not_measured() -> None:
    x, y = (F.normalize(torch.randn(3, 4, 6), dim=2) for _ in range(2))
    ids, lengths = torch.arange(4).repeat(3).view(3, 4), torch.tensor([5, 7])
    flat = x.flatten(0, 1), y.flatten(0, 1)
    with no_warning(), fc.monitor() as m:
        fc.clip_loss(x, y, 10.0, row_ids=ids.flatten(), col_ids=ids.flatten())
        fc.clip_loss(*flat, 10.0, lengths=lengths)
        fc.info_nce_loss(x, y)
        fc.siglip_loss(x, y, 10.0, -1.0)
        fc.nt_xent_loss(x, y, normalize=False)
        fc.supcon_loss(torch.stack((x, y), dim=2), ids.flatten())
        fc.supcon_loss(flat[0], ids.flatten(), lengths=lengths)
    assert (m.calls, m.checked, m.measures) == (7, 0, {})


def test_the_loss_of_prefixes_is_a_sum_and_not_stuck() -> None:
    x, y = (F.normalize(torch.randn(N, 64), dim=1) for _ in range(2))
    with no_warning(), fc.monitor(every=1) as m:
        for _ in range(12):
            fc.clip_loss(x, y, 1.0, dims=(32,), dim_weights=(1.0,))
    assert m.measures["clip_loss"]["clip_loss/temperature"] == 1


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
