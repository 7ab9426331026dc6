"""open_clip's ClipLoss, CoCaLoss, DistillClipLoss and SigLipLoss."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from against import DTYPES, assert_close_results, assert_same, features
from torch import Tensor

library = pytest.importorskip("open_clip.loss", reason="open_clip is not installed: make conformance")

import open_clip.factory  # noqa: E402

from fused_contrastive.adapters import open_clip as ours  # noqa: E402

SCALE = 25.0


def pair(theirs: type, adapted: type, backend: str, **options: object) -> tuple[torch.nn.Module, torch.nn.Module]:
    loss = adapted(**options)
    loss.backend = backend
    return theirs(**options), loss


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n", [1, 7, 40])
def test_clip_loss(n: int, bias: bool, dtype: torch.dtype, backend: str) -> None:
    theirs, adapted = pair(library.ClipLoss, ours.ClipLoss, backend, cache_labels=True)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {"image_features": features(n, 16, dtype=dtype), "text_features": features(n, 16, dtype=dtype)}
    leaves["logit_scale"] = torch.tensor(SCALE, dtype=wide)
    if bias:
        leaves["logit_bias"] = torch.tensor(-3.0, dtype=wide)
    assert_same(theirs, adapted, leaves, SCALE)


@pytest.mark.parametrize("scale", [SCALE, torch.tensor(SCALE), torch.tensor([SCALE])], ids=["float", "0-d", "FSDP2"])
def test_scales_and_output_dict(scale: float | Tensor, backend: str) -> None:
    theirs, adapted = pair(library.ClipLoss, ours.ClipLoss, backend)
    x, y = features(9, 8), features(9, 8)
    for output_dict in (False, True):
        assert_close_results(
            theirs(x, y, scale, output_dict=output_dict), adapted(x, y, scale, output_dict=output_dict)
        )
    theirs, adapted = pair(library.SigLipLoss, ours.SigLipLoss, backend)
    for output_dict in (False, True):
        assert_close_results(
            theirs(x, y, scale, -9.0, output_dict=output_dict), adapted(x, y, scale, -9.0, output_dict=output_dict)
        )


@pytest.mark.may_not_run  # weight 0
@pytest.mark.parametrize("weights", [(2.0, 1.0), (1.0, 0.0), (0.0, 1.0)], ids=str)
@pytest.mark.parametrize("output_dict", [False, True])
def test_coca_loss(weights: tuple[float, float], output_dict: bool, backend: str) -> None:
    options = {"caption_loss_weight": weights[0], "clip_loss_weight": weights[1], "pad_id": 0}
    theirs, adapted = pair(library.CoCaLoss, ours.CoCaLoss, backend, **options)
    x, y, logits, labels = features(6, 8), features(6, 8), torch.randn(6, 5, 11), torch.randint(11, (6, 5))
    arguments = (x, y, logits, labels, torch.tensor(SCALE), output_dict)
    assert_close_results(theirs(*arguments), adapted(*arguments))

    def total(loss: torch.nn.Module):  # type: ignore[no-untyped-def]
        return lambda x, y, scale: sum(loss(x, y, logits.to(x.dtype), labels, scale))

    if weights[1]:
        assert_same(total(theirs), total(adapted), {"x": x, "y": y, "scale": torch.tensor(SCALE)}, SCALE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 1 << 24], ids="{}_rows".format)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_distill_clip_loss(
    frozen: bool, rows: int, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher is without or with gradients; its logits are read in chunks of several sizes."""
    n = 20
    monkeypatch.setattr(ours, "TEACHER_LOGITS", rows * n)
    theirs, adapted = pair(library.DistillClipLoss, ours.DistillClipLoss, backend)
    names = ("image_features", "text_features", "dist_image_features", "dist_text_features")
    leaves = {name: features(n, 24 if "dist" in name else 16, dtype=dtype) for name in names}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves |= {"logit_scale": torch.tensor(SCALE, dtype=wide), "dist_logit_scale": torch.tensor(10.0, dtype=wide)}
    teacher = {name: leaves.pop(name) for name in list(leaves) if name.startswith("dist") and frozen}

    def term(loss: torch.nn.Module, which: int):  # type: ignore[no-untyped-def]
        def run(**leaves: Tensor) -> Tensor:
            wide = leaves["image_features"].dtype == torch.float64
            return loss(**leaves, **{name: t.double() if wide else t for name, t in teacher.items()})[which]

        return run

    for which in (0, 1):
        assert_same(term(theirs, which), term(adapted, which), leaves, SCALE)
    leaves |= teacher
    assert theirs(**leaves, output_dict=True).keys() == adapted(**leaves, output_dict=True).keys()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [None, -10.0])
def test_siglip_loss(bias: float | None, dtype: torch.dtype, backend: str) -> None:
    theirs, adapted = pair(library.SigLipLoss, ours.SigLipLoss, backend)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {"image_features": features(30, 16, dtype=dtype), "text_features": features(30, 16, dtype=dtype)}
    leaves["logit_scale"] = torch.tensor(SCALE, dtype=wide)
    if bias is not None:
        leaves["logit_bias"] = torch.tensor(bias, dtype=wide)
    assert_same(
        lambda logit_bias=None, **a: theirs(**a, logit_bias=logit_bias),
        lambda logit_bias=None, **a: adapted(**a, logit_bias=logit_bias),
        leaves,
        SCALE * 30,  # a row's loss is a sum over the columns
    )


