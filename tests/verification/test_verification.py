"""``verify`` and ``verify_against_reference`` accept correct results and notice wrong ones."""

from __future__ import annotations

import warnings
from pathlib import Path

import processes
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_contrastive as fc
from fused_contrastive.backends import cpp
from fused_contrastive.core.spec import Gradients, Ranks
from fused_contrastive.ops import dispatch


def features(n: int = 30, d: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    return F.normalize(torch.randn(n, d), dim=1).to(dtype)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the C++ backend's gradients 1% too large."""
    right_backward, right_loss = cpp.BACKEND.stats_backward, cpp.BACKEND.row_loss

    def wrong_backward(*args: object, **options: object) -> Gradients:
        return Gradients(*(None if g is None else 1.01 * g for g in right_backward(*args, **options)))

    def wrong_loss(*args: object) -> tuple[Tensor, Ranks | None]:
        loss, ranks = right_loss(*args)
        return 1.01 * loss - 0.01 * loss.detach(), ranks

    monkeypatch.setattr(cpp.BACKEND, "stats_backward", wrong_backward)
    monkeypatch.setattr(cpp.BACKEND, "row_loss", wrong_loss)


LOSSES = {
    "clip": lambda x, y, s: fc.clip_loss(x, y, s),
    "module": lambda x, y, s: fc.SigLipLoss()(x, y, s, -1.0),
    "two losses": lambda x, y, s: {
        "a": fc.nt_xent_loss(x, y, normalize=True),
        "b": fc.info_nce_loss(x, y, logit_scale=s),
    },
    "late interaction": lambda x, y, s: s * fc.max_sim(x[None], y[None]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_right_ones_hold(loss: str, dtype: torch.dtype) -> None:
    found = fc.verify(LOSSES[loss], features(dtype=dtype), features(dtype=dtype), torch.tensor(20.0))
    assert found.held, str(found)
    assert "gradient of argument 0" in str(found)


def test_a_wrong_gradient_is_noticed(broken: None) -> None:
    found = fc.verify(LOSSES["clip"], features(), features(), torch.tensor(20.0))
    assert not found.held
    assert "gradient" in found.worst.quantity
    assert "BREACH" in str(found)


def test_lists_names_and_ids_are_passed_on() -> None:
    x = features()
    found = fc.verify(fc.nt_xent_loss, x, features(), views=[features()], temperature=torch.tensor(0.2))
    assert found.held
    assert {"gradient of views[0]", "gradient of temperature"} <= {d.quantity for d in found.deviations}
    assert fc.verify(fc.supcon_loss, x, torch.arange(30) % 4).held


def test_what_cannot_be_verified() -> None:
    with pytest.raises(ValueError, match="calls none of fused_contrastive's losses"):
        fc.verify(lambda x: (x @ x.T).sum(), features())
    with pytest.raises(ValueError, match="loss_fn: got NoneType"):
        fc.verify(lambda x: None, features())


def train(steps: int) -> list[float]:
    torch.manual_seed(0)
    model, losses = torch.nn.Linear(8, 8), []
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        x, y = F.normalize(model(features()), dim=1), features()
        loss = fc.clip_loss(x, y, 10.0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def test_a_training_is_checked_and_left_alone() -> None:
    expected = train(7)
    with warnings.catch_warnings(), fc.verify_against_reference(every=3) as check:
        warnings.simplefilter("error")
        assert train(7) == expected
    assert (check.calls, check.checked, check.breaches) == (7, 3, 0)
    assert "7 calls, 3 checked, 0 breaches" in str(check)
    train(1)
    assert check.calls == 7


def test_a_breach_in_a_training(broken: None, tmp_path: Path) -> None:
    with (
        pytest.warns(UserWarning, match="clip_loss, call 1, is not what the reference computes") as told,
        fc.verify_against_reference(save=str(tmp_path)) as check,
    ):
        train(1)
    assert told[0].filename == __file__  # the caller's line, not this package's
    assert check.breaches == 1
    with pytest.raises(RuntimeError, match=r"gradient of argument 0[^\n]*BREACH"):  # noqa: SIM117
        with fc.verify_against_reference(on_breach="raise"):
            train(1)
    train(1)  # nothing is checked any more
    result = processes.run(f"import runpy; runpy.run_path({str(tmp_path / 'call_1.py')!r}, run_name='__main__')")
    assert result.returncode == 0, result.stderr
    assert "gradient of argument 0" in result.stdout
    assert "BREACH" not in result.stdout  # in a process whose backend is not broken


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="every: got 0"):
        fc.verify_against_reference(every=0)
    with pytest.raises(ValueError, match="on_breach: got 'stop'"):
        fc.verify_against_reference(on_breach="stop")


def test_what_draws_random_numbers_draws_the_same_each_time() -> None:
    """The caller's random stream continues as if nothing had been verified."""
    x, y = torch.randn(40, 16), torch.randn(40, 16)

    def dropped(x: Tensor, y: Tensor) -> Tensor:
        return fc.clip_loss(F.dropout(x, 0.5), y, 2.0)

    state = torch.get_rng_state()
    found = fc.verify(dropped, x, y)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.held
    assert all(deviation.eager_error < 1e-3 for deviation in found.deviations), found


def test_what_is_right_and_not_finite() -> None:
    """A NaN where the reference has NaN holds; errors beside a NaN or an infinity are still noticed."""
    x, y = torch.randn(4, 8), torch.randn(4, 8)
    y[0] = torch.nan
    assert fc.verify(lambda x, y: fc.siglip_loss(x, y, 1.0, reduction="none"), y, x).held

    def off(x: Tensor, y: Tensor) -> Tensor:
        losses = fc.clip_loss(x, y, 1.0, decoupled=True, reduction="none")
        wrong = 0.0 if dispatch.forced() else 0.01
        return torch.cat((losses + wrong, fc.clip_loss(x[:1], y[:1], 1.0, decoupled=True)[None]))  # the last is -inf

    assert not fc.verify(off, x, torch.randn(4, 8)).held
