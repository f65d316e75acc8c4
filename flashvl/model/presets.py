"""Configurations by name: those of the paper, and `tiny`, which is shipped trained."""

import torch
from transformers import Qwen2Config, SiglipVisionConfig

from flashvl.errors import ConfigError
from flashvl.model.configuration_flashvl import FlashVLConfig
from flashvl.model.modeling_flashvl import FlashVLModel


def _static() -> FlashVLConfig:
    """The paper's default: SigLIP2-so400m-patch16-512 and Qwen2.5-1.5B-Instruct."""
    vision_config = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=512,
        patch_size=16,
        vision_use_head=False,
    )
    text_config = Qwen2Config(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        bos_token_id=151643,
        eos_token_id=151645,
    )
    return FlashVLConfig(vision_config=vision_config, text_config=text_config)


def _tiny() -> FlashVLConfig:
    """The static architecture at 1/400 of its size, for the procedural world on a CPU."""
    vision_config = SiglipVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=3,
        num_attention_heads=6,
        image_size=96,
        patch_size=12,
        vision_use_head=False,
    )
    text_config = Qwen2Config(
        vocab_size=512,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        # At the usual 0.02 the embeddings of words that share their places (colours) fall together
        # while their differences are still small, and the model never tells them apart.
        initializer_range=0.07,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    return FlashVLConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=3,
        projector_hidden_size=512,
    )


PRESETS = {"static": _static, "tiny": _tiny}


def build_config(preset: str) -> FlashVLConfig:
    """The configuration called `preset`.

    Raises:
        ConfigError: no preset has that name.
    """
    if preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r}; known presets: {', '.join(PRESETS)}")
    return PRESETS[preset]()


def count_parameters(preset: str) -> dict[str, int]:
    """Parameters of each part of `preset`, built at full size on the meta device; no memory taken.

    The tower is without its pooling head, the LLM with its embedding, which is its head too where
    the two are tied.
    """
    with torch.device("meta"):
        model = FlashVLModel(build_config(preset))
    parts = ("vision_tower", "multi_modal_projector", "language_model")
    counts = {
        part: sum(p.numel() for p in model.get_submodule(part).parameters()) for part in parts
    }
    return counts | {"total": sum(counts.values())}