def test_a_bias_that_is_nan_is_seen() -> None:
    x, y = features(5, 8), features(5, 8)
    assert ours.ClipLoss()(x, y, 10.0, torch.tensor(torch.nan)).isnan()
    with pytest.raises(TypeError, match="logit_bias: got str"):
        ours.ClipLoss()(x, y, 10.0, "3")


def test_patches_nest_in_any_order_and_reach_modules_imported_later() -> None:
    first, second = ours.patch_open_clip(), ours.patch_open_clip()
    first.undo()
    assert library.ClipLoss is ours.ClipLoss
    later = sys.modules["open_clip.later"] = types.ModuleType("open_clip.later")
    later.ClipLoss = library.ClipLoss
    second.undo()
    second.undo()
    del sys.modules["open_clip.later"]
    assert library.ClipLoss is not ours.ClipLoss
    assert later.ClipLoss is library.ClipLoss


def test_an_overridden_hook_is_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"Mine\.get_logits: overridden"):

        class Mine(ours.ClipLoss):
            def get_logits(self, *args: object) -> None: ...


def test_what_does_not_fit_is_named_as_it_was_passed() -> None:
    x, loss = features(4, 8), ours.DistillClipLoss()
    for changes, message in (
        ({"text_features": features(3, 8)}, "text_features: got 3 rows, expected 4, as many as image_features"),
        ({"dist_image_features": features(3, 8)}, "dist_image_features: got 3 rows, expected 4"),
        ({"dist_text_features": features(4, 6)}, "dist_text_features: got D = 6, expected 8, the D of dist_image_feat"),
        ({"dist_text_features": x.double()}, "dist_text_features: got dtype torch.float64, expected torch.float32"),
        ({"dist_logit_scale": "9"}, "dist_logit_scale: got str"),
    ):
        names = ("image_features", "text_features", "dist_image_features", "dist_text_features")
        with pytest.raises((TypeError, ValueError), match=message):
            loss(**(dict.fromkeys(names, x) | {"logit_scale": 9.0, "dist_logit_scale": 9.0} | changes))
    with pytest.raises(NotImplementedError, match="NeighbourExchange: a class of open_clip that is not covered"):
        ours.NeighbourExchange  # noqa: B018


def test_horovod_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="use_horovod: got True"):
        ours.ClipLoss(use_horovod=True)


def test_patch_reaches_the_factory_and_undoes() -> None:
    class Arguments:
        distill, model, siglip, local_loss, gather_with_grad, horovod = False, "ViT-B-32", False, False, False, False
        rank, world_size, loss_dist_impl = 0, 1, None
        coca_caption_loss_weight, coca_contrastive_loss_weight = 2.0, 1.0

    kinds = [({}, "ClipLoss"), ({"siglip": True}, "SigLipLoss"), ({"distill": True}, "DistillClipLoss")]
    kinds.append(({"model": "coca_ViT-B-32"}, "CoCaLoss"))
    for changes, name in kinds:
        arguments = type("Arguments", (Arguments,), changes)
        with ours.patch_open_clip():
            assert type(open_clip.factory.create_loss(arguments)) is getattr(ours, name)
            assert open_clip.loss.ClipLoss is ours.ClipLoss
        assert type(open_clip.factory.create_loss(arguments)) is getattr(library, name)


def test_training_entry_point(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """open_clip's own command, on its synthetic data: the same weights after an epoch with our loss and with theirs."""
    training = pytest.importorskip("open_clip_train.main")
    config = tmp_path / "tiny.json"
    config.write_text(
        '{"embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16,'
        ' "head_width": 16}, "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2,'
        ' "layers": 1}}'
    )
    open_clip.add_model_config(str(config))
    calls = []
    forward = ours.ClipLoss.forward
    monkeypatch.setattr(ours.ClipLoss, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))

    def run(name: str) -> dict[str, Tensor]:
        training.main([
            "--model", "tiny", "--dataset-type", "synthetic", "--train-num-samples", "24", "--batch-size", "8",
            "--epochs", "1", "--workers", "0", "--precision", "fp32", "--lr", "1e-2", "--warmup", "1", "--device",
            "cpu", "--logs", str(tmp_path), "--name", name, "--save-frequency", "1", "--seed", "3",
                "--eps", "0.01",  # Adam would turn rounding in gradients of zero into steps
        ])  # fmt: skip
        saved = torch.load(tmp_path / name / "checkpoints" / "epoch_1.pt", weights_only=False)
        return saved["state_dict"]

    theirs = run("theirs")
    assert not calls
    with ours.patch_open_clip():
        adapted = run("ours")
    assert len(calls) == 3
    for key, value in theirs.items():
        torch.testing.assert_close(adapted[key], value, rtol=1e-3, atol=1e-4, msg=key)
