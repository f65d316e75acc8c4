"""Published checkpoints: the import computes what a second implementation of them computes.

The reference here is written from the published layout alone, with its names; it shares no code
with the model.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from flashvl.data.tokenizer import train_tokenizer
from flashvl.errors import CheckpointError, ConfigError
from flashvl.model.loading import load_model, load_processor, resolve_checkpoint
from flashvl.model.parts import assembly, prepare
from flashvl.model.parts.prepare import fetch_folder, prepare_model
from flashvl.model.parts.released import import_released
from flashvl.model.presets import tiling_fields

Weights = dict[str, torch.Tensor]

LAYOUTS = {
    "static": "FlashVLStaticConfig",
    "grpo": "FlashVLStaticConfig",
    "dynamic": "FlashVLDynamicConfig",
    "iss": "FlashVLDynamicISSConfig",
}
WIDTH, HEADS, LAYERS, SIDE, PATCH = 16, 2, 2, 8, 4
"""Sizes of the towers; an image has SIDE x SIDE patches."""
LLM = {
    "model_type": "qwen2",
    "vocab_size": 300,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,  # is ignored, since the head is stored
    "torch_dtype": "bfloat16",
}
PIXELS = {"size": {"height": 32, "width": 32}, "resample": 2, "image_mean": [0.4, 0.5, 0.6]}


def write_published(folder: Path, layout: str, hidden: int = 20) -> Path:
    """Write a random checkpoint in a published layout; AIMv2's has two shards of weights."""
    torch.manual_seed(1)
    is_static = layout in ("static", "grpo")
    weights = siglip_weights() if is_static else aimv2_weights()
    inputs = WIDTH if layout == "iss" else 4 * WIDTH
    weights |= {
        "adp.p0.0.weight": 1 + torch.randn(inputs),
        "adp.p0.0.bias": torch.randn(inputs),
        "adp.p0.1.weight": torch.randn(hidden, inputs) / 4,
        "adp.p0.1.bias": torch.randn(hidden),
        "adp.p0.3.weight": torch.randn(hidden, hidden) / 4,
        "adp.p0.3.bias": torch.randn(hidden),
        "adp.proj.weight": torch.randn(LLM["hidden_size"], hidden) / 4,
        "adp.proj.bias": torch.randn(LLM["hidden_size"]),
    }
    llm = Qwen2ForCausalLM(Qwen2Config(**(LLM | {"tie_word_embeddings": False})))
    torch.nn.init.normal_(llm.lm_head.weight)
    weights |= {f"llm.{name}": weight for name, weight in llm.state_dict().items()}

    folder.mkdir()
    if is_static:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    else:  # the adapter is last, as in the published shards; those of ISS are cut inside it
        cut = list(weights).index("adp.p0.3.weight" if layout == "iss" else "adp.p0.0.weight")
        names = list(weights)
        places = {}
        for number, part in enumerate((names[:cut], names[cut:]), start=1):
            file = f"model-0000{number}-of-00002.safetensors"
            save_file({name: weights[name] for name in part}, folder / file)
            places |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 28,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "image_size": SIDE * PATCH,
        "patch_size": PATCH,
        "proj_output_dim": LLM["hidden_size"],
        "model_type": "siglip_vision_model" if is_static else "aimv2",
    }
    config = {
        "model_type": LAYOUTS[layout],
        "architectures": [LAYOUTS[layout].removesuffix("Config")],
        "auto_map": {"AutoModel": "modeling_FlashVL.FlashVL"},
        "vision_config": vision,
        "llm_config": LLM,
        "intermediate_size": hidden,
        "image_token_num": 36 if layout == "iss" else 16,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(PIXELS))
    tokenizer = train_tokenizer(["a red circle"], 270)
    tokenizer.chat_template = "{{ 'theirs' }}"
    tokenizer.save_pretrained(folder)
    return folder


