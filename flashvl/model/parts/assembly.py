"""Builds models and processors from parts: a vision tower, a language model and its tokenizer.

It knows what each kind of tower and of LLM needs. Parts are local folders; nothing is downloaded.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, FiniteFloat, field_validator
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling
from transformers.processing_utils import TextKwargs
from transformers.utils import logging

from flashvl.config import StrictModel, validate
from flashvl.errors import CheckpointError, ConfigError, one_line
from flashvl.model.chat_formats import CHAT_FORMATS
from flashvl.model.checks import check_shapes, check_sizes, read_json, shorten, usable
from flashvl.model.configuration_flashvl import FlashVLConfig
from flashvl.model.end_tokens import build_generation_config
from flashvl.model.image_processing_flashvl import FlashVLImageProcessor, FlashVLImagesKwargs
from flashvl.model.modeling_flashvl import FlashVLMultiModalProjector
from flashvl.model.parts.weights import (
    apple_name,
    build_empty,
    read_weights,
    refuse_existing,
    rename_weights,
    save_model,
)
from flashvl.model.presets import tiling_fields
from flashvl.model.processing_flashvl import FlashVLProcessor
from flashvl.model.tiling import TilingMode

PREPROCESSING: dict[str, dict[str, Any]] = {
    "siglip_vision_model": {},
    "aimv2_vision_model": {
        "resample": PILImageResampling.BICUBIC,
        "image_mean": OPENAI_CLIP_MEAN,
        "image_std": OPENAI_CLIP_STD,
    },
}
"""Preprocessing that each type of tower was trained with, where `FlashVLImageProcessor` differs."""


def assemble(
    vision: Path,
    llm: Path,
    output: Path,
    *,
    tiling: TilingMode = "static",
    seed: int = 0,
    **options: Any,
) -> None:
    """Write a model of public parts and a random adapter to `output`: the start of stage 1.

    Args:
        vision: folder of a SigLIP or SigLIP2 (fixed resolution) or of an AIMv2, in transformers'
            or in Apple's own layout; a text tower and a pooling head are left out.
        llm: folder of a Qwen2(.5) or Llama 3 language model with its tokenizer.
        tiling: mode of tiling; `overlap` and `iss` have the paper's margin, `iss` no pixel shuffle.
        seed: random seed of the adapter's weights.
        options: further fields of `FlashVLConfig`, such as `projector_hidden_size`.

    Raises:
        ConfigError: `output` exists or cannot be written, or the tower does not fit `tiling`.
        CheckpointError: a folder holds none of these models, or is incomplete.
    """
    refuse_existing(output)
    vision_config, tower_weights = _load_tower(vision)
    text_config, llm_weights = _load_llm(llm)
    tokenizer = load_tokenizer(llm)
    config = FlashVLConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=find_image_token(llm, tokenizer, text_config.model_type),
        **tiling_fields(tiling, vision_config),
        tie_word_embeddings=text_config.tie_word_embeddings,
        **options,
    )
    side = config.tiling_rule.kept_patches
    if side * config.downsample_ratio % 1:
        raise ConfigError(
            f"{vision} has a grid of {side}x{side} patches, whose side pixel shuffle cannot halve;"
            " use a tower with an even grid, or the tiling iss"
        )
    check_shapes(llm, config)

    model = build_empty(config)
    torch.manual_seed(seed)
    adapter = FlashVLMultiModalProjector(config)
    adapter.apply(model._init_weights)
    adapter.to(llm_weights["model.embed_tokens.weight"].dtype)

    weights = {f"model.vision_tower.{name}": weight for name, weight in tower_weights.items()}
    for name, weight in adapter.state_dict().items():
        weights[f"model.multi_modal_projector.{name}"] = weight
    for name, weight in llm_weights.items():
        weights[name.replace("model.", "model.language_model.", 1)] = weight
    processor = build_processor(config, tokenizer, read_preprocessing(vision, vision_config))
    model.generation_config = build_generation_config(config, tokenizer, llm)
    save_model(model, weights, processor, output)


def build_processor(
    config: FlashVLConfig,
    tokenizer: PreTrainedTokenizerBase,
    preprocessing: Mapping[str, Any] | None = None,
) -> FlashVLProcessor:
    """The processor of a model of `config`, with its LLM's tokenizer.

    The chat template's end token becomes the tokenizer's, so that answers of a base model end too.

    Args:
        preprocessing: `resample`, `image_mean` and `image_std`; None: those of `PREPROCESSING`.
    """
    vision_config = config.vision_config
    chat = CHAT_FORMATS[config.text_config.model_type]
    image_processor = FlashVLImageProcessor(
        size={"height": vision_config.image_size, "width": vision_config.image_size},
        patch_size=vision_config.patch_size,
        tiling=config.tiling,
        **(PREPROCESSING[vision_config.model_type] if preprocessing is None else preprocessing),
    )
    tokenizer.eos_token = chat.end_token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = chat.pad_token
    image_token = tokenizer.convert_ids_to_tokens(config.image_token_id)
    return FlashVLProcessor(
        image_processor,
        tokenizer,
        config.image_seq_length,
        image_token=image_token,
        chat_template=chat.template,
    )


def read_preprocessing(folder: Path, vision_config: PreTrainedConfig) -> dict[str, Any]:
    """Preprocessing by the tower's `PREPROCESSING` and its folder's preprocessor_config.json.

    Raises:
        CheckpointError: the file is unreadable, its size is not the tower's, or a value is
            impossible.
    """
    preprocessing = dict(PREPROCESSING[vision_config.model_type])
    if not (folder / "preprocessor_config.json").is_file():
        return preprocessing
    stored = read_json(folder / "preprocessor_config.json")
    size = stored.get("size", vision_config.image_size)
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    if size != vision_config.image_size:
        raise CheckpointError(
            f"{folder}: preprocessor_config.json has size {shorten(size)}, config.json image_size"
            f" {vision_config.image_size}; correct the one that is wrong"
        )
    given = {key: stored[key] for key in _Preprocessing.model_fields if stored.get(key) is not None}
    try:
        validated = validate(_Preprocessing, given, f"{folder}/preprocessor_config.json")
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    return preprocessing | validated.model_dump(exclude_unset=True)


Channels = Annotated[list[FiniteFloat], Field(min_length=3, max_length=3)]


class _Preprocessing(StrictModel):
    """Fields of a preprocessor_config.json that change the pixels a tower gets."""

    resample: PILImageResampling | None = None
    image_mean: Channels | None = None
    image_std: Channels | None = None

    @field_validator("image_std")
    @classmethod
    def _divides(cls, value: list[float]) -> list[float]:
        if min(value) <= 0:
            raise ValueError("must be above zero, because pixels are divided by it")
        return value


def find_image_token(folder: Path, tokenizer: PreTrainedTokenizerBase, llm_type: str) -> int:
    """The id of the image placeholder of an LLM of `llm_type`.

    Raises:
        CheckpointError: the tokenizer of `folder` lacks the placeholder, or the end token.
    """
    vocab = tokenizer.get_vocab()
    chat = CHAT_FORMATS[llm_type]
    for token in (chat.image_token, chat.end_token):
        if token not in vocab:
            raise CheckpointError(
                f"{folder}: its tokenizer has no {token}; use the tokenizer of Qwen2.5 or Llama 3.2"
            )
    return vocab[chat.image_token]


def load_tokenizer(folder: Path, tokenizer_class: Any = AutoTokenizer) -> PreTrainedTokenizerBase:
    """The tokenizer of `folder`, without its chat template, since the processor has one.

    Raises:
        CheckpointError: the folder has no usable tokenizer.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise CheckpointError(
            f"{folder} has no tokenizer.json and no vocab.json; download its tokenizer too"
        )
    try:
        tokenizer = tokenizer_class.from_pretrained(folder)
        tokenizer("a")
    except Exception as error:  # whatever a broken file makes the libraries raise
        raise CheckpointError(f"{folder} has no usable tokenizer: {one_line(error)}") from error
    tokenizer.chat_template = None
    # A processor takes its call's defaults from here; those for text and images are its own.
    for key in {**TextKwargs.__annotations__, **FlashVLImagesKwargs.__annotations__}:
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer


