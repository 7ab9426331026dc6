"""transformers' CLIP-like models from tiny random configurations: ``return_loss=True`` with and without the patch."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import pickle
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed: make conformance")

from fused_contrastive.adapters import transformers as ours  # noqa: E402

TOWER = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "projection_dim": 8,
}  # fmt: skip
TEXT = {
    **TOWER,
    "vocab_size": 50,
    "max_position_embeddings": 20,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {**TOWER, "image_size": 16, "patch_size": 8}
N = 6


def model_of(name: str, dropout: float = 0.0) -> torch.nn.Module:
    torch.manual_seed(0)
    drops = {"attention_dropout": dropout, "attention_probs_dropout_prob": dropout, "hidden_dropout_prob": dropout}
    model_class = getattr(importlib.import_module(f"transformers.models.{name}.modeling_{name}"), ours.MODELS[name])
    if name == "vision_text_dual_encoder":
        vision, text = transformers.ViTConfig(**VISION, **drops), transformers.BertConfig(**TEXT, **drops)
        config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=8)
    else:
        vision, text = {**VISION, **drops}, {**TEXT, **drops}
        if name == "siglip2":
            vision["num_patches"] = 4
            del vision["image_size"]
        if name == "altclip":
            text["project_dim"] = 16
            text["type_vocab_size"] = 2  # else token types make no difference
        config = model_class.config_class(text_config=text, vision_config=vision, projection_dim=8)
    return model_class(config).eval()


def inputs_of(name: str) -> dict[str, Any]:
    ids = torch.randint(3, 50, (N, 7))
    ids[:, -1] = 2
    mask = torch.ones_like(ids)
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(N, 3, 16, 16)}
    if name == "siglip2":
        inputs["pixel_values"] = torch.randn(N, 4, 3 * 8 * 8)
        inputs["pixel_attention_mask"] = torch.ones(N, 4, dtype=torch.int32)
        inputs["spatial_shapes"] = torch.tensor([[2, 2]] * N)
    return inputs


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ours.MODELS)
def test_loss_and_gradients(name: str, dtype: torch.dtype) -> None:
    model, inputs = model_of(name).to(dtype), inputs_of(name)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    try:
        theirs = model(**inputs, return_loss=True, output_hidden_states=True)
    except RuntimeError as error:
        if not ours.BEFORE_5 or dtype != torch.float64:
            raise
        pytest.skip(f"transformers' own forward in float64: {error}")
    wanted = gradients(model, theirs.loss)
    with ours.patch_transformers():
        adapted = model(**inputs, return_loss=True, output_hidden_states=True)
        found = gradients(model, adapted.loss)
        asked = model(**inputs, return_loss=True, output_logits=True)
        without = model(**inputs)
        as_tuple = model(**inputs, return_loss=True, return_dict=False)
        with torch.no_grad():
            evaluated = model(**inputs, return_loss=True)
    assert isinstance(adapted, type(theirs))
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-10}
    assert found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        size = max(1.0, gradient.abs().max().item())  # up to 1.6e8, whose rounding errors its small entries share
        near = {**tolerance, "atol": tolerance["atol"] * size}
        torch.testing.assert_close(found[key], gradient, **near, msg=lambda m, key=key: f"{key}: {m}")
    for key in ("loss", "text_embeds", "image_embeds"):
        torch.testing.assert_close(adapted[key], theirs[key], **tolerance)
    torch.testing.assert_close(adapted.text_model_output[0], theirs.text_model_output[0])
    torch.testing.assert_close(adapted.vision_model_output[0], theirs.vision_model_output[0])
    hidden = [output.vision_model_output.hidden_states for output in (theirs, adapted)]
    assert (hidden[0] is None) == (hidden[1] is None) == (name.startswith("siglip") and ours.BEFORE_5)
    assert adapted.logits_per_image is None
    torch.testing.assert_close(asked.logits_per_image, theirs.logits_per_image, **tolerance)
    torch.testing.assert_close(without.logits_per_text, theirs.logits_per_text)
    assert without.loss is None
    torch.testing.assert_close(as_tuple[:5], theirs.to_tuple()[:5], **tolerance)  # positions too
    torch.testing.assert_close(evaluated.logits_per_text, theirs.logits_per_text, **tolerance)
    for output in ("text_model_output", "vision_model_output"):
        torch.testing.assert_close(adapted[output].pooler_output, theirs[output].pooler_output)


@pytest.mark.parametrize("name", ours.MODELS)
def test_positional_arguments_positions_and_token_types(name: str) -> None:
    """All inputs are given by position, in the signature's order; a mix-up in the text tower would change the loss."""
    model, inputs = model_of(name), inputs_of(name)
    ids = inputs["input_ids"]
    inputs["position_ids"] = (torch.arange(ids.shape[1]).flip(0) + 2).expand_as(ids).contiguous()
    inputs["token_type_ids"] = (torch.arange(ids.shape[1]) % 2).expand_as(ids).contiguous()
    order = list(inspect.signature(model.forward).parameters)
    if "token_type_ids" not in order:
        del inputs["token_type_ids"]
    inputs["return_loss"] = True
    last = max(order.index(given) for given in inputs)
    values = [inputs.get(parameter) for parameter in order[: last + 1]]
    theirs = model(*values)
    for left_out in {"position_ids", "token_type_ids"} & inputs.keys():
        without = model(**{k: v for k, v in inputs.items() if k != left_out})
        assert abs(without.loss - theirs.loss) > 1e-5, f"{left_out} make no difference"
    wanted = gradients(model, theirs.loss)
    with ours.patch_transformers():
        adapted = model(*values)
        found = gradients(model, adapted.loss)
    assert adapted.logits_per_image is None
    torch.testing.assert_close(adapted.loss, theirs.loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adapted.text_embeds, theirs.text_embeds, rtol=1e-4, atol=1e-5)
    assert found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", ours.MODELS)
