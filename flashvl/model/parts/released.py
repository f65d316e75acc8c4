"""Converts published FlashVL/* checkpoints to model folders of flashvl.

Four are published: Static and Static-GRPO (SigLIP2), Dynamic and Dynamic-ISS (AIMv2). Their weights
are called `vit.` (the tower, AIMv2 by Apple's own names), `adp.` (the adapter) and `llm.`, and are
copied unchanged. Their code, which needs `trust_remote_code`, is not used.

    flashvl import FlashVL/FlashVL-2B-Static --output static/
"""

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Tokenizer

from flashvl.errors import CheckpointError
from flashvl.model.checks import check_shapes, check_sizes, read_json, shorten, usable
from flashvl.model.configuration_flashvl import FlashVLConfig
from flashvl.model.end_tokens import build_generation_config
from flashvl.model.loading import is_published
from flashvl.model.parts.assembly import (
    build_processor,
    find_image_token,
    load_tokenizer,
    read_preprocessing,
    tower_config,
)
from flashvl.model.parts.weights import (
    apple_name,
    build_empty,
    read_weights,
    refuse_existing,
    rename_weights,
    save_model,
)
from flashvl.model.presets import tiling_fields
from flashvl.model.tiling import TilingMode

ADAPTER_NAMES = {
    "layer_norm": "adp.p0.0",
    "linear_1": "adp.p0.1",
    "linear_2": "adp.p0.3",
    "linear_3": "adp.proj",
}
LLM_TYPE = "qwen2"
"""The `model_type` of every published checkpoint's LLM."""


def import_released(source: Path, output: Path) -> None:
    """Convert the published checkpoint in the folder `source` to the new folder `output`.

    Weights are mapped and written as they are stored, so memory peaks at about the model's size,
    most of it pages of `source` that the system may drop.

    Raises:
        ConfigError: `output` exists or cannot be written.
        CheckpointError: `source` is not a published checkpoint, contradicts itself, or has a weight
            that is missing, unknown or misshapen.
    """
    refuse_existing(output)
    values = read_json(source / "config.json")
    if not is_published(values.get("model_type")):
        raise CheckpointError(
            f"{source} holds a {shorten(values.get('model_type'))} model, not a published one;"
            " name a folder of a FlashVL/* repository"
        )
    stored = read_weights(source)
    tokenizer = load_tokenizer(source, Qwen2Tokenizer)
    image_token_id = find_image_token(source, tokenizer, LLM_TYPE)
    config = _config(source, values, stored, image_token_id)
    preprocessing = read_preprocessing(source, config.vision_config)
    with usable(str(source)):
        processor = build_processor(config, tokenizer, preprocessing)
        model = build_empty(config)
    model.generation_config = build_generation_config(config, tokenizer, source)

    is_aimv2 = config.vision_config.model_type == "aimv2_vision_model"
    if not is_aimv2:  # FlashVL has no pooling head, as its output is not read
        stored = {
            name: weight for name, weight in stored.items() if not name.startswith("vit.head.")
        }

    def stored_name(name: str) -> str:
        part, _, rest = name.removeprefix("model.").partition(".")
        if part == "vision_tower":
            return f"vit.{apple_name(rest) if is_aimv2 else rest}"
        if part == "multi_modal_projector":
            layer, _, kind = rest.partition(".")
            return f"{ADAPTER_NAMES[layer]}.{kind}"
        return f"llm.model.{rest}" if part == "language_model" else f"llm.{name}"

    wanted = model.state_dict()
    if config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    save_model(model, rename_weights(source, stored, wanted, stored_name), processor, output)


def _config(
    source: Path, values: dict[str, Any], stored: dict[str, torch.Tensor], image_token_id: int
) -> FlashVLConfig:
    """The `FlashVLConfig` of a published checkpoint, from the `values` of its config.json."""
    for key in ("vision_config", "llm_config", "intermediate_size"):
        if key not in values:
            raise CheckpointError(f"{source}: config.json has no {key}; download it anew")
    check_sizes(source, values)
    is_static = "Static" in values["model_type"]
    is_tied = "llm.lm_head.weight" not in stored
    with usable(f"{source}: config.json"):
        llm_config = values["llm_config"] | {"tie_word_embeddings": is_tied}
        llm_type = llm_config.setdefault("model_type", LLM_TYPE)
        if llm_type != LLM_TYPE:
            raise CheckpointError(
                f"{source}: config.json's llm_config has model_type {shorten(llm_type)}, not"
                f" {LLM_TYPE!r} like every published one; correct it"
            )
        vision_config = tower_config(values["vision_config"], is_aimv2=not is_static)
        mode: TilingMode = "static"
        if not is_static:
            is_folded = _is_folded(source, stored, vision_config.hidden_size)
            mode = "dynamic" if is_folded else "iss"
            if ("ISS" in values["model_type"]) == is_folded:
                raise CheckpointError(
                    f"{source}: config.json says {shorten(values['model_type'])}, but the input"
                    f" width of adp.p0.1.weight is that of a {mode} model; correct model_type"
                )
        config = FlashVLConfig(
            vision_config=vision_config,
            text_config=llm_config,
            image_token_id=image_token_id,
            **tiling_fields(mode, vision_config),
            projector_hidden_size=values["intermediate_size"],
            tie_word_embeddings=is_tied,
        )
        check_shapes(source, config)
        num_tokens = config.image_seq_length
    if values.get("image_token_num", num_tokens) != num_tokens:
        raise CheckpointError(
            f"{source}: config.json has image_token_num {shorten(values['image_token_num'])}, but a"
            f" tile of a {mode} model has {num_tokens} tokens; correct the wrong one"
        )
    return config


def _is_folded(source: Path, stored: dict[str, torch.Tensor], width: int) -> bool:
    """Whether the adapter's input tokens hold four patches each (pixel shuffle), not one (ISS)."""
    name = "adp.p0.1.weight"
    if name not in stored:
        raise CheckpointError(f"{source} lacks the weight {name}; download it anew")
    shape = tuple(stored[name].shape)
    if shape[-1] not in (width, 4 * width):
        raise CheckpointError(
            f"{source}: {name} has shape {shape}, whose last size should be {4 * width}, or"
            f" {width} for ISS; correct vision_config's hidden_size, or download the weights anew"
        )
    return shape[-1] == 4 * width
