"""Loading: a name or folder that is not a complete Flash-VL model gives a one-line reason."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, SiglipVisionConfig

from flashvl.data.tokenizer import train_tokenizer
from flashvl.errors import CheckpointError
from flashvl.model import (
    FlashVLConfig,
    FlashVLForConditionalGeneration,
    FlashVLProcessor,
    loading,
)
from flashvl.model.loading import load_model, load_processor, resolve_checkpoint
from flashvl.model.parts.assembly import build_processor

WEIGHT = "model.multi_modal_projector.linear_2.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete model folder, smaller than `tiny`."""
    vision_config = SiglipVisionConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        vision_use_head=False,
    )
    text_config = Qwen2Config(
        vocab_size=270,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=2,
    )
    config = FlashVLConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=3,
        projector_hidden_size=12,
    )
    folder = tmp_path_factory.mktemp("saved")
    FlashVLForConditionalGeneration(config).save_pretrained(folder)
    processor = build_processor(config, train_tokenizer(["a b"], 262))
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the model folder for tests to break."""
    return Path(shutil.copytree(saved, tmp_path / "broken"))


def message_of(load: Callable[[Path], Any], folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    assert message.isprintable(), f"not one line: {message!r}"
    assert str(folder) in message
    return message


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    weights = {name: weight.clone() for name, weight in load_file(path).items()}
    edit(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_loads_a_whole_folder(saved: Path) -> None:
    assert resolve_checkpoint(saved) == saved
    model = load_model(str(saved))
    assert not model.training
    assert model.dtype == torch.float32
    weights = load_file(saved / "model.safetensors")
    state = model.state_dict()
    assert set(state) == set(weights) | {"lm_head.weight"}
    for name, weight in weights.items():
        assert torch.equal(state[name], weight), name
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    processor = load_processor(saved)
    assert isinstance(processor, FlashVLProcessor)
    assert processor.image_seq_length == model.config.image_seq_length == 4


def test_a_processor_that_cuts_other_tiles_than_the_model_takes(folder: Path) -> None:
    path = folder / "processor_config.json"
    config = json.loads(path.read_text())
    config["image_processor"]["size"] = {"height": 8, "width": 8}
    path.write_text(json.dumps(config))
    message = message_of(load_processor, folder)
    assert "tile_size=8" in message
    assert "tile_size=16" in message


def test_loads_in_the_asked_dtype(saved: Path) -> None:
    model = load_model(saved, torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_a_shipped_model_goes_by_its_name(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(saved, tmp_path / "shipped" / "small")
    monkeypatch.setattr(loading, "SHIPPED", tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    assert resolve_checkpoint("small") == tmp_path / "shipped" / "small"
    with pytest.raises(CheckpointError, match=r"no model folder 'smal'.*\(small\)"):
        resolve_checkpoint("smal")


@pytest.mark.parametrize("load", [resolve_checkpoint, load_model, load_processor])
def test_missing_folder(load: Callable[[Path], Any], tmp_path: Path) -> None:
    message = message_of(load, tmp_path / "none")
    assert "no model folder" in message
    assert "name a Flash-VL folder" in message


def test_a_file_is_no_folder(saved: Path) -> None:
    assert "no model folder" in message_of(resolve_checkpoint, saved / "config.json")


@pytest.mark.parametrize("load", [resolve_checkpoint, load_model, load_processor])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"3", b"{}", b"\xff\xfe{"], ids=repr)
def test_missing_or_broken_config(
    load: Callable[[Path], Any], folder: Path, content: bytes | None
) -> None:
    path = folder / "config.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert "no readable config.json" in message_of(load, folder)


@pytest.mark.parametrize("load", [resolve_checkpoint, load_model, load_processor])
def test_another_models_folder(load: Callable[[Path], Any], folder: Path) -> None:
    edit_config(folder, model_type="qwen2")
    assert "'qwen2' model, not 'flashvl'" in message_of(load, folder)


def test_config_of_an_unknown_language_model(folder: Path) -> None:
    edit_config(folder, text_config={"model_type": "nonesuch"})
    assert "nonesuch" in message_of(load_model, folder)


def test_config_with_a_value_of_the_wrong_type(folder: Path) -> None:
    edit_config(folder, projector_hidden_size="wide")
    message = message_of(load_model, folder)
    assert "projector_hidden_size 'wide'; it must be a whole number" in message


@pytest.mark.parametrize("load", [load_model, load_processor])
@pytest.mark.parametrize("section", ["vision_config", "text_config"])
@pytest.mark.parametrize("layers", [0, -1, 10**9, 10**30, "2", 1.5, True])
def test_config_with_an_impossible_number_of_layers(
    load: Callable[[Path], Any], folder: Path, section: str, layers: Any
) -> None:
    values = json.loads((folder / "config.json").read_text())[section]
    edit_config(folder, **{section: values | {"num_hidden_layers": layers}})
    assert f"{section}.num_hidden_layers {layers!r}; it must be" in message_of(load, folder)


def test_a_config_that_makes_no_usable_model(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    values["text_config"] |= {"num_attention_heads": 16, "num_key_value_heads": 8}
    (folder / "config.json").write_text(json.dumps(values))
    assert "heads have 1 channels" in message_of(load_model, folder)


def test_buffers_that_older_transformers_stored_are_ignored(folder: Path) -> None:
    buffers = {
        "model.vision_tower.embeddings.position_ids": torch.arange(16)[None],
        "model.language_model.rotary_emb.inv_freq": torch.ones(4),
        "model.language_model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    edit_weights(folder, lambda weights: weights.update(buffers))
    assert load_model(folder).config.image_seq_length == 4


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "model.safetensors" in message_of(load_model, folder)


@pytest.mark.parametrize("size", [0, 4, 100, -100])
def test_truncated_weights(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    message_of(load_model, folder)


def test_a_missing_weight(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.pop(WEIGHT))
    message = message_of(load_model, folder)
    assert "missing" in message
    assert WEIGHT in message


def test_an_unknown_weight(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.update({"model.gate.weight": torch.ones(2)}))
    message = message_of(load_model, folder)
    assert "unexpected" in message
    assert "model.gate.weight" in message


def test_a_misshapen_weight(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.update({WEIGHT: torch.ones(12, 13)}))
    assert WEIGHT in message_of(load_model, folder)


def test_a_config_that_is_wider_than_the_weights(folder: Path) -> None:
    edit_config(folder, projector_hidden_size=14)
    assert "model.multi_modal_projector.linear_" in message_of(load_model, folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "processor_config.json"])
@pytest.mark.parametrize("content", [None, "{", "[]"], ids=repr)
def test_missing_or_broken_processor_files(folder: Path, name: str, content: str | None) -> None:
    path = folder / name
    path.unlink()
    if content is not None:
        path.write_text(content)
    assert "processor" in message_of(load_processor, folder)