def tower_config(values: Mapping[str, Any], is_aimv2: bool) -> PreTrainedConfig:
    """The tower's configuration from a section of a config.json, else transformers' defaults.

    Only fields that shape the tower are taken: published files hold others in the same section.
    """
    shape = {key: values[key] for key in _TOWER_KEYS if key in values}
    if is_aimv2:
        return Aimv2VisionConfig(use_head=False, **shape)
    return SiglipVisionConfig(vision_use_head=False, **shape)


_TOWER_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
    "rms_norm_eps",
)


def _load_tower(folder: Path) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
    """A tower's configuration, and its weights by transformers' names, without a pooling head."""
    values = read_json(folder / "config.json")
    check_sizes(folder, values)
    model_type = values.get("model_type")
    with usable(f"{folder}: config.json"):
        if model_type == "aimv2" and "vision_config" not in values:
            config = tower_config(values, is_aimv2=True)
            with torch.device("meta"):
                wanted = Aimv2VisionModel(config).state_dict()
            return config, rename_weights(folder, read_weights(folder), wanted, apple_name)
        if model_type in ("siglip", "siglip_vision_model"):
            config = SiglipVisionConfig.from_pretrained(folder)
            config.vision_use_head = False
            return config, _load(SiglipVisionModel, folder, config).state_dict()
        if model_type in ("aimv2", "aimv2_vision_model"):
            config = Aimv2VisionConfig.from_pretrained(folder)
            config.use_head = False
            return config, _load(Aimv2VisionModel, folder, config).state_dict()
    raise CheckpointError(
        f"{folder} holds a {shorten(model_type)} model, not a vision tower; name a folder of a"
        " siglip, siglip_vision_model, aimv2 or aimv2_vision_model model"
    )


def _load_llm(folder: Path) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
    """An LLM's configuration and its weights, without a head that is tied to the embedding."""
    values = read_json(folder / "config.json")
    check_sizes(folder, values)
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in CHAT_FORMATS:
        raise CheckpointError(
            f"{folder} holds a {shorten(model_type)} model, not a supported LLM;"
            f" name a folder of a {' or '.join(CHAT_FORMATS)} model"
        )
    model = _load(AutoModelForCausalLM, folder)
    weights = model.state_dict()
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return model.config, weights


def _load(model_class: Any, folder: Path, config: PreTrainedConfig | None = None) -> Any:
    """A model in its stored dtype; stored weights that it has no place for are dropped."""
    given = {} if config is None else {"config": config}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # no table of all dropped weights
    try:
        model, report = model_class.from_pretrained(
            folder, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True, **given
        )
    except Exception as error:  # whatever a broken folder makes the libraries raise
        raise CheckpointError(f"{folder} cannot be loaded: {one_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
    if report["missing_keys"]:
        raise CheckpointError(
            f"{folder} lacks the weight {min(report['missing_keys'])}; download it anew"
        )
    if report["mismatched_keys"]:
        name, stored, wanted = min(report["mismatched_keys"])
        raise CheckpointError(
            f"{folder}: {name} has shape {tuple(stored)}, not {tuple(wanted)} as its config.json"
            " says; correct that, or download the weights anew"
        )
    return model