def siglip_weights() -> Weights:
    weights = {
        "vit.embeddings.patch_embedding.weight": torch.randn(WIDTH, 3, PATCH, PATCH) / 4,
        "vit.embeddings.patch_embedding.bias": torch.randn(WIDTH),
        "vit.embeddings.position_embedding.weight": torch.randn(SIDE * SIDE, WIDTH),
        "vit.post_layernorm.weight": 1 + torch.randn(WIDTH),
        "vit.post_layernorm.bias": torch.randn(WIDTH),
        "vit.head.probe": torch.randn(1, 1, WIDTH),
        "vit.head.attention.in_proj_weight": torch.randn(3 * WIDTH, WIDTH),
    }
    for number in range(LAYERS):
        layer = f"vit.encoder.layers.{number}."
        for name in ("layer_norm1", "layer_norm2"):
            weights[f"{layer}{name}.weight"] = 1 + torch.randn(WIDTH)
            weights[f"{layer}{name}.bias"] = torch.randn(WIDTH)
        linears = {f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in ("q", "k", "v", "out")}
        for name, shape in (linears | {"mlp.fc1": (28, WIDTH), "mlp.fc2": (WIDTH, 28)}).items():
            weights[f"{layer}{name}.weight"] = torch.randn(shape) / 4
            weights[f"{layer}{name}.bias"] = torch.randn(shape[0])
    return weights


def aimv2_weights() -> Weights:
    weights = {
        "vit.preprocessor.pos_embed": torch.randn(1, SIDE * SIDE, WIDTH),
        "vit.preprocessor.patchifier.proj.weight": torch.randn(WIDTH, 3, PATCH, PATCH) / 4,
        "vit.preprocessor.patchifier.proj.bias": torch.randn(WIDTH),
        "vit.preprocessor.patchifier.norm.weight": 1 + torch.randn(WIDTH),
        "vit.trunk.post_trunk_norm.weight": 1 + torch.randn(WIDTH),
    }
    for number in range(LAYERS):
        block = f"vit.trunk.blocks.{number}."
        weights |= {
            f"{block}attn.qkv.weight": torch.randn(3 * WIDTH, WIDTH) / 4,
            f"{block}attn.proj.weight": torch.randn(WIDTH, WIDTH) / 4,
            f"{block}norm_1.weight": 1 + torch.randn(WIDTH),
            f"{block}norm_2.weight": 1 + torch.randn(WIDTH),
            f"{block}mlp.fc1.weight": torch.randn(28, WIDTH) / 4,
            f"{block}mlp.fc2.weight": torch.randn(WIDTH, 28) / 4,
            f"{block}mlp.fc3.weight": torch.randn(28, WIDTH) / 4,
        }
    return weights


def stored_weights(folder: Path) -> Weights:
    files = sorted(folder.glob("*.safetensors"))
    return {name: weight for file in files for name, weight in load_file(file).items()}