def test_dropout_draws_as_in_the_library(name: str) -> None:
    model, inputs = model_of(name, dropout=0.3).train(), inputs_of(name)
    losses = []
    for patched in (False, True):
        with ours.patch_transformers() if patched else contextlib.nullcontext():
            torch.manual_seed(1)
            losses.append(model(**inputs, return_loss=True).loss)
    assert model(**inputs, return_loss=True).loss != losses[0]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)


def test_output_logits_is_true_or_false() -> None:
    """The patch and the call check it, because a value such as "no" would otherwise count as True."""
    with pytest.raises(TypeError, match="output_logits: got 1, expected True or False"):
        ours.patch_transformers(output_logits=1)
    model, inputs = model_of("clip"), inputs_of("clip")
    with ours.patch_transformers(), pytest.raises(TypeError, match="output_logits: got 'no', expected True or False"):
        model(**inputs, return_loss=True, output_logits="no")


@pytest.mark.parametrize("name", ours.MODELS)
def test_outputs_keep_their_positions(name: str) -> None:
    """By index, unpacked, pickled and rebuilt by accelerate, outputs keep their places; missing logits are None."""
    model, inputs = model_of(name), inputs_of(name)
    theirs = model(**inputs, return_loss=True)
    with ours.patch_transformers():
        adapted = model(**inputs, return_loss=True)
        asked = model(**inputs, return_loss=True, output_logits=True)
    assert len(adapted.to_tuple()) == len(theirs.to_tuple()) == 7
    _, per_image, per_text, texts, images, *_ = adapted.to_tuple()
    for output in (adapted, type(adapted)(dict(adapted.items()))):
        assert output[1] is output[2] is per_image is per_text is output.logits_per_image is None
        assert output[3] is texts is output.text_embeds
        assert output[4] is images is output.image_embeds
        assert [value is None for value in output[:5]] == [False, True, True, False, False]
    assert list(adapted.keys()) == [key for key in theirs.keys() if not key.startswith("logits")]  # noqa: SIM118
    for k in range(5):
        torch.testing.assert_close(asked[k], theirs[k], rtol=1e-4, atol=1e-5)
    assert type(pickle.loads(pickle.dumps(model(**inputs, return_loss=True)))) is type(theirs)
    detached = type(adapted)(loss=adapted.loss.detach(), text_embeds=adapted.text_embeds.detach())
    again = pickle.loads(pickle.dumps(detached))
    assert type(again) is type(theirs)
    assert torch.equal(again.text_embeds, adapted.text_embeds)


def test_trainer(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """A few steps of Trainer: the same losses and weights with our loss and with theirs."""
    pytest.importorskip("accelerate")
    data = [{k: v[0] for k, v in inputs_of("clip").items()} for _ in range(32)]

    def train() -> tuple[list[float], dict[str, torch.Tensor]]:
        model = model_of("clip")
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=8, learning_rate=0.1, logging_steps=1,
            optim="sgd",
            report_to=[], seed=0, use_cpu=True, save_strategy="no", disable_tqdm=True, eval_strategy="steps",
            eval_steps=3,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=data, eval_dataset=data[:8],
            data_collator=lambda rows: {
                **{k: torch.stack([row[k] for row in rows]) for k in rows[0]}, "return_loss": True
            },
        )  # fmt: skip
        trainer.train()
        logged = [row.get("loss", row.get("eval_loss")) for row in trainer.state.log_history[:-1]]
        return logged, dict(model.named_parameters())

    theirs = train()
    with ours.patch_transformers():
        adapted = train()
    assert len(theirs[0]) == 8
    assert adapted[0] == pytest.approx(theirs[0], rel=1e-3)
    for key, value in theirs[1].items():
        torch.testing.assert_close(adapted[1][key], value, rtol=1e-3, atol=1e-5, msg=key)


def test_errors_and_undo() -> None:
    from transformers.models.clip.modeling_clip import CLIPModel

    original = CLIPModel.forward
    patch = ours.patch_transformers("clip")
    assert CLIPModel.forward is not original
    patch.undo()
    assert CLIPModel.forward is original
    with pytest.raises(NotImplementedError, match="models: got 'x_clip', which is not covered: each video"):
        ours.patch_transformers(["clip", "x_clip"])
    for name, reason in {"align": "its temperature divides", "clap": "its two directions"}.items():
        with pytest.raises(NotImplementedError, match=f"models: got '{name}', which is not covered: {reason}"):
            ours.patch_transformers(name)
    with pytest.raises(ValueError, match="models: got 'bert', expected one of 'clip'"):
        ours.patch_transformers(["bert"])
    assert CLIPModel.forward is original


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_what_does_not_pair_up_is_named_as_it_was_passed(name: str) -> None:
    model, inputs = model_of(name), inputs_of(name)
    fewer = {**inputs, "pixel_values": inputs["pixel_values"][:4]}
    with ours.patch_transformers():
        with pytest.raises(ValueError, match="input_ids: got 6 texts for the 4 images of pixel_values, expected one"):
            model(**fewer, return_loss=True)
        assert model(**fewer).logits_per_image.shape == (4, 6)
        for left_out in ("input_ids", "pixel_values"):
            with pytest.raises(ValueError, match=f"{left_out}: got None, expected a tensor"):
                model(**{**inputs, left_out: None}, return_loss=True)
