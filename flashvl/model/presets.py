"""Model configurations by name: those of the paper, and the small ones that are shipped trained."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    Aimv2VisionConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from flashvl.errors import ConfigError
from flashvl.model.configuration_flashvl import FlashVLConfig
from flashvl.model.modeling_flashvl import FlashVLModel
from flashvl.model.tiling import TilingMode


def tiling_fields(mode: TilingMode, vision_config: PreTrainedConfig) -> dict[str, Any]:
    """Fields of `FlashVLConfig` for a tiling `mode`; ISS drops patches and has no pixel shuffle."""
    return {
        "tiling": _tiling(mode, vision_config),
        "downsample_ratio": 1.0 if mode == "iss" else 0.5,
    }


def _tiling(mode: TilingMode, vision_config: PreTrainedConfig) -> dict[str, Any] | None:
    """`FlashVLConfig.tiling` for `mode`; the margin is the paper's 12.5%, in whole patches."""
    if mode == "static":
        return None
    if mode == "dynamic":
        return {"mode": mode}
    patch_size = vision_config.patch_size
    return {"mode": mode, "margin": round(vision_config.image_size / 8 / patch_size) * patch_size}


def siglip2_so400m_512() -> SiglipVisionConfig:
    """The configuration of google/siglip2-so400m-patch16-512, the paper's default tower."""
    return SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=512,
        patch_size=16,
        vision_use_head=False,
    )


def siglip2_large_384() -> SiglipVisionConfig:
    """The configuration of google/siglip2-large-patch16-384 (paper, Table 3)."""
    return SiglipVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=384,
        patch_size=16,
        vision_use_head=False,
    )


def aimv2_huge_448() -> Aimv2VisionConfig:
    """The configuration of apple/aimv2-huge-patch14-448, the tower of the dynamic variants."""
    return Aimv2VisionConfig(
        hidden_size=1536,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=12,
        image_size=448,
        patch_size=14,
        use_head=False,
    )


def qwen2_1_5b() -> Qwen2Config:
    """The configuration of Qwen/Qwen2.5-1.5B-Instruct, and of Qwen2-1.5B-Instruct."""
    return Qwen2Config(
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


def llama3_2_1b() -> LlamaConfig:
    """The configuration of meta-llama/Llama-3.2-1B-Instruct (paper, Table 9)."""
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        tie_word_embeddings=True,
        bos_token_id=128000,
        eos_token_id=128009,
    )


def _flash_vl(
    tower: Callable[[], PreTrainedConfig],
    llm: Callable[[], PreTrainedConfig] = qwen2_1_5b,
    mode: TilingMode = "static",
    **options: Any,
) -> Callable[[], FlashVLConfig]:
    def build() -> FlashVLConfig:
        vision_config = tower()
        fields = tiling_fields(mode, vision_config) | options
        return FlashVLConfig(vision_config=vision_config, text_config=llm(), **fields)

    return build


def _tiny(
    mode: TilingMode = "static", overlap: dict[str, int] | None = None, **options: Any
) -> Callable[[], FlashVLConfig]:
    """A builder of the architecture at 1/400 of its size, for the procedural world on a CPU."""

    def tower() -> SiglipVisionConfig:
        return SiglipVisionConfig(
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=3,
            num_attention_heads=6,
            image_size=96,
            patch_size=12,
            vision_use_head=False,
        )

    def llm() -> Qwen2Config:
        return Qwen2Config(
            vocab_size=512,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            # At the usual 0.02, the embeddings of words that occur in the same places (colours)
            # become equal while they still differ little, and the model never tells them apart.
            initializer_range=0.07,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
        )

    if overlap is not None:
        options["tiling"] = {"mode": mode, **overlap}
    return _flash_vl(
        tower, llm, mode, **{"image_token_id": 3, "projector_hidden_size": 512} | options
    )


# The tiles of a square picture meet at the borders of the world's cells: a cell is 24 pixels (two
# patches) wide in them, as the tower has learnt it. So tiles overlap by more than in the paper.
_TINY_OVERLAP = {"margin": 24, "grid_size": 48}

# As many tiles as show a picture of 192 pixels at its own size: 3 x 3 overlapping, 4 x 4 of ISS.
_MANY_TILES = {"margin": 24, "max_tiles": 16}


PRESETS: dict[str, Callable[[], FlashVLConfig]] = {
    # The published models (Table 2).
    "static": _flash_vl(siglip2_so400m_512),
    "dynamic": _flash_vl(aimv2_huge_448, mode="dynamic"),
    "iss": _flash_vl(aimv2_huge_448, mode="iss"),
    # Table 3: towers.
    "static-aimv2": _flash_vl(aimv2_huge_448),
    "static-siglip2-large": _flash_vl(siglip2_large_384),
    # Table 6: tilings.
    "overlap": _flash_vl(aimv2_huge_448, mode="overlap"),
    # Table 8: adapters.
    "static-two-linear": _flash_vl(
        siglip2_so400m_512, projector_num_layers=2, projector_hidden_size=1536
    ),
    # Table 9: LLMs. Qwen2-1.5B has the shapes of Qwen2.5-1.5B.
    "static-qwen2": _flash_vl(siglip2_so400m_512),
    "static-llama": _flash_vl(siglip2_so400m_512, llama3_2_1b, image_token_id=128002),
    # Table 10: tilings of SigLIP2.
    "dynamic-siglip2": _flash_vl(siglip2_so400m_512, mode="dynamic"),
    # Models of the procedural world.
    "tiny": _tiny(),
    "tiny-dynamic": _tiny("dynamic"),
    "tiny-overlap": _tiny("overlap", _TINY_OVERLAP),
    "tiny-iss": _tiny("iss", _TINY_OVERLAP),
    # The paper's comparisons in miniature (`make miniature`).
    "tiny-many-overlap": _tiny("overlap", _MANY_TILES | {"grid_size": 64}),
    "tiny-many-iss": _tiny("iss", _MANY_TILES | {"grid_size": 48}, downsample_ratio=0.5),
    "tiny-two-linear": _tiny(projector_num_layers=2, projector_hidden_size=192),
}


def build_config(preset: str) -> FlashVLConfig:
    """A new configuration of the preset called `preset`.

    Raises:
        ConfigError: the preset does not exist.
    """
    if preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r}; known presets: {', '.join(PRESETS)}")
    return PRESETS[preset]()


def count_parameters(preset: str) -> dict[str, int]:
    """Number of parameters of each part of `preset`, built at full size without taking memory.

    The tower is counted without its pooling head, the LLM with its embedding; a head that is tied
    to the embedding is not counted again.
    """
    with torch.device("meta"):
        model = FlashVLModel(build_config(preset))
    parts = ("vision_tower", "multi_modal_projector", "language_model")
    counts = {
        part: sum(p.numel() for p in model.get_submodule(part).parameters()) for part in parts
    }
    return counts | {"total": sum(counts.values())}