def linear(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def layer_norm(weights: Weights, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)


def rms_norm(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weights[f"{name}.weight"]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Softmax attention of (tiles, patches, width), whose heads follow each other."""
    q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def siglip(weights: Weights, pixels: torch.Tensor) -> torch.Tensor:
    name = "vit.embeddings.patch_embedding"
    x = F.conv2d(pixels, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=PATCH)
    x = x.flatten(2).transpose(1, 2) + weights["vit.embeddings.position_embedding.weight"]
    for number in range(LAYERS):
        layer = f"vit.encoder.layers.{number}"
        h = layer_norm(weights, f"{layer}.layer_norm1", x, 1e-6)
        q, k, v = (linear(weights, f"{layer}.self_attn.{p}_proj", h) for p in "qkv")
        x = x + linear(weights, f"{layer}.self_attn.out_proj", attend(q, k, v))
        h = layer_norm(weights, f"{layer}.layer_norm2", x, 1e-6)
        h = F.gelu(linear(weights, f"{layer}.mlp.fc1", h), approximate="tanh")
        x = x + linear(weights, f"{layer}.mlp.fc2", h)
    return layer_norm(weights, "vit.post_layernorm", x, 1e-6)


def aimv2(weights: Weights, pixels: torch.Tensor) -> torch.Tensor:
    name = "vit.preprocessor.patchifier"
    x = F.conv2d(pixels, weights[f"{name}.proj.weight"], weights[f"{name}.proj.bias"], stride=PATCH)
    x = rms_norm(weights, f"{name}.norm", x.flatten(2).transpose(1, 2))
    x = x + weights["vit.preprocessor.pos_embed"]
    for number in range(LAYERS):
        block = f"vit.trunk.blocks.{number}"
        qkv = linear(weights, f"{block}.attn.qkv", rms_norm(weights, f"{block}.norm_1", x))
        q, k, v = qkv.unflatten(-1, (3, -1)).unbind(-2)
        x = x + linear(weights, f"{block}.attn.proj", attend(q, k, v))
        h = rms_norm(weights, f"{block}.norm_2", x)
        gated = F.silu(linear(weights, f"{block}.mlp.fc1", h)) * linear(
            weights, f"{block}.mlp.fc3", h
        )
        x = x + linear(weights, f"{block}.mlp.fc2", gated)
    return rms_norm(weights, "vit.trunk.post_trunk_norm", x)


def fold(x: torch.Tensor) -> torch.Tensor:
    """Pixel shuffle to half the side: a token holds 2 x 2 patches, one after the other."""
    rows = x.unflatten(1, (SIDE, SIDE))
    tokens = [
        torch.cat([rows[:, r, c], rows[:, r, c + 1], rows[:, r + 1, c], rows[:, r + 1, c + 1]], -1)
        for r in range(0, SIDE, 2)
        for c in range(0, SIDE, 2)
    ]
    return torch.stack(tokens, dim=1)


def reference_logits(
    folder: Path, layout: str, input_ids: torch.Tensor, pixels: torch.Tensor
) -> torch.Tensor:
    """Logits of the published model: tower, pixel shuffle or ISS's cut, adapter, LLM."""
    weights = stored_weights(folder)
    x = siglip(weights, pixels) if layout in ("static", "grpo") else aimv2(weights, pixels)
    if layout == "iss":  # an eighth of the tile, here one patch, is cut off on each side
        x = x.unflatten(1, (SIDE, SIDE))[:, 1:-1, 1:-1].flatten(1, 2)
    else:
        x = fold(x)
    x = layer_norm(weights, "adp.p0.0", x, 1e-5)
    for name in ("adp.p0.1", "adp.p0.3"):
        x = F.gelu(linear(weights, name, x))
    x = linear(weights, "adp.proj", x)

    llm = Qwen2ForCausalLM(Qwen2Config(**(LLM | {"tie_word_embeddings": False})))
    parts = {name: weight for name, weight in weights.items() if name.startswith("llm.")}
    llm.load_state_dict({name.removeprefix("llm."): weight for name, weight in parts.items()})
    embeds = llm.get_input_embeddings()(input_ids)
    embeds[input_ids == 3] = x.flatten(0, 1)
    with torch.no_grad():
        return llm.eval()(inputs_embeds=embeds).logits


def edit(folder: Path, change: Callable[[Weights], Any]) -> None:
    """Change the weights of a folder that has them in a single file."""
    weights = {name: weight.clone() for name, weight in stored_weights(folder).items()}
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, name: str = "config.json", **values: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of published checkpoints, one for each layout."""
    folder = tmp_path_factory.mktemp("published")
    for layout in LAYOUTS:
        write_published(folder / layout, layout)
    return folder


@pytest.fixture
def static(published: Path, tmp_path: Path) -> Path:
    """A copy of the static checkpoint, for tests to break."""
    return Path(shutil.copytree(published / "static", tmp_path / "static"))


def refusal(source: Path) -> str:
    """The one-line error of importing `source`, which must leave no files."""
    output = source.parent / "refused"
    with pytest.raises(CheckpointError) as caught:
        import_released(source, output)
    message = str(caught.value)
    assert message.isprintable()
    assert str(source) in message
    assert not list(source.parent.glob("*refused*"))
    return message


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_import_computes_what_was_published(
    published: Path, tmp_path: Path, layout: str
) -> None:
    output = tmp_path / "ours"
    import_released(published / layout, output)
    model, processor = load_model(output), load_processor(output)

    tokens = 36 if layout == "iss" else 16
    assert model.config.image_seq_length == tokens
    torch.manual_seed(2)
    pixels = torch.randn(2, 3, SIDE * PATCH, SIDE * PATCH)
    images = [3] * tokens
    input_ids = torch.tensor([[5, 9, *images, 30, 31, *images, 250, 7]])
    with torch.no_grad():
        logits = model(input_ids=input_ids, pixel_values=pixels).logits
    expected = reference_logits(published / layout, layout, input_ids, pixels)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.1

    modes = {"dynamic": {"mode": "dynamic"}, "iss": {"mode": "iss", "margin": PATCH}}
    assert model.config.tiling == modes.get(layout)
    assert list(processor.image_processor.image_mean) == [0.4, 0.5, 0.6]
    assert processor.image_processor.resample == 2
    assert "<|im_start|>" in processor.chat_template
    assert "theirs" not in str(processor.tokenizer.chat_template)


def test_the_margin_of_the_real_tile_is_56() -> None:
    vision_config = assembly.tower_config({"image_size": 448, "patch_size": 14}, is_aimv2=True)
    assert tiling_fields("iss", vision_config)["tiling"] == {"mode": "iss", "margin": 56}


def test_weights_stay_as_stored(static: Path, tmp_path: Path) -> None:
    before = {name: weight.bfloat16() for name, weight in stored_weights(static).items()}
    save_file(before, static / "model.safetensors")
    import_released(static, tmp_path / "ours")
    after = load_file(tmp_path / "ours" / "model.safetensors")
    assert {weight.dtype for weight in after.values()} == {torch.bfloat16}
    assert len(after) == len([name for name in before if "vit.head" not in name])
    assert torch.equal(after["lm_head.weight"], before["llm.lm_head.weight"])
    name = "model.multi_modal_projector.linear_3.weight"
    assert torch.equal(after[name], before["adp.proj.weight"])


def test_the_tokenizer_pads_on_the_left_whatever_the_source_says(
    static: Path, tmp_path: Path
) -> None:
    says = {"padding_side": "right", "max_length": 3, "truncation": True, "resample": 0}
    edit_config(static, "tokenizer_config.json", **says)
    import_released(static, tmp_path / "ours")
    assert AutoTokenizer.from_pretrained(tmp_path / "ours").padding_side == "left"
    processor = load_processor(tmp_path / "ours")
    padded = processor(text=["a", "a red circle, a red circle"], padding=True)
    assert padded["attention_mask"][0][0] == 0
    assert len(padded["input_ids"][1]) > 3
    image = Image.effect_mandelbrot((50, 40), (-3, -2.5, 2, 2.5), 100).convert("RGB")
    seen = processor(images=[image], text=["<|image_pad|>"], return_tensors="pt")["pixel_values"]
    assert torch.equal(seen, processor.image_processor(image, return_tensors="pt")["pixel_values"])


ADVICE = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.1}


@pytest.mark.parametrize(
    ("stored", "ends", "pad"),
    [
        (None, [2, 7], 0),
        ({}, [2, 7], 0),
        ({"eos_token_id": 5}, [2, 5], 0),
        ({"eos_token_id": [5, 2, 6], "pad_token_id": 9, **ADVICE}, [2, 5, 6], 9),
    ],
)
def test_end_and_pad_tokens_are_kept_the_templates_first(
    static: Path, tmp_path: Path, stored: dict[str, Any] | None, ends: list[int], pad: int
) -> None:
    edit_config(static, llm_config=LLM | {"eos_token_id": 7})
    if stored is not None:
        (static / "generation_config.json").write_text(json.dumps(stored))
    import_released(static, tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "generation_config.json").read_text())
    assert written.keys() == {"eos_token_id", "pad_token_id", "transformers_version"}
    for config in (
        GenerationConfig.from_pretrained(tmp_path / "ours"),
        load_model(tmp_path / "ours").generation_config,
    ):
        assert (config.eos_token_id, config.pad_token_id) == (ends, pad)


@pytest.mark.parametrize("token", [-1, 300, 1.5, "2", True, [[2]]])
@pytest.mark.parametrize("key", ["eos_token_id", "pad_token_id"])
def test_an_end_token_outside_the_vocabulary_is_refused(static: Path, key: str, token: Any) -> None:
    (static / "generation_config.json").write_text(json.dumps({key: token}))
    assert "its vocabulary has the tokens 0 to 299" in refusal(static)


def test_a_broken_generation_config_is_refused(static: Path) -> None:
    (static / "generation_config.json").write_text("[")
    assert "generation_config.json is not a readable JSON object" in refusal(static)


def test_without_a_head_the_embedding_is_the_head(static: Path, tmp_path: Path) -> None:
    edit(static, lambda weights: weights.pop("llm.lm_head.weight"))
    import_released(static, tmp_path / "ours")
    assert "lm_head.weight" not in load_file(tmp_path / "ours" / "model.safetensors")
    model = load_model(tmp_path / "ours")
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


def test_without_settings_pixels_are_the_towers(published: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(published / "dynamic", tmp_path / "dynamic"))
    (source / "preprocessor_config.json").unlink()
    import_released(source, tmp_path / "ours")
    image_processor = load_processor(tmp_path / "ours").image_processor
    assert image_processor.resample == 3
    assert image_processor.image_mean[0] == pytest.approx(0.48145466)


def test_a_misshapen_weight_is_named_with_both_shapes(static: Path) -> None:
    edit(static, lambda weights: weights.update({"adp.p0.3.weight": torch.ones(20, 21)}))
    assert "adp.p0.3.weight has shape (20, 21), not (20, 20)" in refusal(static)


def test_an_unknown_weight_is_named(static: Path) -> None:
    edit(static, lambda weights: weights.update({"adp.gate.weight": torch.ones(2)}))
    assert "1 unknown weights, such as adp.gate.weight" in refusal(static)


@pytest.mark.parametrize(
    "name", ["adp.p0.1.weight", "llm.model.norm.weight", "vit.post_layernorm.bias"]
)
def test_a_missing_weight_is_named(static: Path, name: str) -> None:
    edit(static, lambda weights: weights.pop(name))
    assert f"lacks the weight {name}" in refusal(static)


@pytest.mark.parametrize("layout", ["static", "iss"])
def test_buffers_that_older_transformers_stored_are_ignored(
    published: Path, tmp_path: Path, layout: str
) -> None:
    source = Path(shutil.copytree(published / layout, tmp_path / layout))
    (source / "model.safetensors.index.json").unlink(missing_ok=True)
    buffers = {
        "vit.embeddings.position_ids": torch.arange(64)[None],
        "llm.model.position_ids": torch.arange(512)[None],
        "llm.model.rotary_emb.inv_freq": torch.ones(3),
        "llm.model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(3),
        "llm.model.layers.1.self_attn.rotary_emb.cos_cached": torch.ones(1, 1, 512, 6),
    }
    edit(source, lambda weights: weights.update(buffers))
    import_released(source, tmp_path / "ours")
    assert not any("position_ids" in name for name in stored_weights(tmp_path / "ours"))
    load_model(tmp_path / "ours")


@pytest.mark.parametrize("size", [0, 4, 100, -100])
def test_truncated_weights_are_refused(static: Path, size: int) -> None:
    path = static / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert "model.safetensors cannot be read" in refusal(static)


@pytest.mark.parametrize("weight_map", [None, 3, [], {"a": 3}, {"a": ["b"]}], ids=str)
def test_an_index_without_files_is_refused(static: Path, weight_map: Any) -> None:
    index = {"weight_map": weight_map}
    (static / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "weight_map must name files" in refusal(static)


def test_quantised_weights_are_refused(static: Path) -> None:
    name = "llm.model.norm.weight"
    edit(static, lambda weights: weights.update({name: weights[name].to(torch.int8)}))
    assert f"{name} holds int8 numbers" in refusal(static)


@pytest.mark.parametrize(
    ("section", "values", "reason"),
    [
        ("vision_config", {"num_attention_heads": 3}, "num_attention_heads (3) does not divide"),
        ("vision_config", {"image_size": 36}, "a grid of 9x9 patches"),
        ("vision_config", {"patch_size": 0}, "vision_config.patch_size 0; it must be"),
        ("vision_config", {"hidden_act": "nonesuch"}, "is not usable"),
        ("llm_config", {"num_attention_heads": 5}, "not an even number"),
        ("llm_config", {"num_attention_heads": 8, "num_key_value_heads": 4}, "have 3 channels"),
        ("llm_config", {"num_key_value_heads": 3}, "num_key_value_heads (3) does not divide"),
        ("llm_config", {"num_hidden_layers": 10**12}, "num_hidden_layers 1000000000000; it must"),
        ("llm_config", {"hidden_size": -24}, "llm_config.hidden_size -24; it must"),
        ("llm_config", {"vocab_size": 3}, "the id 3, but the LLM's vocabulary ends at 2"),
        ("llm_config", {"model_type": "gpt2"}, "has model_type 'gpt2'"),
    ],
)
def test_a_config_of_no_usable_model_is_refused(
    static: Path, section: str, values: dict[str, Any], reason: str
) -> None:
    config = json.loads((static / "config.json").read_text())
    edit_config(static, **{section: config[section] | values})
    assert reason in refusal(static)


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 70),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(-3, 9), max_size=4),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)
FILES = [f"{name}config.json" for name in ("", "preprocessor_", "generation_", "tokenizer_")]


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_whatever_a_config_says_is_imported_or_refused_in_one_line(
    static: Path, data: st.DataObject
) -> None:
    """The imported model can also be asked."""
    name = data.draw(st.sampled_from(FILES))
    path, output = static / name, static.parent / "fuzzed"
    whole = json.loads(path.read_text()) if path.exists() else {}
    section = whole
    if name == "config.json":
        whole["llm_config"] = MORE | whole["llm_config"]
        section = data.draw(st.sampled_from([whole, whole["vision_config"], whole["llm_config"]]))
    keys = list(section) + ["eos_token_id", "pad_token_id", "resample", "image_std", "padding_side"]
    for key in data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=2)):
        if data.draw(st.booleans()):
            section[key] = data.draw(ANYTHING)
        else:
            section.pop(key, None)
    before = path.read_text() if path.exists() else None
    path.write_text(json.dumps(whole))
    try:
        import_released(static, output)
    except CheckpointError as error:
        assert str(error).isprintable() and str(static) in str(error)
        assert not list(static.parent.glob("*fuzzed*"))
    else:
        inputs = load_processor(output)(
            images=[Image.new("RGB", (9, 7))], text=["<|image_pad|>What?"], return_tensors="pt"
        )
        load_model(output).generate(**inputs, max_new_tokens=2)
    finally:
        shutil.rmtree(output, ignore_errors=True)
        path.unlink()
        if before is not None:
            path.write_text(before)


MORE = {
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "sliding_window": None,
    "use_sliding_window": False,
    "max_window_layers": 28,
    "layer_types": ["full_attention", "full_attention"],
    "attention_dropout": 0.0,
}
"""Further fields that a published config may have, for fuzzing."""


def test_a_missing_shard_is_named(published: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(published / "iss", tmp_path / "iss"))
    (source / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors cannot be read" in refusal(source)


def test_the_fused_weights_of_aimv2_are_checked(published: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(published / "iss", tmp_path / "iss"))
    (source / "model.safetensors.index.json").unlink()
    name = "vit.trunk.blocks.1.attn.qkv.weight"
    edit(source, lambda weights: weights.update({name: torch.ones(32, 16)}))
    assert f"{name} has shape (32, 16), not (48, 16)" in refusal(source)


@pytest.mark.parametrize(
    ("layout", "model_type"),
    [("dynamic", "FlashVLDynamicISSConfig"), ("iss", "FlashVLDynamicConfig")],
)
def test_a_name_that_contradicts_the_adapter_is_refused(
    published: Path, tmp_path: Path, layout: str, model_type: str
) -> None:
    source = Path(shutil.copytree(published / layout, tmp_path / layout))
    edit_config(source, model_type=model_type)
    assert f"but the input width of adp.p0.1.weight is that of a {layout}" in refusal(source)


def test_an_adapter_of_neither_width_is_refused(published: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(published / "dynamic", tmp_path / "dynamic"))
    (source / "model.safetensors.index.json").unlink()
    edit(source, lambda weights: weights.update({"adp.p0.1.weight": torch.ones(20, 48)}))
    assert "has shape (20, 48), whose last size should be 64, or 16 for ISS" in refusal(source)


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        ("config.json", {"model_type": "llava"}, "holds a 'llava' model"),
        ("config.json", {"image_token_num": 25}, "image_token_num 25, but a tile"),
        ("config.json", {"vision_config": 3}, "config.json is not usable"),
        ("config.json", {"intermediate_size": 22}, "adp.p0.1.weight has shape (20, 64)"),
        ("preprocessor_config.json", {"size": 48}, "has size 48, config.json image_size 32"),
    ],
)
def test_contradictions_are_refused(
    static: Path, name: str, values: dict[str, Any], reason: str
) -> None:
    edit_config(static, name, **values)
    assert reason in refusal(static)


def test_a_config_without_a_section_is_refused(static: Path) -> None:
    (static / "config.json").write_text('{"model_type": "FlashVLStaticConfig"}')
    assert "config.json has no vision_config" in refusal(static)


def test_a_tokenizer_without_the_placeholder_is_refused(static: Path) -> None:
    for file in static.glob("*token*"):
        text = file.read_text().replace("<|image_pad|>", "<|other|>")
        file.write_text(text)
    assert "its tokenizer has no <|image_pad|>" in refusal(static)


def test_no_tokenizer_is_refused(static: Path) -> None:
    for file in static.glob("*token*"):
        file.unlink()
    assert "no tokenizer.json" in refusal(static)


def test_an_import_obeys_the_umask(
    published: Path, tmp_path: Path, assert_obeys_umask: Callable[[Path], None]
) -> None:
    import_released(published / "iss", tmp_path / "made" / "ours")
    assert_obeys_umask(tmp_path / "made")


def test_an_existing_output_is_left_alone(static: Path) -> None:
    with pytest.raises(ConfigError, match="exists"):
        import_released(static, static)


def test_a_model_that_is_published_is_imported_once(
    static: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "IMPORTED", tmp_path / "cache")
    folder = prepare_model(static)
    assert (folder.parent.parent, folder.name) == (tmp_path / "cache", static.name)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert prepare_model(str(static)) == prepare_model(folder) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert load_processor(folder).image_seq_length == load_model(folder).config.image_seq_length

    edit(static, lambda weights: weights.pop("llm.lm_head.weight"))
    assert prepare_model(static) != folder
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("load", [resolve_checkpoint, load_model, load_processor])
def test_loading_refuses_a_published_model_and_says_what_converts_it(
    static: Path, load: Callable[[Path], object]
) -> None:
    with pytest.raises(CheckpointError) as error:
        load(static)
    assert f"flashvl import {static} --output DIR" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("model", ["tiny", "/no/such/folder"])
def test_whatever_is_not_published_is_prepared_already(model: str) -> None:
    assert prepare_model(model) == Path(model)


def test_a_name_that_is_neither_folder_nor_repository() -> None:
    with pytest.raises(CheckpointError, match="no folder '/no/such/folder'"):
        fetch_folder("/no/such/folder")


# Not getrusage's ru_maxrss: a child inherits the peak that its parent had when it forked.
MEASURE = """
import re, sys
from pathlib import Path
from flashvl.model.parts.released import import_released

def peak_kib():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])

before = peak_kib()
import_released(Path(sys.argv[1]), Path(sys.argv[2]))
print("grown:", 1024 * (peak_kib() - before))
"""


@pytest.mark.long
def test_memory_stays_below_a_fifth_above_the_model(tmp_path: Path) -> None:
    source = write_published(tmp_path / "large", "iss", hidden=7168)
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    assert size > 200e6
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "ours")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ours" / "model.safetensors").stat().st_size == pytest.approx(size, rel=0.01)
    grown = int(done.stdout.rpartition("grown:")[2])
    assert 0 < grown < 1.2 * size
